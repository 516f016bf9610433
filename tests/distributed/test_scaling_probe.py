"""Each cause of bad scaling, made on purpose, is what scaling.json shows most of.

Two gloo processes against one. All runs are trained by one start of forked.py; slowed.py has the causes.
"""

import json
from pathlib import Path

import pytest
from engine_runs import Lab, assert_same_weights, events, ledger, read_json, untimed, weights
from test_same_as_one_process import Trained, forked

from metrics.scaling import lost

pytestmark = pytest.mark.slow

RUN = {"steps": 5, "batch_size": 8, "scaling_probe_steps": 3, "prefetch": 1, "eval_interval": 5}
SEQUENCE = 0.006  # seconds a sequence takes: 48 ms a step in one process, 24 in two
SLOW = 0.04
SHARED = {"shard_samples": False, "on_shared_samples": "report"}
RUNS = {  # name: (processes, settings, seconds of delay: see slowed.py, None: as fast as it is)
    "one": (1, {}, {}),
    "even": (2, {}, {}),
    "loader": (2, {"steps": 8, "eval_interval": 8}, {"loader": 2 * SLOW}),
    "exchange": (2, {}, {"exchange": SLOW}),
    "slow_rank": (2, {}, {"rank_1": SLOW}),
    "shared": (2, SHARED, {}),
    "one_fixed": (1, {}, {"step": 2 * SLOW}),
    "fixed": (2, {}, {"step": 2 * SLOW}),
    "fsdp": (2, {"data_parallel": "fsdp"}, None),
    "fused": (2, {"precision": "bf16", "loss_kernel": "fused", "gradient_sums": "fused"}, None),
    "plain": (2, {"micro_batch_size": 2, "dropout": 0.1}, None),
    "unprobed": (2, {"micro_batch_size": 2, "dropout": 0.1, "scaling_probe_steps": 0}, None),
}
CAUSES = {  # run: (its reference, the largest part, its least share of a step's time)
    "loader": ("one", "data wait", 0.4),
    "exchange": ("one", "communication", 0.5),
    "slow_rank": ("one", "imbalance", 0.5),
    "shared": ("one", "shared samples", 0.35),
    "fixed": ("one_fixed", "too little work", 0.25),
}


class Probed(Trained):
    """What the runs left."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self.done = forked(lab, [self.plan(name, *how) for name, how in RUNS.items()])
        assert self.done.returncode == 0, self.done.stderr
        self.exits = read_json(lab.directory / "exits.json")

    def plan(self, name: str, processes: int, settings: dict, slow: dict | None) -> dict:
        self.lab.file(run=name, **{**RUN, **settings})
        file = (self.lab.directory / "run.toml").rename(self.lab.directory / f"{name}.toml")
        how = {} if slow is None else {"slow": {"sequence": SEQUENCE, **slow}}
        return {"name": name, "processes": processes, "file": file.name, **how}

    def scaling(self, name: str) -> dict:
        return read_json(self.run(name) / "scaling.json")


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> Probed:
    return Probed(Lab(tmp_path_factory.mktemp("lab")))


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_that_was_made_is_the_largest_part(probed, name):
    reference, cause, share = CAUSES[name]
    run = probed.scaling(name)
    found = lost(run, probed.scaling(reference)).parts
    shown = {part: f"{1000 * seconds:.1f} ms" for part, seconds in found.items()}
    print(name, f"step {1000 * max(run['loaded_seconds']):.1f} ms", json.dumps(shown))
    assert max(found, key=found.get) == cause, shown
    assert found[cause] > share * max(run["loaded_seconds"]), shown


def test_an_even_run_loses_little(probed):
    run = probed.scaling("even")
    found = lost(run, probed.scaling("one")).parts
    print("even", f"step {1000 * max(run['loaded_seconds']):.1f} ms", found)
    assert max(found.values()) < SLOW
    assert max(run["loaded_seconds"]) > 4 * SEQUENCE


def test_what_is_timed_and_of_whom(probed):
    for name, (processes, _, slow) in RUNS.items():
        if slow is None:
            continue
        run = probed.scaling(name)
        assert (run["ranks"], run["batch_size"], run["steps"], run["turns"]) == (processes, 8, 3, 3)
        assert (run["samples_distinct"], run["samples_drawn"]) == (8, 16 if name == "shared" else 8)
        assert run["exchange"] == ("none" if processes == 1 else "ddp")
        for kind in ("loaded", "ready", "alone", "training_data_wait"):
            assert len(run[f"{kind}_seconds"]) == processes and min(run[f"{kind}_seconds"]) >= 0
        line = ledger(probed.run(name))["scaling_probe_steps"]
        assert line["in_effect"] == line["requested"] == "9 loaded, 9 ready, 9 alone" and line["agrees"]
    slow = probed.scaling("slow_rank")["alone_seconds"]
    assert slow[1] - slow[0] == pytest.approx(SLOW, rel=0.5)  # at its own speed
    assert min(probed.scaling("loader")["training_data_wait_seconds"]) > SLOW / 4


def test_sharded_weights_cannot_be_without_the_other_ranks_and_it_is_said(probed):
    run = probed.scaling("fsdp")
    assert run["alone_seconds"] is None and len(run["ready_seconds"]) == 2
    assert run["exchange"] == "sharded weights are gathered from the other ranks in every step"
    line = ledger(probed.run("fsdp"))["scaling_probe_steps"]
    assert line["in_effect"] == "9 loaded, 9 ready, 0 alone" and not line["agrees"]
    assert run["exchange"] in line["how"]


def test_gradients_that_are_summed_in_place_can_be_left_alone_too(probed):
    run = probed.scaling("fused")
    assert run["exchange"] == "ddp" and len(run["alone_seconds"]) == 2


def test_the_probe_changes_nothing_that_the_run_leaves(probed):
    probed_run, plain = probed.run("plain"), probed.run("unprobed")
    assert_same_weights(weights(probed_run), weights(plain))
    for name in ("steps.csv", "evals.csv"):
        assert untimed(probed_run / name) == untimed(plain / name)
    assert events(probed_run) == events(plain) == []
    lines, expected = ledger(probed_run), ledger(plain)
    assert lines.keys() - expected.keys() == {"scaling_probe_steps"} and not (plain / "scaling.json").exists()
    assert {what: line["in_effect"] for what, line in expected.items()} == {
        what: lines[what]["in_effect"] for what in expected
    }
    metrics, other = (read_json(run / "metrics.json") for run in (probed_run, plain))
    same = ("train_loss", "val_loss", "samples", "data_order_sha256", "skipped_steps", "steps")
    assert {key: metrics.get(key) for key in same} == {key: other.get(key) for key in same}


def test_only_the_first_process_writes(probed):
    assert probed.writes("even", 1) == []
    assert any(Path(entry.split()[-1]).name.startswith("scaling.json") for entry in probed.writes("even", 0))
