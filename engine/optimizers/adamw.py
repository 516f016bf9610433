"""AdamW (Loshchilov & Hutter 2019): Adam with decay decoupled from the gradient."""

import torch


def build(groups: list[dict], settings) -> torch.optim.Optimizer:
    """The fused kernel updates all parameters at once, on CPU and GPU alike."""
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        amsgrad=settings.amsgrad,
        fused=True,
    )
