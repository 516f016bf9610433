"""What is refused before DVC composes: a second `dvc exp run` beside one that trains, and a misspelt override."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "conf/hydra_plugins/plumbline_guards.py"


@pytest.fixture(scope="module")
def guards():
    spec = importlib.util.spec_from_file_location("guards", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked(root: Path, pid: int) -> Path:
    """A repository in which DVC's process `pid` writes one output and reads a file."""
    holder = {"pid": pid, "cmd": "dvc exp run"}
    (root / ".dvc/tmp").mkdir(parents=True)
    text = json.dumps({"write": {"results/a-1": holder}, "read": {"params.yaml": [holder]}})
    (root / ".dvc/tmp/rwlock").write_text(text, encoding="utf-8")
    return root


def test_a_second_start_is_refused_by_name(guards, tmp_path):
    root = locked(tmp_path, os.getppid())
    with pytest.raises(
        ValueError, match=rf"process {os.getppid()} \(dvc exp run\) runs stages in this directory"
    ):
        guards.refuse_busy(root, ["dvc", "exp", "run"])
    guards.refuse_busy(root, ["dvc", "exp", "run", "--queue"])


def test_what_a_dead_process_left_and_ones_own_are_no_reason(guards, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    guards.refuse_busy(locked(tmp_path / "dead", dead.pid), [])
    guards.refuse_busy(locked(tmp_path / "own", os.getpid()), [])
    guards.refuse_busy(tmp_path, [])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-S", "lerning_rate=3"], "lerning_rate: unknown setting (nearest: lr)"),
        (["-Swidht=3", "-S", "lr=1"], "widht: unknown setting (nearest: width)"),
        (["--set-param=qqq.a=3"], "qqq: unknown setting"),
        (["--set-param", "runz.sgd.lr=3"], "runz: unknown setting (nearest: run)"),
    ],
)
def test_a_misspelt_override_is_refused_with_the_nearest_name(guards, arguments, problem):
    with pytest.raises(
        ValueError, match=re.escape(f"{problem}. Nothing was run or changed. `python -m engine.c")
    ):
        guards.refuse_unknown(SOURCE.parents[2], ["dvc", "exp", "run", *arguments])


def test_every_name_that_conf_has_may_be_overridden(guards):
    names = (
        "lr",
        "seeds",
        "runs.sgd.lr",
        "only",
        "question",
        "+new",
        "~lr",
        "other.yaml:x",
    )
    guards.refuse_unknown(SOURCE.parents[2], ["dvc", "exp", "run", *(f"-S{name}=1" for name in names)])
    guards.refuse_unknown(SOURCE.parents[2], ["dvc", "exp", "run", "-Sstudy=gpt2", "-Spreset=gpt2_mla"])
    guards.refuse_unknown(SOURCE.parents[2], ["dvc", "repro", "-S"])
