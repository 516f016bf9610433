"""The first losses and gradient norms of every kind of model. A refactoring must match them.

After a change that is meant to change them, write them anew and say in the commit why:

    python -m tests.golden.test_losses

CPU, fp32, fixed tokens from numpy, weights from torch's seeded generator. Other processors add in another
order, so the numbers are compared to a relative 1e-5.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.build import build_model, build_optimizer
from engine.config import resolve
from engine.parallel import Ranks
from engine.step import Step

GOLDEN = Path(__file__).with_name("losses.json")
PRESETS = {
    "pre": {},
    "post": {"norm_placement": "post"},
    "manual_attention": {"attention": "manual"},
    "untied": {"tie_embeddings": False},
    "no_bias": {"bias": False},
    "rotary_swiglu": {"positions": "rotary", "activation": "swiglu"},
    "latent": {"attention_form": "latent", "latent_width": 16},
    "latent_one_query": {"attention_form": "latent", "latent_width": 16, "latent_query": "shared"},
    "latent_one_value": {"attention_form": "latent", "latent_width": 16, "latent_value": "shared"},
    "reciprocal": {
        "attention_form": "latent",
        "latent_width": 16,
        "attention": "manual",
        "reciprocal_alpha": 0.5,
        "reciprocal_window": 8,
    },
    "classifier": {
        "dataset": "synthetic",
        "tokenizer": "frequent_words",
        "model": "classifier",
        "positions": "sinusoidal",
        "norm_placement": "post",
    },
    "double_heads": {
        "dataset": "dialogues",
        "model": "double_heads",
        "candidates": 3,
        "max_reply_tokens": 6,
    },
    "shared_context": {
        "dataset": "dialogues",
        "model": "double_heads",
        "candidates": 3,
        "max_reply_tokens": 6,
        "shared_context": True,
        "lm_loss_weight": 2.0,
    },
    "muon": {"optimizer": "muon", "muon_precision": "fp32"},
    "spam": {  # the reset comes before the last step
        "optimizer": "spam",
        "spam_threshold": 50.0,
        "spam_reset_steps": 4,
        "spam_warmup_steps": 2,
        "spam_first_warmup": True,
        "spam_grace_steps": 0,
        "spam_density": 0.5,
    },
    "adamwspam_legacy": {
        "optimizer": "adamwspam_legacy",
        "legacy_reset_counts": 6,
        "legacy_warmup_counts": 4,
    },
    "sgd": {"optimizer": "sgd", "lr": 0.1, "clip_norm": 0.0, "schedule": "linear"},
}
VOCABULARY, CLASSES, STEPS = 97, 4, 5


def first_losses(preset: str) -> dict[str, list[float]]:
    """Train the preset for a few steps in two micro-batches each."""
    settings = {
        "layers": 3,
        "heads": 4,
        "width": 48,
        "context": 24,
        "steps": 10,
        "warmup_steps": 2,
        "lr": 3e-3,
        "batch_size": 4,
        "micro_batch_size": 2,
        "seed": 3,
        "device": "cpu",
    }
    config = resolve({**settings, **PRESETS[preset]}, preset)
    ranks = Ranks(0, 1, torch.device("cpu"))
    model = build_model(config, VOCABULARY, ranks, CLASSES)
    step = Step(
        model,
        build_optimizer(model, config),
        ranks,
        training=config.training,
        schedule=config.schedule,
        lr=config.optimizer.lr,
    )
    # numpy promises a counter-based generator's raw words to be the same in every version.
    words = np.random.Philox(key=11).random_raw(STEPS * 4 * 25).reshape(STEPS, 4, 25) % VOCABULARY
    found = {"train_loss": [], "grad_norm": []}
    for number, tokens in enumerate(torch.from_numpy(words.astype(np.int64))):
        inputs, targets = samples(config, tokens)
        micro_batches = list(zip(inputs.split(2), targets.split(2), strict=True))
        measured = step(number, micro_batches)
        for name, values in found.items():
            values.append(measured[name].item())
    return found


def samples(config, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of the model's task, made of tokens (4, 25)."""
    if config.model.model == "classifier":
        return tokens[:, :-1], tokens[:, -1] % CLASSES
    if config.model.model == "gpt":
        return tokens[:, :-1], tokens[:, 1:]
    lines = 3 + config.data.candidates  # 3 × 6 tokens hold the 18 before a reply
    inputs = torch.stack(
        [tokens.repeat(1, 2)[:, : lines * 6], tokens.repeat(1, 2)[:, : lines * 6] % 2 + 95], 1
    )
    inputs = inputs.unflatten(2, (lines, 6)).where(inputs.unflatten(2, (lines, 6)) != 94, 0)  # 94 is padding
    return inputs, torch.cat([tokens[:, :1] % 3, tokens[:, 1:7]], 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_losses_are_the_recorded_ones(preset):
    recorded, found = json.loads(GOLDEN.read_text())[preset], first_losses(preset)
    assert len(found["train_loss"]) == STEPS
    for name, values in found.items():
        assert values == pytest.approx(recorded[name], rel=1e-5), name


def test_the_two_attentions_have_the_same_record():
    recorded = json.loads(GOLDEN.read_text())
    assert set(recorded) == set(PRESETS)
    assert recorded["manual_attention"]["train_loss"] == pytest.approx(
        recorded["pre"]["train_loss"], rel=1e-5
    )
    others = {
        name: tuple(record["grad_norm"]) for name, record in recorded.items() if name != "manual_attention"
    }
    assert len(set(others.values())) == len(others)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({preset: first_losses(preset) for preset in PRESETS}, indent=1) + "\n")
