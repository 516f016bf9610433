"""Ranks that read the same samples: refused, whatever the settings say, or reported and counted once.

Over gloo on the CPU. All runs are trained by one start of forked.py.
"""

import math
from pathlib import Path

import pytest
from engine_runs import Lab, column, ledger, read_json, rows
from test_same_as_one_process import Trained, forked

pytestmark = pytest.mark.slow

RUN = {
    "steps": 5,
    "batch_size": 8,
    "micro_batch_size": 2,
    "eval_interval": 5,
    "clip_norm": 0.5,
    "epsilon": 1e-4,
}
REPORT = {"on_shared_samples": "report"}
SHARED = {**REPORT, "shard_samples": False}
UNBUILT = {"reads": "all"}  # the published bug: no sampler, so that every rank reads everything
RUNS = {  # name: (processes, settings, how forked.py breaks it)
    "one": (1, {}, {}),
    "apart": (2, {}, {}),
    "unbuilt": (2, {"micro_batch_size": 0}, {"sampler": UNBUILT}),
    "unbuilt_report": (2, REPORT, {"sampler": UNBUILT}),
    "first": (2, REPORT, {"sampler": {"reads": "first"}}),
    "later": (2, {}, {"sampler": {"reads": "first", "steps": [3]}}),
    "shared": (2, SHARED, {}),
    "shared_fsdp": (2, {**SHARED, "data_parallel": "fsdp", "micro_batch_size": 0}, {}),
    "stopped": (2, {**SHARED, "checkpoint_interval": 2}, {"stop_at": 3}),
}


class Shared(Trained):
    """What the runs left."""

    def __init__(self, lab: Lab):
        self.lab = lab
        runs = [self.plan(name, n, settings, how) for name, (n, settings, how) in RUNS.items()]
        again = {**runs[-1], "name": "stopped_again", "stop_at": None}
        self.done = forked(lab, [*runs, again])
        assert self.done.returncode == 0, self.done.stderr
        self.exits = read_json(lab.directory / "exits.json")

    def plan(self, name: str, processes: int, settings: dict, how: dict) -> dict:
        self.lab.file(run=name, **{**RUN, **settings})
        file = (self.lab.directory / "run.toml").rename(self.lab.directory / f"{name}.toml")
        return {"name": name, "processes": processes, "file": file.name, **how}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Shared:
    return Shared(Lab(tmp_path_factory.mktemp("lab")))


def disagreeing(run: Path) -> dict[str, str]:
    return {what: line["in_effect"] for what, line in ledger(run).items() if not line["agrees"]}


def test_a_sampler_that_was_never_built_ends_the_run_on_all_ranks_before_it_computes(trained):
    assert trained.exits["unbuilt"] == [2, 2]
    run = trained.lab.directory / "results/by_hand/unbuilt-1"
    assert not (run / "metrics.json").exists() and rows(run / "steps.csv") == []
    message = "step 0: ranks 0, 1 drew the same 8 samples (ids "
    assert trained.done.stderr.count(message) == 2
    assert "…): 16 were drawn, 8 of them distinct. Each rank must read its own part" in trained.done.stderr
    assert "on_shared_samples = 'report' trains all the same" in trained.done.stderr


@pytest.mark.parametrize(
    ("name", "drawn", "distinct"),
    [
        ("one", 8, 8),
        ("apart", 8, 8),
        ("unbuilt_report", 16, 8),
        ("first", 8, 4),
        ("shared", 16, 8),
        ("shared_fsdp", 16, 8),
    ],
)
def test_figures_count_distinct_samples_only(trained, name, drawn, distinct):
    run = trained.run(name)
    metrics, steps = read_json(run / "metrics.json"), rows(run / "steps.csv")
    assert metrics["samples"] == drawn * 5 and metrics["samples_distinct_per_step"] == distinct
    assert metrics["samples_per_second"] == distinct / metrics["step_seconds_median"]
    assert metrics["tokens"] == distinct * 16 * 5
    assert metrics["tokens_per_second"] == pytest.approx(distinct * 16 / metrics["step_seconds_median"])
    assert [int(row["tokens_seen"]) for row in steps] == [distinct * 16 * n for n in range(1, 6)]
    for row in steps:
        counted = float(row["tokens_per_second"]) * float(row["step_seconds"])
        assert counted == pytest.approx(distinct * 16)


def test_the_ledger_says_what_was_shared(trained):
    assert disagreeing(trained.run("apart")) == disagreeing(trained.run("one")) == {}
    line = ledger(trained.run("apart"))["samples_of_the_run"]
    assert (line["requested"], line["in_effect"]) == ("the 40 planned, once", "as planned")
    for name in ("unbuilt_report", "shared", "shared_fsdp"):
        assert disagreeing(trained.run(name)) == {
            "batch_size": "16",
            "samples": "8 distinct of 16 drawn",
            "samples_of_the_run": "80, not as planned",
        }
    how = ledger(trained.run("shared"))["batch_size"]["how"]
    assert "micro-batch 2 × accumulation 4 × replicas 2, 256 tokens a step" in how


def test_one_step_in_which_ranks_read_the_same_is_found_at_the_end(trained):
    assert disagreeing(trained.run("later")) == {"samples_of_the_run": "40, not as planned"}


@pytest.mark.parametrize("name", ["apart", "shared", "shared_fsdp", "unbuilt_report"])
def test_gradients_are_normalised_right_with_samples_that_are_shared(trained, name):
    """A step in which every sample is counted twice is the same step."""
    for what in ("train_loss", "grad_norm"):
        expected, found = column(trained.run("one"), what), column(trained.run(name), what)
        assert found == pytest.approx(expected, rel=1e-5) and all(map(math.isfinite, found))


def test_a_resumed_run_counts_what_it_drew_before(trained):
    assert set(trained.exits["stopped"]) == {1} and trained.exits["stopped_again"] == [0, 0]
    metrics = read_json(trained.lab.directory / "results/by_hand/stopped-1/metrics.json")
    shared = read_json(trained.run("shared") / "metrics.json")
    for key in ("samples", "data_order_sha256", "tokens"):
        assert metrics[key] == shared[key]
