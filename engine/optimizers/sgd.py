"""Stochastic gradient descent with momentum. Its weight decay is added to the gradient (L2)."""

import torch


def build(groups: list[dict], settings) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov, fused=True
    )
