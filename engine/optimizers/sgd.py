"""Stochastic gradient descent with momentum. Its weight decay is added to the gradient (L2)."""

import torch
from torch.optim.sgd import sgd

from engine.split import local


class SGD(torch.optim.SGD):
    """torch's fused SGD, over sharded parameters too: each rank updates its own part, as nothing is exchanged."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient; there is no `closure` in the engine."""
        for group in self.param_groups:
            having = [p for p in group["params"] if p.grad is not None]
            buffers = [self.state[p]["momentum_buffer"] if group["momentum"] else None for p in having]
            sgd(
                [local(p) for p in having],
                [local(p.grad) for p in having],
                [local(b) for b in buffers],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=False,
                foreach=False,
                fused=True,
                found_inf=getattr(self, "found_inf", None),
            )


def build(groups: list[dict], settings) -> torch.optim.Optimizer:
    """The momentum starts as zeros, which gives torch's own first step exactly.

    Torch would make it in the first step, and leave it uninitialised where that step is skipped.
    """
    optimizer = SGD(
        groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov, fused=True
    )
    if settings.momentum:
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer
