"""What a dry run (engine/dry_run.py) has of other ranks: this one's part of the model, and what is exchanged.

What FSDP2 shards counts with this rank's share, and what it gathers for a while counts whole. Nothing here starts a
process group.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn as nn

from engine import tensor_parallel
from engine.config import Parallel
from engine.tape import Tape

PREFETCHED = 2  # blocks whose weights FSDP2 has gathered at a time: the one that runs, and the next
GRADIENTS = ("gradients", "gradients")  # what they are called on the tape


class FakeGroup:
    """Stands in for a tensor-parallel process group, of which this process is the first."""

    def __init__(self, size: int):
        self._size = size

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._size


def keep_first_part(model: nn.Module, size: int) -> None:
    """Leave the first of `size` tensor-parallel parts of every matrix in `model`."""
    if size == 1:
        return
    for name, parameter in list(model.named_parameters()):
        owner, _, own = name.rpartition(".")
        if owner.endswith((*tensor_parallel.COLUMNS, *tensor_parallel.VOCABULARY)):
            part = parameter.chunk(size)[0]
        elif owner.endswith(tensor_parallel.ROWS) and own == "weight":
            part = parameter.chunk(size, dim=1)[0]
        else:
            continue
        setattr(model.get_submodule(owner), own, nn.Parameter(part.detach().clone()))


class Spread:
    """The gradients, and the gathered weights, of a model that is replicated, sharded or both.

    share: what this rank has of each parameter, of its gradient and of its state.
    """

    def __init__(self, settings: Parallel, replicas: int, shards: int, tape: Tape):
        self.share, self.is_last = 1 / shards, False
        self._settings, self._tape = settings, tape
        self._in_buckets = settings.data_parallel == "ddp" and replicas > 1
        self._groups: list[Group] = []  # of FSDP2

    def watch_gradients(self, model: nn.Module) -> None:
        """Name gradients as such; DDP has a place for each, and FSDP2 shards them, one block after another."""
        parameters = list(model.parameters())
        if self.share < 1:
            blocks = model.layers if self._settings.shard_unit == "block" else []
            self._groups = [Group(list(block.parameters()), self, self._tape) for block in blocks]
            grouped = {p for group in self._groups for p in group.parameters}
            self._groups.append(Group([p for p in parameters if p not in grouped], self, self._tape))
            return
        buckets = {p: torch.empty_like(p) for p in parameters} if self._in_buckets else {}
        for bucket in buckets.values():
            self._tape.relabel(bucket, GRADIENTS)
        for p in parameters:
            if buckets:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", buckets[p]))
            else:
                p.register_post_accumulate_grad_hook(lambda p: self._tape.relabel(p.grad, GRADIENTS))

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Around a forward and a backward pass: FSDP2 holds weights whole, and in a step's last sends gradients."""
        self.is_last = is_last
        if self.share == 1:
            yield
            return
        *blocks, root = (group.bytes for group in self._groups)
        count = PREFETCHED if self._settings.reshard_after_forward else len(blocks)
        with self._tape.held(sum(blocks[:count]) + root, ("temporary", "gathered weights")):
            yield
            self.send_all()

    def send_all(self) -> None:
        """Free the buffers of gradients that are on their way."""
        for group in self._groups:
            group.finish()


class Group:
    """Parameters that FSDP2 gathers together, and whose gradients it reduces together."""

    def __init__(self, parameters: list, spread: Spread, tape: Tape):
        self.parameters, self.bytes = parameters, sum(p.nbytes for p in parameters)
        self._spread, self._tape, self._left, self._buffer = spread, tape, len(parameters), None
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, p: torch.Tensor) -> None:
        """A gradient is whole until the last of its group is there; then all are sent in one buffer."""
        self._tape.relabel(p.grad, GRADIENTS)
        self._left -= 1
        if self._left:
            return
        self._left = len(self.parameters)
        if self._spread.is_last:
            self._spread.send_all()
            self._buffer = self._tape.take(self.bytes, ("temporary", "gradients on their way"))
            for q in self.parameters:
                self._tape.relabel(q.grad, GRADIENTS, self._spread.share)

    def finish(self) -> None:
        """The buffer is freed when the next group has filled its own."""
        if self._buffer is not None:
            self._tape.give(self._buffer)
            self._buffer = None
