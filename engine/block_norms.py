"""The gradient norm of single blocks, of the whole gradient of a step, wherever its parts are.

It asks the device for nothing: each rank makes its share of the squares, and they are added up with what the step
adds up over the ranks anyway.
"""

import torch
import torch.nn as nn

from engine import parallel, split
from engine.split import local


class BlockNorms:
    """The blocks of one model that are asked for, by their numbers."""

    def __init__(self, model: nn.Module, blocks: tuple[int, ...], ranks: parallel.Ranks):
        self.blocks, self.ranks = blocks, ranks
        found = [(place, p) for place, b in enumerate(blocks) for p in model.layers[b].parameters()]
        self._parameters = [p for _, p in found]
        device = ranks.device
        self._place = torch.tensor([place for place, _ in found], dtype=torch.int64, device=device)
        self._weight = torch.tensor(
            [split.share(p, ranks.world_size) for p in self._parameters], device=device
        )

    def squares(self) -> torch.Tensor:
        """(blocks,) float32: their sums over the ranks that read different data are the squared norms."""
        total = torch.zeros(len(self.blocks), device=self.ranks.device)
        if self.blocks:
            norms = torch.stack(torch._foreach_norm([local(p.grad) for p in self._parameters]))
            total.index_add_(0, self._place, norms.float().square() * self._weight)
        return parallel.summed(total, self.ranks.tensor_group)
