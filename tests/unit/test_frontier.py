"""Trials of micro-batches: their settings, their results, what is kept of them, and a real search."""

import json
import subprocess

import pytest
from engine_runs import TALKING, read_json, write_dialogues

from engine import frontier
from engine.config import load, resolve
from engine.errors import ConfigError
from engine.frontier import (
    fingerprint,
    load_results,
    own_micro_batch,
    result,
    settings_of_trial,
    table,
)
from engine.largest import Result
from engine.plan import estimate
from engine.rundir import toml


def test_a_trial_is_the_run_with_another_batch_and_little_else():
    config = resolve(
        {
            "study": "s",
            "batch_size": 512,
            "micro_batch_size": 8,
            "warmup_steps": 90,
            "activation_checkpointing": "full",
            "on_out_of_memory": "ladder",
            "checkpoint_interval": 10,
            "steps": 1000,
        },
        "test",
    )
    one = settings_of_trial(config, 3)
    assert (one.training.batch_size, one.training.micro_batch_size) == (3, 0)
    assert one.training.steps == 5 == one.schedule.warmup_steps
    assert one.memory.on_out_of_memory == "stop" and one.saving.checkpoint_interval == 0
    assert (one.run, one.data, one.optimizer, one.compile) == (
        config.run,
        config.data,
        config.optimizer,
        config.compile,
    )
    assert one.memory.activation_checkpointing == "full"


@pytest.mark.parametrize(
    "settings",
    [
        {"first_length": 64, "lengthening_steps": 50, "noise_scale_interval": 10, "micro_batch_size": 2},
        {"curriculum": "rarity", "curriculum_steps": 50, "eval_stride": 8, "sample_tokens": 20},
        {"pruning": "movement", "pruning_start": 20, "pruning_hold": 10, "pruning_regrowth": True},
        {"attention_sequences": 4, "reciprocity_window": 8, "monitor_interval": 1.0, "profile_steps": 3},
        {"latency_lengths": (8, 16), "scaling_probe_steps": 4, "sample_tokens": 8, "sample_prompt": "The"},
        {"model": "classifier", "dataset": "ag_news", "tokenizer": "frequent_words"},
        {"model": "double_heads", "dataset": "personachat", "tokenizer": "gpt2", "eval_train_rows": 100},
    ],
)
def test_a_trial_can_be_run_whatever_the_run_does_late_or_beside(settings, tmp_path):
    one = settings_of_trial(resolve({"context": 256} | settings, "test"), 12)
    (tmp_path / "run.toml").write_text(toml(one), encoding="utf-8")
    read = load(tmp_path / "run.toml")  # by the rules
    assert (read.logging.noise_scale_interval, read.logging.attention_sequences) == (0, 0)
    assert read.logging.monitor_interval == 0 == read.evaluation.sample_tokens
    assert read.evaluation.latency_lengths == () and read.runtime.scaling_probe_steps == 0
    # One window of text is scored; of rows all are, a quarter of a micro-batch at a time.
    text = read.model.model == "gpt"
    assert read.evaluation.eval_batch_size == (1 if text else 3)
    assert read.evaluation.eval_tokens == (256 if text else 0)


def test_weights_are_ranked_in_a_trial_after_every_step():
    settings = {"pruning": "movement", "pruning_start": 20, "pruning_hold": 10, "pruning_regrowth": True}
    pruning = settings_of_trial(resolve(settings, "test"), 1).pruning
    assert (pruning.pruning_start, pruning.pruning_hold, pruning.pruning_interval) == (0, 1, 1)


def test_data_parallel_ranks_have_a_micro_batch_each():
    config = resolve({"processes": 4, "tensor_parallel": 2, "data_parallel": "fsdp"}, "test")
    assert settings_of_trial(config, 3).training.batch_size == 6
    shared = {"processes": 2, "shard_samples": False, "on_shared_samples": "report"}
    assert settings_of_trial(resolve(shared, "test"), 3).training.batch_size == 3


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({"batch_size": 240, "micro_batch_size": 60}, 60),
        ({"batch_size": 240}, 240),
        ({"batch_size": 240, "processes": 4, "tensor_parallel": 2}, 120),
    ],
)
def test_the_search_starts_at_the_runs_own_micro_batch(settings, own):
    assert own_micro_batch(resolve(settings, "test")) == own


def finished(code: int, stderr: str = "") -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess([], code, "", stderr)


def test_how_a_trial_ended(tmp_path):
    metrics = {"peak_memory_gib": 2.5, "step_seconds_median": 0.5, "tokens_per_second": 1000}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | {"peak_reserved_gib": 3.0}))
    (tmp_path / "env.json").write_text(json.dumps({"device_memory_gib": 80.0}))
    success = result(4, finished(0), tmp_path)
    assert success == Result(4, "success", 2.5, 0.5, 1000, reserved_gib=3.0, limit_gib=80.0)
    said = "out of memory: one step took 3 GiB"
    assert result(4, finished(3, f"a warning\n{said}\n"), tmp_path) == Result(
        4, "out_of_memory", message=said
    )
    by_torchrun = finished(1, f"{said}\nthe first process to fail was 0")
    assert result(4, by_torchrun, tmp_path).status == "out_of_memory"
    error = result(4, finished(2, "error: 1 problem:\n  - wrong\n"), tmp_path)
    assert error == Result(4, "error", message="exit status 2; error: 1 problem:;   - wrong")
    assert result(4, finished(-9), tmp_path) == Result(4, "error", message="signal 9")


