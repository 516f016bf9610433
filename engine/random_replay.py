"""Random numbers of a recomputation that leaves operations out.

Checkpointing sets the random state back to the block's start before it computes the block again. Selective
checkpointing leaves out what it kept; if that drew random numbers, as attention with dropout does, whatever draws
after it would get others than in the forward pass, and gradients would be those of another mask.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import Config
from engine.ledger import Line


@dataclass
class Draws:
    """Calls of random operations in the blocks of one model."""

    forward: int = 0  # in forward passes that keep something for a backward pass
    replayed: int = 0  # in recomputations, each from the state that it had in the forward pass


def lines(draws: Draws | None, config: Config) -> list[Line]:
    """Whether all draws were replayed, where blocks that draw are recomputed in part and not by the compiler."""
    mode, dropout = config.memory.activation_checkpointing, config.model.dropout
    if mode != "selective" or dropout == 0 or config.compile.compile != "none":
        return []
    found = draws or Draws()
    return [
        Line(
            "random_replay",
            "all draws of recomputed blocks",
            f"{found.replayed} of {found.forward} draws replayed",
            "random operations of the blocks, in forward passes and in recomputations of this process",
            0 < found.forward == found.replayed,
        )
    ]


class RandomStates(TorchDispatchMode):
    """Notes the generator's state before each random operation in `states`; or, if it `replays`, sets it to them."""

    def __init__(self, states: list[torch.Tensor], draws: Draws, *, replays: bool):
        super().__init__()
        self._states, self._draws, self._replays, self._seen = states, draws, replays, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in getattr(function, "tags", ()):
            generator = _generator(args, kwargs)
            if self._replays:
                generator.set_state(self._states[self._seen])
                self._seen += 1
                self._draws.replayed += 1
            else:
                self._states.append(generator.get_state())
                self._draws.forward += 1
        return function(*args, **kwargs)


def replayed(contexts: tuple, draws: Draws) -> tuple:
    """The contexts of a block's forward pass and of its recomputation, with the same random numbers in both.

    draws: where they are counted.
    The states are noted before what leaves operations out gets to see them, so that both passes note the same ones.
    """
    states: list[torch.Tensor] = []
    return tuple(
        _both(RandomStates(states, draws, replays=replays), context)
        for context, replays in zip(contexts, (False, True), strict=True)
    )


@contextlib.contextmanager
def _both(states: RandomStates, keeping):
    with keeping, states:  # the last entered sees an operation first
        yield


def _generator(args: tuple, kwargs: dict) -> torch.Generator:
    """What an operation draws from: its own, or its tensors' device's, or that of the tensor it is to make."""
    if own := kwargs.get("generator"):
        return own
    given = (x.device for x in args if isinstance(x, torch.Tensor))
    device = next(given, torch.device(kwargs.get("device") or "cpu"))
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[
        torch.cuda.current_device() if device.index is None else device.index
    ]
