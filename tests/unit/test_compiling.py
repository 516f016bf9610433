"""Compiling is proved by dynamo's counters, and a run that asks for it never trains uncompiled."""

import os
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_runs import column, ledger, read_json

from engine import compiling, memory
from engine.compiling import Proof
from engine.config import Compile, resolve
from engine.errors import ConfigError
from engine.operations import Operations

CAN_COMPILE = (
    shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
)


BUDGET = {"activation_checkpointing": "budget", "memory_budget": 0.3}


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs a C++ compiler and Python.h")
def test_compiled_blocks_give_eagers_losses_and_prove_that_they_were_compiled(lab):
    # Outside of the blocks: what is computed again for the budget has none of it.
    outside = {"token_dropout": 0.1, "output_dropout": 0.1}
    eager = lab.train(run="eager", steps=5, **outside)
    compiled = lab.launch(run="compiled", steps=5, compile="blocks", **BUDGET, **outside)
    for name in ("train_loss", "grad_norm"):
        assert column(compiled, name) == pytest.approx(column(eager, name), rel=1e-5)
    line = ledger(compiled)["compile"]
    graphs, breaks, recompiles = (int(part.split()[0]) for part in line["in_effect"].split(", ")[:3])
    assert line["agrees"] and graphs >= 1 and breaks == 0 and recompiles == 0
    metrics = read_json(compiled / "metrics.json")
    assert metrics["compile_seconds"] > 0 and metrics["activation_mib"] is None
    line = ledger(compiled)["activation_checkpointing"]
    assert line["agrees"] and line["in_effect"] == "a budget of 0.3"


def test_a_budget_that_the_compiler_was_not_given():
    config = resolve({"compile": "blocks", **BUDGET}, "test")
    seen = SimpleNamespace(operations=Operations(), accumulation=1)
    measured = SimpleNamespace(activation_bytes=None, recomputed_blocks=None, wrapped_blocks=0)
    for budget in (0.3, 1.0):
        with torch._functorch.config.patch(activation_memory_budget=budget):
            (line,) = memory.lines(config, seen, measured)
        assert line.agrees == (budget == 0.3) and line.in_effect == f"a budget of {budget:g}"


@pytest.mark.parametrize(
    ("compiled", "name"),
    [("blocks", "dropout"), ("model", "dropout"), ("model", "token_dropout"), ("model", "output_dropout")],
)
def test_a_budget_is_refused_where_what_is_compiled_has_dropout(compiled, name):
    """The compiler would recompute it with other masks than the loss had."""
    message = (
        f"activation_checkpointing = 'budget': not with {name} = 0.1: what the compiler computes again draws"
    )
    with pytest.raises(ConfigError, match=message):
        resolve({"compile": compiled, **BUDGET, name: 0.1}, "test")


@pytest.mark.parametrize(
    "changes", [{"token_dropout": 0.1}, {"output_dropout": 0.1}, {"model": "classifier"}]
)
def test_a_budget_is_not_refused_for_dropout_outside_of_compiled_blocks(changes):
    if changes.get("model") == "classifier":
        changes = changes | {"embedding_dropout": 0.1, "dataset": "ag_news", "tokenizer": "frequent_words"}
    found = resolve({"compile": "blocks", **BUDGET, **changes}, "test")
    assert found.memory.activation_checkpointing == "budget"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"activation_checkpointing": "selective", "dropout": 0.1, "compile_fullgraph": False},
            "compile_fullgraph = false: not with activation_checkpointing = 'selective' and dropout > 0",
        ),
        ({"deterministic": True, "attention": "cudnn", "precision": "bf16"}, "not with attention = 'cudnn'"),
        ({"deterministic": True, "compile_mode": "max-autotune"}, "not with compile_mode = 'max-autotune'"),
    ],
)
def test_what_would_not_draw_or_add_the_same_again_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"compile": "blocks", **changes}, "test")


def test_a_run_fails_when_compiling_is_switched_off_from_outside(lab, monkeypatch):
    message = "compile = 'blocks' was asked for, but dynamo is switched off: unset TORCH_COMPILE_DISABLE and "
    with torch._dynamo.config.patch(disable=True), pytest.raises(RuntimeError, match=message):
        lab.train(compile="blocks")  # as torch reads TORCH_COMPILE_DISABLE when it is imported
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(RuntimeError, match=message):
        lab.train(compile="blocks")


def test_a_run_fails_when_nothing_was_compiled(lab, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="compile = 'blocks' was asked for, but dynamo made no graph"):
        lab.train(compile="blocks", loss_kernel="fused")
    assert not (lab.config().directory / "metrics.json").exists()


def test_falling_back_to_eager_in_silence_is_refused(lab):
    with (
        torch._dynamo.config.patch(suppress_errors=True),
        pytest.raises(RuntimeError, match="suppress_errors is on: a failed compile would run eagerly"),
    ):
        lab.train(compile="blocks")
    compiling.apply(torch.nn.Module(), Compile())  # no matter where nothing is compiled


@pytest.mark.parametrize(
    ("settings", "found", "replays", "agrees"),
    [
        (Compile(compile="blocks"), Proof(2, 0, 1, 3.0), 0, True),
        (Compile(compile="blocks"), Proof(2, 1, 0, 3.0), 0, False),  # fullgraph was asked for
        (Compile(compile="blocks", compile_fullgraph=False), Proof(2, 1, 0, 3.0), 0, True),
        (Compile(compile="model"), Proof(0, 0, 0, 0.0), 0, False),
        (Compile(), Proof(1, 0, 0, 3.0), 0, False),
        (Compile(compile="model", compile_mode="reduce-overhead"), Proof(1, 0, 0, 3.0), 0, False),
        (Compile(compile="model", compile_mode="reduce-overhead"), Proof(1, 0, 0, 3.0), 4, True),
    ],
)
def test_the_ledger_compares_dynamos_counters_with_what_was_asked(
    monkeypatch, settings, found, replays, agrees
):
    monkeypatch.setattr(compiling, "proof", lambda: found)
    (line,) = compiling.lines(settings, replays)
    assert line.agrees == agrees
    assert line.in_effect == (str(found) if found.graphs else "none")


def test_nothing_is_required_where_nothing_was_asked_for(monkeypatch):
    monkeypatch.setattr(compiling, "proof", lambda: Proof(0, 0, 0, 0.0))
    compiling.require_compiled("none")
    for mode in ("blocks", "model"):
        with pytest.raises(RuntimeError, match=f"compile = '{mode}' was asked for, but dynamo made no graph"):
            compiling.require_compiled(mode)