def test_results_of_other_settings_are_not_mixed_in(tmp_path):
    a, b = (resolve({"width": width}, "test") for width in (64, 128))
    assert fingerprint(a) == fingerprint(resolve({"width": 64, "batch_size": 2, "steps": 7}, "test"))
    assert fingerprint(a) != fingerprint(b)
    path = tmp_path / "frontier.json"
    assert load_results(path, fingerprint(a)) == []
    path.write_text(json.dumps({"fingerprint": fingerprint(a), "results": [vars(Result(1, "success"))]}))
    assert load_results(path, fingerprint(a)) == [Result(1, "success")]
    with pytest.raises(ConfigError, match="these results are of other settings or another torch"):
        load_results(path, fingerprint(b))
    path.write_text("{}")
    with pytest.raises(ConfigError, match="not a frontier's results"):
        load_results(path, fingerprint(a))


def test_the_table_by_hand():
    results = [
        Result(1, "success", 0.25, 0.0105, 1234.4, reserved_gib=0.375),
        Result(2, "success", 0.5, 0.02, 1200.0, reserved_gib=0.75),
        Result(4, "out_of_memory", message="out of memory: …"),
    ]
    assert table(results, tokens=64).splitlines() == [
        "micro-batch  status          peak GiB   held GiB    step ms    tokens/s",
        "          1  success            0.250      0.375       10.5       1,234",
        "          2  success            0.500      0.750       20.0       1,200",
        "          4  out_of_memory          –          –          –           –",
        "",
        "largest that fits: 2 sequences (128 tokens); fastest: 1",
    ]
    assert table(results[2:], 64).endswith("none fits")
    assert table(results, 64, so_far=True).endswith(
        "largest that fits so far: 2 sequences (128 tokens); fastest: 1"
    )


@pytest.mark.parametrize(("settings", "tokens"), [({}, "32"), (TALKING, "1,408")])
def test_stopped_by_hand_it_says_what_it_has(lab, monkeypatch, capsys, settings, tokens):
    """The first trial ends, Ctrl-C comes in the second; the file of the first is what a next search starts from.

    Two sequences of 16 tokens; or two dialogues with four candidates of 176.
    """
    monkeypatch.chdir(lab.directory)
    write_dialogues(lab.directory / "dialogues", train=30, valid=10, test=6)
    file = lab.file(**settings, batch_size=2)

    def trial(config, micro):
        if micro > 2:
            raise KeyboardInterrupt
        return Result(micro, "success", 0.25, 0.01, 1000.0)

    monkeypatch.setattr(frontier, "trial", trial)
    with pytest.raises(SystemExit, match="^130$"):
        frontier.main([str(file), "--largest", "9"])
    said = capsys.readouterr()
    assert f"largest that fits so far: 2 sequences ({tokens} tokens)" in said.out
    assert said.err.splitlines()[-2:] == [
        "what was tried is in frontier.json: the same command goes on",
        "stopped",
    ]
    assert [r["micro_batch"] for r in read_json(lab.directory / "frontier.json")["results"]] == [2]


def test_stopped_in_the_first_trial_there_is_nothing_to_say(lab, monkeypatch, capsys):
    monkeypatch.chdir(lab.directory)

    def trial(config, micro):
        raise KeyboardInterrupt

    monkeypatch.setattr(frontier, "trial", trial)
    with pytest.raises(SystemExit, match="^130$"):
        frontier.main([str(lab.file(batch_size=2)), "--largest", "9"])
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines()[-1] == "stopped" and "what was tried" not in said.err


@pytest.mark.slow
def test_a_real_search_on_a_cpu_with_a_limit(lab):
    """Three sequences of this model fit, four do not; the run's own two are first; asked again, nothing is tried."""
    settings = {"layers": 2, "width": 64, "context": 64, "warmup_steps": 5}
    three, four = (estimate(lab.config(**settings, batch_size=micro), 256, "cpu", 1).peak for micro in (3, 4))
    settings["batch_size"] = 2
    settings["memory_limit_gib"] = (three + four) / 2 / 2**30
    file = lab.file(**settings)
    done = lab.start("-m", "engine.frontier", file)
    assert done.returncode == 0, done.stderr
    *fit, fails = read_json(lab.directory / "frontier.json")["results"]
    said = dict(line.split(", ") for line in done.stderr.splitlines() if "success" in line)
    assert [row["micro_batch"] for row in fit] == [2, 3] and fails["micro_batch"] == 4
    for row in fit:
        assert row["status"] == "success" and row["tokens_per_second"] > 0
        assert row["peak_memory_gib"] <= settings["memory_limit_gib"] == row["limit_gib"]
        assert said[f"micro-batch {row['micro_batch']}: success"] == f"{row['peak_memory_gib']:.3f} GiB"
    assert fails["status"] == "out_of_memory"
    assert f"memory_limit_gib = {settings['memory_limit_gib']:g}" in fails["message"]
    assert "largest that fits: 3 sequences (192 tokens)" in done.stdout
    assert not (lab.directory / "results").exists()  # trials leave nothing
    again = lab.start("-m", "engine.frontier", file)
    assert again.stdout == done.stdout and again.stderr == ""


@pytest.mark.slow
def test_a_mistake_is_an_error_and_no_frontier(lab):
    """A context longer than the text: no micro-batch can be tried."""
    done = lab.start("-m", "engine.frontier", lab.file(context=100_000, width=2, heads=1), "--largest", "2")
    assert done.returncode == 1
    (row,) = read_json(lab.directory / "frontier.json")["results"]
    assert row["status"] == "error" and "the training split has" in row["message"]


def test_a_cpu_without_a_limit_is_refused(lab):
    done = lab.start("-m", "engine.frontier", lab.file())
    assert done.returncode == 2 and "set memory_limit_gib, or give --largest N" in done.stderr
    assert load(lab.directory / "run.toml").memory.memory_limit_gib == 0
