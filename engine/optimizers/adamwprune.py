"""AdamWPrune (mcgrof 2025): AdamW, whose moments say what is pruned, and are pruned with the weights.

What prunes is engine/pruning; this is the AdamW whose moments it reads, under a name that says that it is so.
"""

import torch


class AdamWPrune(torch.optim.AdamW):
    """torch's fused AdamW."""


def build(groups: list[dict], settings) -> torch.optim.Optimizer:
    return AdamWPrune(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True
    )
