"""The ledger: an honest run agrees on every line; a technique that is silently off does not.

Each dishonest run replaces one part of the engine by one that ignores what was asked.
"""

import contextlib
import dataclasses

import pytest
from engine_runs import ledger, read_json

from engine import build, step, trainer
from engine.data.batches import TrainOrder
from engine.data.prepare import open_tokens
from engine.models import attention
from engine.optimizers import OPTIMIZERS
from engine.tasks import next_token

LINES = [
    "device",
    "processes",
    "batch_size",
    "lr",
    "precision",
    "samples",
    "samples_of_the_run",
    "attention",
    "activation_checkpointing",
    "compile",
    "dataset",
    "tokenizer",
    "seed",
    "optimizer",
    "optimizer_kernel",
    "optimizer_state",
    "weight_decay",
    "sharding",
    "eval_precision",
]


def disagreeing(run) -> list[str]:
    return [what for what, line in ledger(run).items() if not line["agrees"]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16", "activation_checkpointing": "selective", "optimizer": "sgd", "seed": 9},
        {
            "attention": "manual",
            "activation_checkpointing": "every_n",
            "micro_batch_size": 2,
            "optimizer": "adam",
        },
        {"steps": 1, "activation_checkpointing": "full", "dropout": 0.1, "tokenizer": "chars"},
    ],
    ids=lambda c: "-".join(c) or "defaults",
)
def test_an_honest_run_agrees_on_every_line(lab, changes):
    run = lab.train(**changes)
    assert set(LINES) <= set(ledger(run)) and disagreeing(run) == []
    for line in read_json(run / "ledger.json")["entries"]:
        assert set(line) == {"what", "requested", "in_effect", "how", "agrees"}
        assert all(isinstance(line[key], str) and line[key] for key in ("requested", "in_effect", "how"))


def test_lines_say_how_it_was_established(lab):
    lines = ledger(lab.train(batch_size=8, micro_batch_size=2, steps=3, weight_decay=0.2))
    assert lines["batch_size"]["in_effect"] == "8"
    assert "micro-batch 2 × accumulation 4 × replicas 1, 128 tokens a step" in lines["batch_size"]["how"]
    tokens = open_tokens("tokens/by_hand")
    train = tokens.meta["splits"]["train"]
    assert (
        f"{train['sha256_text'][:12]}, tokens {train['sha256_tokens'][:12]}; {len(tokens.train)} tokens, "
        "vocabulary 256; 384 tokens consumed" in lines["dataset"]["how"]
    )
    # Tied: (256 + 16)·32 embeddings and two blocks of 12·32² decay; biases and norms do not.
    assert lines["weight_decay"]["how"] == (
        f"decay: {(256 + 16) * 32 + 2 * 12 * 32**2} parameters, weight decay 0.2; "
        f"no_decay: {2 * 13 * 32 + 2 * 32} parameters, weight decay 0.0"
    )


@pytest.mark.parametrize("mode", ["full", "selective", "every_n"])
def test_checkpointing_that_never_happened(lab, monkeypatch, mode):
    monkeypatch.setattr(build, "apply_activation_checkpointing", lambda *_, **__: None)
    run = lab.train(activation_checkpointing=mode)
    assert disagreeing(run) == ["activation_checkpointing"]
    assert ledger(run)["activation_checkpointing"]["in_effect"] == "0 of 2 blocks recomputed"


def test_checkpointing_that_nobody_asked_for(lab, monkeypatch):
    apply = build.apply_activation_checkpointing
    full = lab.config(activation_checkpointing="full").memory
    monkeypatch.setattr(
        build, "apply_activation_checkpointing", lambda model, _, **kw: apply(model, full, **kw)
    )
    assert disagreeing(lab.train()) == ["activation_checkpointing"]


def test_a_batch_of_another_size(lab, monkeypatch):
    half = TrainOrder.sample_ids
    monkeypatch.setattr(TrainOrder, "sample_ids", lambda self, number: half(self, number)[::2])
    monkeypatch.setattr(TrainOrder, "rank_slice", lambda self, number, rank, world: self.sample_ids(number))
    run = lab.train(batch_size=8)
    assert disagreeing(run) == ["batch_size", "samples"] and ledger(run)["batch_size"]["in_effect"] == "4"


def test_a_precision_that_is_ignored(lab, monkeypatch):
    monkeypatch.setattr(step, "autocast", lambda *_: contextlib.nullcontext())
    run = lab.train(precision="bf16")
    assert disagreeing(run) == ["precision"] and ledger(run)["precision"]["in_effect"] == "float32"


def test_tokens_of_something_else(lab):
    lab.train(study="other", tokenizer="chars")
    tokens = open_tokens("tokens/other")
    trainer.run(lab.config(), dataclasses.replace(tokens, meta={**tokens.meta, "dataset": "stdlib"}))
    assert disagreeing(lab.config().directory) == ["dataset", "tokenizer"]


def test_an_order_that_ignores_the_seed(lab, monkeypatch):
    monkeypatch.setattr(
        next_token, "TrainOrder", lambda tokens, context, size, _: TrainOrder(tokens, context, size, 0)
    )
    assert disagreeing(lab.train(seed=4)) == ["seed"]


def test_another_optimizer(lab, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "adamw", OPTIMIZERS["adam"])
    run = lab.train()
    assert disagreeing(run) == ["optimizer"] and ledger(run)["optimizer"]["in_effect"] == "adam"


def test_compiling_that_nobody_asked_for(lab, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setitem(counters["stats"], "unique_graphs", 2)
    assert disagreeing(lab.train()) == ["compile"]


def test_the_attention_kernel_is_the_one_that_ran(lab):
    assert ledger(lab.train())["attention"]["in_effect"] == "sdpa flash"
    dropped = ledger(lab.train(dropout=0.1))["attention"]  # the CPU's flash kernel has no dropout
    assert dropped["in_effect"] == "sdpa math" and dropped["agrees"]


def test_a_kernel_that_was_not_the_one_asked_for(lab, monkeypatch):
    monkeypatch.setattr(build, "select_attention", lambda *_: None)
    run = lab.train(attention="math")
    assert disagreeing(run) == ["attention"] and ledger(run)["attention"]["in_effect"] == "sdpa flash"


def test_attention_is_what_the_model_called(lab, monkeypatch):
    assert ledger(lab.train())["attention"]["in_effect"] == "sdpa flash"
    assert ledger(lab.train(attention="manual"))["attention"]["in_effect"] == "manual"
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask, is_causal, dropout_p: attention.manual_attention(q, k, v, dropout_p),
    )
    run = lab.train()
    assert disagreeing(run) == ["attention"] and ledger(run)["attention"]["in_effect"] == "manual"


def test_a_sample_that_is_trained_on_twice(lab, monkeypatch):
    whole = TrainOrder.sample_ids
    monkeypatch.setattr(TrainOrder, "sample_ids", lambda self, number: whole(self, number)[:1].repeat(8))
    run = lab.train(batch_size=8)
    assert disagreeing(run) == ["samples"] and ledger(run)["samples"]["in_effect"] == "1 distinct of 8 drawn"
