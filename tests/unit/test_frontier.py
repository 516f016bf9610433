"""The search for the largest micro-batch: its order by hand, its memory of what was tried, and real trials."""

import json
import subprocess

import pytest
from engine_runs import read_json

from engine.config import load, resolve
from engine.errors import ConfigError
from engine.frontier import (
    Result,
    fingerprint,
    load_results,
    result,
    search,
    settings_of_trial,
    table,
)
from engine.plan import estimate


class Device:
    """Stands in for a trial: fits up to `fits`, breaks at `broken`, is killed after `calls` trials."""

    def __init__(self, fits: int, broken: int = 0, calls: int = 1000):
        self.fits, self.broken, self.calls, self.tried, self.kept = fits, broken, calls, [], []

    def __call__(self, micro: int) -> Result:
        if len(self.tried) == self.calls:
            raise KeyboardInterrupt
        self.tried.append(micro)
        if micro == self.broken:
            return Result(micro, "error", message="exit status 1")
        return Result(micro, "success" if micro <= self.fits else "out_of_memory")

    def keep(self, results):
        self.kept = results

    def search(self, largest=10**9, known=()):
        return search(self, list(known), largest, self.keep)


@pytest.mark.parametrize(
    ("fits", "largest", "tried"),
    [
        (11, 10**9, [1, 2, 4, 8, 16, 12, 10, 11]),
        (1, 10**9, [1, 2]),
        (0, 10**9, [1]),
        (7, 7, [1, 2, 4, 7]),
        (100, 1, [1]),
        (66, 66, [1, 2, 4, 8, 16, 32, 64, 66]),
        (65, 66, [1, 2, 4, 8, 16, 32, 64, 66]),  # 66 is nearer than a sixteenth
        (90, 10**9, [1, 2, 4, 8, 16, 32, 64, 128, 96, 80, 88, 92]),
    ],
)
def test_double_then_bisect(fits, largest, tried):
    device = Device(fits)
    results = device.search(largest)
    assert device.tried == tried
    assert [r.micro_batch for r in results] == sorted(tried) and results == device.kept
    assert all((r.status == "success") == (r.micro_batch <= fits) for r in results)


def test_an_error_is_no_limit_and_ends_the_search():
    device = Device(fits=11, broken=8)
    results = device.search()
    assert device.tried == [1, 2, 4, 8]
    assert [r.status for r in results] == ["success"] * 3 + ["error"] and device.kept == results
    again = Device(fits=11)  # what was broken is repaired
    assert [r.status for r in again.search(known=results)].count("error") == 0
    assert again.tried == [8, 16, 12, 10, 11]


def test_a_killed_search_goes_on_where_it_was():
    device = Device(fits=11, calls=5)
    with pytest.raises(KeyboardInterrupt):
        device.search()
    assert [r.micro_batch for r in device.kept] == [1, 2, 4, 8, 16]
    again = Device(fits=11)
    again.search(known=device.kept)
    assert again.tried == [12, 10, 11]
    last = Device(fits=11)
    last.search(known=again.kept)
    assert last.tried == []


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
    assert one.training.steps == 8 == one.schedule.warmup_steps
    assert one.memory.on_out_of_memory == "stop" and one.saving.checkpoint_interval == 0
    assert (one.run, one.data, one.optimizer, one.compile) == (
        config.run,
        config.data,
        config.optimizer,
        config.compile,
    )
    assert one.memory.activation_checkpointing == "full"


def test_two_data_parallel_ranks_have_a_micro_batch_each():
    config = resolve({"processes": 4, "tensor_parallel": 2, "data_parallel": "fsdp"}, "test")
    assert settings_of_trial(config, 3).training.batch_size == 6


def finished(code: int, stderr: str = "") -> subprocess.CompletedProcess:
    return subprocess.CompletedProcess([], code, "", stderr)


def test_how_a_trial_ended(tmp_path):
    metrics = {"peak_memory_gib": 2.5, "step_seconds_median": 0.5, "tokens_per_second": 1000}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert result(4, finished(0), tmp_path) == Result(4, "success", 2.5, 0.5, 1000)
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
        Result(1, "success", 0.25, 0.0105, 1234.4),
        Result(2, "success", 0.5, 0.02, 1200.0),
        Result(4, "out_of_memory", message="out of memory: …"),
    ]
    assert table(results, context=64).splitlines() == [
        "micro-batch  status          peak GiB    step ms    tokens/s",
        "          1  success            0.250       10.5       1,234",
        "          2  success            0.500       20.0       1,200",
        "          4  out_of_memory          –          –           –",
        "",
        "largest that fits: 2 sequences (128 tokens); fastest: 1",
    ]
    assert table(results[2:], 64).endswith("none fits")


@pytest.mark.slow
def test_a_real_search_on_a_cpu_with_a_limit(lab):
    """One sequence of this model fits, two do not; asked again, nothing is tried again."""
    settings = {"layers": 2, "width": 64, "context": 64, "warmup_steps": 6}
    one, two = (estimate(lab.config(**settings, batch_size=micro), 256, "cpu", 1).peak for micro in (1, 2))
    settings["memory_limit_gib"] = (one + two) / 2 / 2**30
    file = lab.file(**settings)
    done = lab.start("-m", "engine.frontier", file)
    assert done.returncode == 0, done.stderr
    fits, fails = read_json(lab.directory / "frontier.json")["results"]
    assert (fits["micro_batch"], fits["status"]) == (1, "success")
    assert fits["peak_memory_gib"] <= settings["memory_limit_gib"] and fits["tokens_per_second"] > 0
    assert (fails["micro_batch"], fails["status"]) == (2, "out_of_memory")
    assert f"memory_limit_gib = {settings['memory_limit_gib']:g}" in fails["message"]
    assert "largest that fits: 1 sequences (64 tokens)" in done.stdout
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
