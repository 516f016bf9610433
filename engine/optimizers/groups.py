"""Which parameters decay, and which of them are Muon's.

Matrices and embeddings decay; biases, layer norms and other vectors do not. Muon's are the matrices of the blocks.
"""

import importlib

import torch
import torch.nn as nn

from engine.models import MODELS

MATRICES = "matrices"  # name of the group that Muon updates


def of(model: nn.Module, settings, *, seed: int = 0) -> list[dict]:
    """The parameter groups that an optimizer with these settings (engine.config.Optimizer) wants of `model`.

    seed: of what an optimizer draws.
    """
    groups = decay_groups(model, settings.weight_decay)
    if settings.optimizer == "spam":
        return [{**group, "seed": seed} for group in groups]
    if settings.optimizer != "muon":
        return groups
    in_blocks = {p for n, p in model.named_parameters() if ".layers." in f".{n}"}
    decaying = groups[0]["params"]
    groups[0]["params"] = [p for p in decaying if p not in in_blocks]
    matrices = {
        "params": [p for p in decaying if p in in_blocks],
        "weight_decay": settings.muon_weight_decay,
        "lr_factor": settings.muon_lr / settings.lr,
        "name": MATRICES,
    }
    return [matrices, *groups]


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups, named `decay` and `no_decay`; each parameter is in exactly one."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": weight_decay, "name": "decay"},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0, "name": "no_decay"},
    ]


def of_run(config, vocabulary_size: int, classes: int = 0) -> list[dict]:
    """The groups of the run that `config`, an engine.config.Config, describes; its weights are not made."""
    build = importlib.import_module(MODELS[config.model.model]).build
    with torch.device("meta"):
        model = build(config.model, vocabulary_size, (), classes)
    return of(model, config.optimizer)


def described(groups: list[dict]) -> str:
    """Each group with its parameters and its decay: `decay: 8192 parameters, weight decay 0.1; …`."""
    return "; ".join(
        f"{g['name']}: {sum(p.numel() for p in g['params'])} parameters, weight decay {g['weight_decay']}"
        for g in groups
    )
