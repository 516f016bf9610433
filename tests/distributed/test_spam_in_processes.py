"""Both SPAMs in several processes: the numbers, the counts and the drawn entries of one.

Over gloo on the CPU. All runs are trained by one start of forked.py.
"""

import pytest
from engine_runs import Lab, assert_same_weights, column, events, ledger, read_json, untimed, weights
from test_same_as_one_process import HYBRID, RUN, SHARDED, SPLIT, assert_same_numbers, forked

pytestmark = pytest.mark.slow

# Cuts, a reset and two draws within eight steps. A width of 36 does not divide evenly; a large ε keeps roundings of
# small gradients small.
COMMON = {"steps": 8, "width": 36, "eval_interval": 8, "epsilon": 1e-4}
SPAM = {
    **COMMON,
    "optimizer": "spam",
    "spam_threshold": 40.0,
    "spam_reset_steps": 5,
    "spam_warmup_steps": 2,
    "spam_grace_steps": 1,
    "spam_density": 0.5,
}
LEGACY = {
    **COMMON,
    "optimizer": "adamwspam_legacy",
    "legacy_threshold": 20.0,
    "legacy_reset_counts": 10,
    "legacy_warmup_counts": 4,
}
WAYS = {
    "ddp": (2, {}),
    "fsdp": (2, SHARDED),
    "hsdp": (4, {**HYBRID, "micro_batch_size": 1}),
    "tensor": (2, {**SPLIT, "micro_batch_size": 4}),
    "fsdp_tensor": (4, {**SHARDED, **SPLIT}),
    "offload": (2, {**SHARDED, "optimizer_offload": True}),
}
KINDS = {"spam": SPAM, "legacy": LEGACY}
CASES = [(kind, way) for kind in KINDS for way in WAYS if (kind, way) != ("legacy", "offload")]
RESUMED = {**SHARDED, "steps": 6, "eval_interval": 3, "checkpoint_interval": 3}


class Trained:
    """What the runs left."""

    def __init__(self, lab: Lab):
        self.lab = lab
        runs = [self._run(kind, 1, settings) for kind, settings in KINDS.items()]
        runs += [self._run(f"{kind}_{way}", WAYS[way][0], KINDS[kind] | WAYS[way][1]) for kind, way in CASES]
        for kind, settings in KINDS.items():
            runs += [self._run(f"{kind}_whole", 2, settings | RESUMED)]
            runs += [
                {**self._run(f"{kind}_again", 2, settings | RESUMED), "name": f"{kind}_cut", "stop_at": 5}
            ]
            runs += [{"name": f"{kind}_again", "processes": 2, "file": f"{kind}_again.toml"}]
        self.done = forked(lab, runs)
        assert self.done.returncode == 0, self.done.stderr
        self.exits = read_json(lab.directory / "exits.json")

    def _run(self, name: str, processes: int, settings: dict) -> dict:
        self.lab.file(run=name, **{**RUN, **settings})
        file = (self.lab.directory / "run.toml").rename(self.lab.directory / f"{name}.toml")
        return {"name": name, "processes": processes, "file": file.name}

    def run(self, name: str):
        """The directory of a run that is complete."""
        assert set(self.exits[name]) == {0}, self.done.stderr
        return self.lab.directory / f"results/by_hand/{name}-1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(Lab(tmp_path_factory.mktemp("lab")))


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_numbers_and_counts_are_those_of_one_process(trained, kind, way):
    one, run = trained.run(kind), trained.run(f"{kind}_{way}")
    assert_same_numbers(one, run, rel=1e-3)
    assert [what for what, line in ledger(run).items() if not line["agrees"]] == []
    for name in ("optimizer_resets", "update_factor"):
        assert column(run, name) == column(one, name)
    cut = column(one, "clipped_coordinates")
    # A gradient that is just at its limit may be cut here and not there.
    assert sum(cut) > 100 and column(run, "clipped_coordinates") == pytest.approx(cut, abs=2, rel=1e-2)
    metrics = [read_json(r / "metrics.json") for r in (one, run)]
    assert metrics[0]["parameters"] == metrics[1]["parameters"]
    assert metrics[1]["clipped_fraction"] == pytest.approx(metrics[0]["clipped_fraction"], rel=1e-2)
    multiple = metrics[1]["optimizer_memory_multiple"]
    assert multiple == pytest.approx(3 if kind == "spam" else 4, abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_sharded_run_ends_bit_for_bit_like_one_that_was_not(trained, kind):
    assert set(trained.exits[f"{kind}_cut"]) == {1}, trained.done.stderr
    whole, again = trained.run(f"{kind}_whole"), trained.run(f"{kind}_again")
    assert events(again) == [{"event": "resumed", "step": 3}]
    assert untimed(again / "steps.csv") == untimed(whole / "steps.csv")
    assert_same_weights(weights(again), weights(whole))
