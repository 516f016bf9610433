"""Which tensors are pruned: the weight matrices of linear layers, the output head's among them.

A token embedding that is tied to the head is one tensor, and counted once; one of its own is not pruned, nor are
biases, layer norms, positions, or the maps of latent attention. Rows that only pad a vocabulary are zero anyway, and
count for nothing. `pruning_exclude` leaves more out.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn as nn

from engine import split
from engine.errors import ConfigError
from engine.split import local

GROUP = 4  # of 2:4
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


@dataclass(frozen=True)
class Prunable:
    """One tensor."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, int]  # of all of it, without rows of padding

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of `tensor`, which is split as the parameter is: a view without rows of padding."""
        return local(tensor)[: self._rows]

    @cached_property
    def _rows(self) -> int:
        """That this rank has."""
        p = self.parameter
        return min(max(self.shape[0] - split.offset(p)[0], 0), len(local(p)))


def prunable(model: nn.Module, settings) -> list[Prunable]:
    """The tensors of `model`, unwrapped from DDP, in the order of its layers, the head's last.

    settings: an engine.config.Pruning. Raises ConfigError for an exclusion that names none, or leaves none, and where
    a pattern does not fit.
    """
    rows: dict[nn.Parameter, int] = {m.weight: len(m.weight) for m in model.modules() if _is_linear(m)}
    head = getattr(model, "head_weight", None)
    if head is not None:
        rows[head] = model.vocabulary_size
    names = {p: _plain(name) for name, p in model.named_parameters()}
    found = [Prunable(names[p], p, (n, p.shape[1])) for p, n in rows.items()]
    left = _without(found, [x.strip() for x in settings.pruning_exclude.split(",") if x.strip()])
    odd = [t.name for t in left if t.shape[1] % GROUP]
    if settings.pruning_pattern == "2:4" and odd:
        raise ConfigError(
            f"pruning_pattern = '2:4': needs rows whose length is a multiple of {GROUP}, which those of {odd[0]} are "
            "not; change the model's widths, or leave it out with pruning_exclude"
        )
    return left


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.weight is not None


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _without(found: list[Prunable], excluded: list[str]) -> list[Prunable]:
    def names(one: Prunable, what: str) -> bool:
        return f".{what}." in f".{one.name}."

    parts = sorted({part for one in found for part in one.name.split(".") if part != "weight"})
    unknown = [what for what in excluded if not any(names(one, what) for one in found)]
    if unknown:
        raise ConfigError(
            f"pruning_exclude: {unknown[0]!r} is no part of the name of a prunable tensor; those are made of "
            f"{', '.join(parts)}"
        )
    left = [one for one in found if not any(names(one, what) for what in excluded)]
    if not left:
        raise ConfigError("pruning_exclude: leaves no tensor to prune")
    return left
