"""Adam (Kingma & Ba 2015). Its weight decay is added to the gradient (L2), so it is scaled like one."""

import torch


def build(groups: list[dict], settings) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        groups,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        amsgrad=settings.amsgrad,
        fused=True,
    )
