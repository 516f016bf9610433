"""Compiling is proved by dynamo's counters, and a run that asks for it never trains uncompiled."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from engine_runs import column, ledger, read_json

from engine import compiling
from engine.config import Compile

CAN_COMPILE = (
    shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs a C++ compiler and Python.h")
def test_compiled_blocks_give_eagers_losses_and_prove_that_they_were_compiled(lab):
    settings = {"steps": 5, "activation_checkpointing": "none", "dropout": 0.0}
    eager = lab.train(run="eager", **settings)
    compiled = lab.launch(run="compiled", compile="blocks", **settings)
    for name in ("train_loss", "grad_norm"):
        assert column(compiled, name) == pytest.approx(column(eager, name), rel=1e-5)
    line = ledger(compiled)["compile"]
    graphs, breaks, recompiles = (int(part.split()[0]) for part in line["in_effect"].split(", ")[:3])
    assert line["agrees"] and graphs >= 1 and breaks == 0 and recompiles == 0
    metrics = read_json(compiled / "metrics.json")
    assert metrics["compile_seconds"] > 0 and metrics["activation_mib"] is None
    assert ledger(compiled)["activation_checkpointing"]["agrees"]


@pytest.mark.slow
def test_a_run_fails_when_compiling_is_switched_off_from_outside(lab):
    done = lab.start("-m", "engine.train", lab.file(compile="blocks", steps=2), TORCH_COMPILE_DISABLE="1")
    assert done.returncode != 0
    assert "compile = 'blocks' was asked for, but dynamo made no graph" in done.stderr
    assert "TORCH_COMPILE_DISABLE" in done.stderr and "TORCHDYNAMO_DISABLE" in done.stderr
    assert not (lab.directory / lab.config().directory / "metrics.json").exists()


# torch 2.11 imports its own deprecated code when it compiles.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_run_fails_when_compiling_is_switched_off_inside(lab, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    with pytest.raises(RuntimeError, match="compile = 'model' was asked for, but dynamo made no graph"):
        lab.train(compile="model", compile_fullgraph=False)


def test_falling_back_to_eager_in_silence_is_refused(lab, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", True)
    with pytest.raises(RuntimeError, match="suppress_errors is on: a failed compile would run eagerly"):
        lab.train(compile="blocks")
    compiling.apply(torch.nn.Module(), Compile())  # no matter where nothing is compiled


def test_nothing_is_required_where_nothing_was_asked_for(monkeypatch):
    monkeypatch.setattr(compiling, "proof", lambda: compiling.Proof(0, 0, 0, 0.0))
    compiling.require_compiled("none")
    for mode in ("blocks", "model"):
        with pytest.raises(RuntimeError, match=f"compile = '{mode}' was asked for, but dynamo made no graph"):
            compiling.require_compiled(mode)
