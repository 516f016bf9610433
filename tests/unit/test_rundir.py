"""A run's directory: one writer, whole files, and after a kill nothing that looks complete."""

import hashlib
import json
import signal
import subprocess

import pytest
from engine_runs import assert_same_weights, events, read_json, rows, untimed, weights

from engine import rundir
from engine.config import load
from engine.errors import ConfigError

FILES = [
    "config.toml",
    "env.json",
    "evals.csv",
    "events.jsonl",
    "ledger.json",
    "metrics.json",
    "model.safetensors",
    "steps.csv",
    "tokenizer.json",
]
METRICS = {
    "status",
    "parameters",
    "steps",
    "tokens",
    "train_loss",
    "val_loss",
    "best_val_loss",
    "val_perplexity",
    "val_bits_per_byte",
    "step_seconds_median",
    "tokens_per_second",
    "peak_memory_gib",
    "activation_mib",
    "train_seconds",
    "compile_seconds",
}
HOLD = """
import sys
from pathlib import Path
from engine.rundir import only_writer
with only_writer(Path("results/s/r-1")):
    print("held", flush=True)
    sys.stdin.read()
"""
# Trains until step 25 begins, says so, and waits there.
STOP_AT_25 = """
import sys
from engine import runtime, train
before_torch = runtime.before_torch
def then_patch(settings):
    before_torch(settings)
    from engine.step import Step
    whole = Step.__call__
    def stop(self, step, micro_batches):
        if step == 25:
            print("stopped", flush=True)
            sys.stdin.read()
        return whole(self, step, micro_batches)
    Step.__call__ = stop
runtime.before_torch = then_patch
train.main()
"""


