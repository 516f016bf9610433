"""Which parameters decay: matrices and embeddings do; biases, layer norms and other vectors do not."""

import torch.nn as nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups, named `decay` and `no_decay`; each parameter is in exactly one."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": weight_decay, "name": "decay"},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0, "name": "no_decay"},
    ]
