"""Cross-entropy by autograd alone, of whole logits whose vocabulary is split over a tensor-parallel group.

The loss kernel `full` of such a run; without a group it is torch's own. Must not know the model.
"""

import torch

from engine import parallel
from engine.losses import Vocabulary, of_counted


class Replicated(torch.autograd.Function):
    """The same tensor, used by every process of a group: gradients are summed over the group."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return parallel.summed(gradient.clone(memory_format=torch.contiguous_format), ctx.group), None


class Summed(torch.autograd.Function):
    """The sum over a group, on every process of it: each part's gradient is that of the sum."""

    @staticmethod
    def forward(ctx, tensor, group):
        return parallel.summed(tensor.clone(), group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocabulary: Vocabulary
) -> torch.Tensor:
    """Summed cross-entropy in fp32 of (hidden (N, C), weight (rows, C), targets (N,)), by autograd alone.

    For a vocabulary that is split over a group; this process's logits are kept whole.
    """
    first, classes = vocabulary.part(len(weight))
    logits = (Replicated.apply(hidden, vocabulary.group) @ weight.t()).float()  # (N, rows)
    padding = torch.arange(len(weight), device=logits.device) >= classes
    logits = logits.masked_fill(padding, float("-inf"))
    column = targets - first
    is_here = (column >= 0) & (column < classes)
    own = logits.gather(1, torch.where(is_here, column, 0)[:, None])[:, 0]
    largest = parallel.largest(logits.detach().amax(1), vocabulary.group)
    parts = torch.stack([(logits - largest[:, None]).exp().sum(1), torch.where(is_here, own, 0)])
    total, target_logit = Summed.apply(parts, vocabulary.group)
    return of_counted(largest + total.log() - target_logit, targets, vocabulary.size).sum()
