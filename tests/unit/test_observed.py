"""Techniques that a run asks for and a broken engine leaves out: the ledger tells.

The ledger's other lines have such tests beside the module that owns the technique, and in test_ledger.py.
"""

import dataclasses

import pytest
from engine_runs import ledger, read_json, weights

from engine import build, ladder, pretrained, step, trainer
from engine.data.batches import Prefetcher
from engine.models import gpt
from engine.objectives import NextToken
from engine.profiling import Profiler
from engine.step import Step
from engine.tasks import next_token

build_gpt, fill = gpt.build, pretrained._fill
BF16_STREAM = {"precision": "bf16", "residual_precision": "bf16"}


def in_fp32(settings, *arguments):
    """A model whose residual stream is fp32, whatever it was told."""
    return build_gpt(dataclasses.replace(settings, residual_precision="fp32"), *arguments)


def full(_config, vocabulary_size, group):
    return NextToken(vocabulary_size, group=group)


def whole(_config, vocabulary_size, group):
    return NextToken(vocabulary_size, "fused", group=group)


def lr_as_it_is(*arguments, lr, **settings):
    return Step(*arguments, lr=0.0003, **settings)


def one_ahead(order, **settings):
    return Prefetcher(order, **{**settings, "depth": 1})


BROKEN = {  # name: (settings, the part of the engine that is replaced, by what, the line that tells, what it tells)
    "stream": (BF16_STREAM, (gpt, "build"), in_fp32, "residual_precision", "float32"),
    "fused": (
        {"loss_kernel": "fused"},
        (next_token, "loss"),
        full,
        "loss_kernel",
        "full, largest logits 64 × 256",
    ),
    "chunked": (
        {"loss_kernel": "chunked", "loss_chunk_tokens": 8},
        (next_token, "loss"),
        whole,
        "loss_kernel",
        "fused, largest logits 64 × 256",
    ),
    "fp16": ({"precision": "fp16"}, (step, "LossScale"), lambda *_: None, "loss_scale", "none"),
    "lr_rule": (
        {"lr": 0.0003, "lr_rule": "linear", "lr_batch_size": 1},
        (trainer, "Step"),
        lr_as_it_is,
        "lr",
        "0.0003",
    ),
    "lr_to_0": (
        {"lr": 0.0006, "schedule": "linear", "min_lr_fraction": 0.0},
        (trainer, "Step"),
        lr_as_it_is,
        "lr",
        "0.0003",
    ),
    "prefetch": ({"prefetch": 3}, (trainer, "Prefetcher"), one_ahead, "prefetch", "1"),
    "trace": ({"profile_steps": 1}, (Profiler, "step"), lambda *_: False, "profile_steps", "0"),
    "offload": ({"optimizer_offload": True}, (build, "offload"), lambda o: o, "optimizer_offload", "cpu"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_technique_that_is_off_in_silence_is_told(lab, monkeypatch, name):
    settings, part, replacement, what, in_effect = BROKEN[name]
    honest = ledger(lab.train(run="honest", **settings))
    assert [line for line in honest.values() if not line["agrees"]] == [] and what in honest
    monkeypatch.setattr(*part, replacement)
    lines = ledger(lab.train(run="broken", **settings))
    assert [line["what"] for line in lines.values() if not line["agrees"]] == [what]
    assert lines[what]["in_effect"] == in_effect
    assert lines[what]["requested"] == honest[what]["requested"]


def test_weights_that_were_not_given_are_told(lab, monkeypatch):
    first = lab.train(run="first")
    line = ledger(lab.train(run="second", init_from=str(first), seed=2, steps=1, lr=1e-9))["init_from"]
    assert line["agrees"] and line["in_effect"] == f"a finished run: {len(weights(first))} tensors"

    def half(model, found, *others):
        kept = {name: tensor.clone() for name, tensor in model.layers[1].state_dict().items()}
        fill(model, found, *others)
        model.layers[1].load_state_dict(kept)

    monkeypatch.setattr(pretrained, "_fill", half)
    line = ledger(lab.train(run="half", init_from=str(first), seed=2, steps=1))["init_from"]
    # Biases, and the layer norms' ones, had the same value before; training moved them.
    assert not line["agrees"] and line["in_effect"] == f"a finished run: {len(weights(first)) - 12} tensors"
    monkeypatch.setattr(pretrained, "load_into", lambda *_: [])
    line = ledger(lab.train(run="none", init_from=str(first), steps=1))["init_from"]
    assert not line["agrees"] and line["in_effect"] == "seeded weights"


def test_memory_beyond_its_limit_is_told(lab, monkeypatch):
    """Where nothing kept the limit: an allocator that pages, say."""
    run = lab.train(memory_limit_gib=1.0)
    line = ledger(run)["memory_limit_gib"]
    peak = f"{read_json(run / 'metrics.json')['peak_memory_gib']:.3g} GiB"
    assert line["agrees"] and (line["requested"], line["in_effect"]) == ("1", peak)
    monkeypatch.setattr(ladder, "check_limit", lambda *_: None)
    line = ledger(lab.train(memory_limit_gib=1e-5))["memory_limit_gib"]
    assert not line["agrees"] and (line["requested"], line["in_effect"]) == ("1e-05", peak)
