"""Pruning in several processes: as many zeros as in one, the same masks on all ranks, resumed bit for bit.

Over gloo on the CPU. All runs are trained by one start of forked.py.
"""

import pytest
from engine_runs import Lab, assert_same_weights, column, events, ledger, read_json, rows, untimed, weights
from test_same_as_one_process import HYBRID, RUN, SHARDED, forked

pytestmark = pytest.mark.slow

# A width that does not divide evenly, and a vocabulary with rows of padding, all in the second shard.
PRUNED = {
    "steps": 12,
    "width": 36,
    "pad_vocabulary_to": 96,
    "eval_interval": 6,
    "pruning_interval": 2,
    "pruning_start": 2,
    "pruning_hold": 2,
}
STATE = {"pruning": "state", "pruning_score": "bitter3", "optimizer": "adamwprune"}
MOVEMENT = {"pruning": "movement", "pruning_threshold": "layer"}
TWO_OF_FOUR = {"pruning": "magnitude", "pruning_pattern": "2:4"}
WAYS = {  # name: (processes, settings, the run of one process that it is like)
    "ddp": (2, STATE, "one"),
    "fsdp": (2, {**SHARDED, **STATE}, "one"),
    "fsdp_model": (2, {**SHARDED, **STATE, "shard_unit": "model"}, "one"),
    "hsdp": (4, {**HYBRID, **STATE, "micro_batch_size": 1}, "one"),
    "movement_ddp": (2, MOVEMENT, "one_movement"),
    "movement_fsdp": (2, {**SHARDED, **MOVEMENT}, "one_movement"),
    "pattern_fsdp": (2, {**SHARDED, **TWO_OF_FOUR, "average_decay": 0.5}, "one_pattern"),
}
SAMPLED = {**SHARDED, **STATE, "pruning_sample": 0.3}
RESUMED = {**SHARDED, **MOVEMENT, "eval_interval": 2, "checkpoint_interval": 3}


class Trained:
    """What the runs left."""

    def __init__(self, lab: Lab):
        self.lab = lab
        runs = [self._run("one", 1, STATE), self._run("one_movement", 1, MOVEMENT)]
        runs += [self._run("one_pattern", 1, {**TWO_OF_FOUR, "average_decay": 0.5})]
        runs += [self._run(name, n, settings) for name, (n, settings, _) in WAYS.items()]
        runs += [self._run("sampled", 2, SAMPLED), self._run("whole", 2, RESUMED)]
        runs += [{**self._run("again", 2, RESUMED), "name": "cut", "stop_at": 8}]
        runs += [{"name": "again", "processes": 2, "file": "again.toml"}]
        self.done = forked(lab, runs)
        assert self.done.returncode == 0, self.done.stderr
        self.exits = read_json(lab.directory / "exits.json")

    def _run(self, name: str, processes: int, settings: dict) -> dict:
        self.lab.file(run=name, **{**RUN, **PRUNED, **settings})
        file = (self.lab.directory / "run.toml").rename(self.lab.directory / f"{name}.toml")
        return {"name": name, "processes": processes, "file": file.name}

    def run(self, name: str):
        """The directory of a run that is complete."""
        assert set(self.exits[name]) == {0}, self.done.stderr
        return self.lab.directory / f"results/by_hand/{name}-1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(Lab(tmp_path_factory.mktemp("lab")))


def assert_agrees(run) -> None:
    assert [what for what, line in ledger(run).items() if not line["agrees"]] == []


@pytest.mark.parametrize("way", WAYS)
def test_as_many_weights_are_zero_as_in_one_process_and_nearly_the_same(trained, way):
    one, run = trained.run(WAYS[way][2]), trained.run(way)
    assert_agrees(run)
    assert "alike on all ranks" in ledger(run)["pruning"]["how"]
    assert rows(run / "sparsity.csv") == rows(one / "sparsity.csv")
    metrics, kept, expected = read_json(run / "metrics.json"), weights(run), weights(one)
    assert metrics["sparsity"] == metrics["sparsity_target"]
    for layer in metrics["sparsity_layers"]:
        mine, theirs = kept[layer["name"]] == 0, expected[layer["name"]] == 0
        # Rounding decides only between scores that are nearly equal.
        assert (mine != theirs).float().mean() < 0.01, layer["name"]
    losses = column(run, "train_loss"), column(one, "train_loss")
    # In a pattern every four weights decide.
    assert losses[0] == pytest.approx(losses[1], rel=3e-3 if way == "pattern_fsdp" else 1e-3)
    if way == "pattern_fsdp":
        assert all(((kept[x["name"]].view(-1, 4) == 0).sum(1) >= 2).all() for x in metrics["sparsity_layers"])


def test_padding_is_neither_counted_nor_pruned(trained):
    for name in ("one", "fsdp", "hsdp"):
        layer = read_json(trained.run(name) / "metrics.json")["sparsity_layers"][-1]
        assert (layer["name"], layer["weights"]) == ("token_embedding.weight", 256 * 36), name


def test_a_sampled_threshold_over_shards_misses_by_little(trained):
    run = trained.run("sampled")
    assert_agrees(run)
    metrics = read_json(run / "metrics.json")
    assert 0 < metrics["pruning"]["threshold_error"] < 0.02


def test_an_interrupted_sharded_run_ends_bit_for_bit_like_one_that_was_not(trained):
    assert set(trained.exits["cut"]) == {1}, trained.done.stderr
    whole, again = trained.run("whole"), trained.run("again")
    assert events(again) == [{"event": "resumed", "step": 6}]
    assert untimed(again / "steps.csv") == untimed(whole / "steps.csv")
    assert rows(again / "sparsity.csv") == rows(whole / "sparsity.csv")
    assert_same_weights(weights(again), weights(whole))