@pytest.fixture
def child(lab):
    """child(code, *arguments) starts Python code in the lab, with pipes; it is gone after the test."""
    started = []

    def start(code: str, *arguments: str) -> subprocess.Popen:
        process = subprocess.Popen(
            lab.command("-c", code, *arguments),
            cwd=lab.directory,
            env=lab.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:  # closes its pipes and waits
            process.kill()


# --- what a run leaves


def test_a_run_leaves_exactly_what_is_documented(lab):
    run = lab.train(
        steps=12, eval_interval=5, activation_norm_layers=[0, 1], gradient_norm_layers=[1], batch_size=8
    )
    assert sorted(path.name for path in run.iterdir()) == FILES
    steps, evals, metrics = rows(run / "steps.csv"), rows(run / "evals.csv"), read_json(run / "metrics.json")
    assert list(steps[0]) == [
        "step",
        "tokens_seen",
        "train_loss",
        "lr",
        "grad_norm",
        "step_seconds",
        "tokens_per_second",
        "samples_per_second",
        "data_wait_seconds",
        "peak_memory_gib",
        "activation_norm_0",
        "activation_norm_1",
        "gradient_norm_1",
    ]
    assert [(row["step"], row["tokens_seen"]) for row in steps] == [
        (str(i), str(128 * (i + 1))) for i in range(12)
    ]
    assert [row["step"] for row in evals] == ["4", "9", "11"]
    assert set(metrics) >= METRICS and metrics["status"] == "complete"
    assert (metrics["steps"], metrics["tokens"]) == (12, 12 * 128)
    assert metrics["val_loss"] == float(evals[-1]["val_loss"])
    assert metrics["best_val_loss"] == min(float(row["val_loss"]) for row in evals)
    assert metrics["train_loss"] == pytest.approx(sum(float(row["train_loss"]) for row in steps[-10:]) / 10)
    assert metrics["parameters"] == sum(tensor.numel() for tensor in weights(run).values())
    middle = sorted(float(row["step_seconds"]) for row in steps[3:])[4]  # the median without the warm-up
    assert metrics["step_seconds_median"] == middle
    assert metrics["tokens_per_second"] == pytest.approx(128 / middle)
    assert all(
        float(row["tokens_per_second"]) == pytest.approx(128 / float(row["step_seconds"])) for row in steps
    )
    assert 0 < metrics["activation_mib"] / 1024 < metrics["peak_memory_gib"] < 1
    assert not {"hostname", "user"} & set(read_json(run / "env.json"))


def test_a_rerun_replaces_the_directory_and_repeats_every_number(lab):
    run = lab.train(dropout=0.1)
    first = untimed(run / "steps.csv"), (run / "model.safetensors").read_bytes()
    (run / "stray").touch()
    assert lab.train(dropout=0.1) == run
    assert (untimed(run / "steps.csv"), (run / "model.safetensors").read_bytes()) == first
    assert not (run / "stray").exists()


def test_seeds_differ(lab):
    one, two = (untimed(lab.train(seed=seed) / "steps.csv") for seed in (1, 2))
    assert one[0]["train_loss"] != two[0]["train_loss"]


# --- one writer


def test_a_second_writer_is_refused_by_name_until_the_first_is_gone(lab, child):
    directory = lab.directory / "results/s/r-1"
    holder = child(HOLD)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(
        ConfigError, match=f"r-1:\n  - process {holder.pid} is writing it; wait for it, or stop it"
    ):
        lab.train(study="s", run="r")
    assert not directory.exists()
    lab.train(study="s", run="other")  # another run is free
    holder.kill()
    holder.wait()
    lab.train(study="s", run="r")  # a dead process holds nothing
    assert (directory / "metrics.json").exists()


def test_the_command_refuses_with_its_message_and_status_and_the_first_ones_files_survive(lab, child):
    run = lab.train(study="s", run="r")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    holder = child(HOLD)
    assert holder.stdout.readline() == "held\n"
    done = lab.start("-m", "engine.train", lab.file(study="s", run="r"))
    assert done.returncode == 2 and f"process {holder.pid} is writing it" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


# --- a kill


@pytest.mark.slow
def test_a_killed_run_looks_incomplete_and_a_rerun_resumes_it(lab, child):
    settings = {
        "steps": 30,
        "checkpoint_interval": 10,
        "dropout": 0.1,
        "eval_interval": 30,
        "log_interval": 10,
    }
    whole = lab.train(**settings)
    expected = untimed(whole / "steps.csv"), weights(whole)
    training = child(STOP_AT_25, lab.file(**settings))
    while (line := training.stdout.readline()) != "stopped\n":
        assert line, "the training ended by itself"
    training.send_signal(signal.SIGKILL)
    assert training.wait() == -signal.SIGKILL
    assert not (whole / "metrics.json").exists() and not (whole / "model.safetensors").exists()
    assert (whole / "config.toml").exists()
    again = lab.train(**settings)
    assert events(again) == [{"event": "resumed", "step": 20}]
    assert untimed(again / "steps.csv") == expected[0]
    assert_same_weights(weights(again), expected[1])


@pytest.mark.parametrize("when", ["rmtree", "save_file"])
def test_an_end_at_the_worst_moment_leaves_nothing_that_looks_complete(lab, monkeypatch, when):
    """While the directory of an earlier, complete run is removed; and between the model and its figures."""
    run = lab.train()
    write = rundir.write_json

    def killed(*_):
        raise KeyboardInterrupt

    def all_but_metrics(path, value):
        if path.name == "metrics.json":
            killed()
        write(path, value)

    if when == "rmtree":
        monkeypatch.setattr(rundir.shutil, "rmtree", killed)
    else:
        monkeypatch.setattr(rundir, "write_json", all_but_metrics)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        lab.train(steps=7)
    assert (run / "model.safetensors").exists() and not (run / "metrics.json").exists()


# --- files


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    rundir.write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        rundir.write_json(path, {"a": object()})
    assert list(tmp_path.iterdir()) == [path]

    def full_disk(self, text, **_):
        self.write_bytes(text[:3].encode())
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        rundir.write_json(path, {"a": 2})
    assert json.loads(path.read_bytes()) == {"a": 1}


def test_a_table_keeps_floats_exactly_and_what_is_missing_empty(tmp_path):
    table = rundir.Table(tmp_path / "t.csv", ["step", "loss", "peak"])
    table.append([{"step": 0, "loss": 0.1 + 0.2, "peak": None}])
    again = rundir.Table(tmp_path / "t.csv", ["step", "loss", "peak"])
    again.append([{"step": 1, "loss": 1e-30}, {"step": 2, "loss": float("nan"), "peak": 3}])
    found = again.read()
    assert [row["step"] for row in found] == ["0", "1", "2"]
    assert (
        float(found[0]["loss"]) == 0.1 + 0.2
        and float(found[1]["loss"]) == 1e-30
        and found[2]["loss"] == "nan"
    )
    assert [row["peak"] for row in found] == ["", "", "3"]


@pytest.mark.parametrize(
    ("every_step", "steps", "message"),
    [
        (True, [0, 2], "t.csv: step 2 does not follow step 0$"),
        (True, [1], "step 1 does not follow step -1$"),
        (False, [4, 4], "step 4 does not follow step 4$"),
        (False, [4, 9, 5], "step 5 does not follow step 9$"),
    ],
)
def test_a_table_takes_only_a_step_that_follows(tmp_path, every_step, steps, message):
    table = rundir.Table(tmp_path / "t.csv", ["step"], every_step=every_step)
    with pytest.raises(RuntimeError, match=message):
        table.append([{"step": step} for step in steps])
    assert table.read() == []
    table.append([{"step": 0}, {"step": 1}])
    again = rundir.Table(tmp_path / "t.csv", ["step"], every_step=every_step)
    with pytest.raises(RuntimeError, match="step 1 does not follow step 1$"):
        again.append([{"step": 1}])
    again.cut(0)
    again.append([{"step": 1}])
    assert [row["step"] for row in again.read()] == ["0", "1"]


def test_a_table_that_another_writes_too_is_told(tmp_path):
    one, two = (rundir.Table(tmp_path / "t.csv", ["step"]) for _ in range(2))
    one.append([{"step": 0}])
    with pytest.raises(RuntimeError, match="t.csv: another process writes it: 7 bytes, 5 are this one's"):
        two.append([{"step": 1}])
    assert [row["step"] for row in one.read()] == ["0"]


def test_a_run_says_whose_it_is_and_by_which_settings(lab):
    run = lab.train(study="s", run="r", seed=5)
    metrics, file = read_json(run / "metrics.json"), (run / "config.toml").read_bytes()
    assert (metrics["study"], metrics["run"], metrics["seed"]) == ("s", "r", 5)
    assert metrics["config_sha256"] == hashlib.sha256(file).hexdigest()
    same, other = (rundir.identity(lab.config(study="s", run="r", seed=5, lr=lr)) for lr in (1e-3, 2e-3))
    assert same["config_sha256"] == metrics["config_sha256"] != other["config_sha256"]


def test_settings_written_and_read_again_are_the_same_text(lab):
    """What the plan writes, and what the run says it was asked for."""
    text = rundir.toml(lab.config(run="r", lr=3e-4, activation_norm_layers=[0, 1], on_divergence="skip"))
    (lab.directory / "planned.toml").write_text(text, encoding="utf-8")
    assert rundir.toml(load("planned.toml")) == text


def test_events_are_one_json_object_a_line(tmp_path):
    rundir.append_event(tmp_path, "resumed", step=4)
    rundir.append_event(tmp_path, "note", text="two\nlines")
    assert events(tmp_path) == [{"event": "resumed", "step": 4}, {"event": "note", "text": "two\nlines"}]


def test_only_some_sections_can_be_written(lab):
    text = rundir.toml(lab.config(), only=("data",))
    assert text.startswith("[data]\n") and text.count("[") == 1
