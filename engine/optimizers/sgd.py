"""Stochastic gradient descent with momentum. Its weight decay is added to the gradient (L2)."""

import torch


def build(groups: list[dict], settings) -> torch.optim.Optimizer:
    """The momentum starts as zeros, which gives torch's own first step exactly.

    Torch would make it in the first step, and leave it uninitialised where fp16 skips that step.
    """
    sharded = any(hasattr(p, "to_local") for group in groups for p in group["params"])
    kernel = {"foreach": True} if sharded else {"fused": True}  # torch's fused one takes no DTensor
    optimizer = torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov, **kernel
    )
    if settings.momentum:
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer
