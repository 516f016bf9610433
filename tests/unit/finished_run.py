"""A finished run's directory without the training: a model with large random weights, so that no error can hide."""

import importlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine import rundir, vocabulary
from engine.config import Config, resolve
from engine.models import MODELS
from engine.models.gpt import GPT

SMALL = {"layers": 2, "heads": 2, "width": 16, "context": 12, "device": "cpu", "activation": "gelu_tanh"}


def config(**changes) -> Config:
    return resolve({**SMALL, **changes}, "test")


@torch.no_grad()
def drawn(settings: Config, vocabulary_size: int, seed: int = 3) -> GPT:
    """A model whose every weight and bias is random, but for the vocabulary's padding."""
    torch.manual_seed(seed)
    model = (
        importlib.import_module(MODELS[settings.model.model]).build(settings.model, vocabulary_size).eval()
    )
    for name, p in model.named_parameters():
        real = vocabulary_size if name in ("token_embedding.weight", "head.weight") else len(p)
        p[:real].normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return model


def write(directory: Path, vocabulary_size: int, **changes) -> GPT:
    """Write the run's directory, with the vocabulary of its tokens if it has any; the model in it."""
    settings = config(**changes)
    model = drawn(settings, vocabulary_size)
    directory.mkdir(parents=True)
    save_file(model.state_dict(), directory / "model.safetensors")
    (directory / "config.toml").write_text(rundir.toml(settings), encoding="utf-8")
    metrics = {"status": "complete", **rundir.identity(settings)}
    if settings.tokens_directory.exists():
        vocabulary.keep(settings.tokens_directory, directory)
        metrics[vocabulary.KEY] = vocabulary.sha256(directory)
    rundir.write_json(directory / "metrics.json", metrics)
    return model
