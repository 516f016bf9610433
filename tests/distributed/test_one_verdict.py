"""What one rank alone has spoilt is stopped before the update of every rank, and ends the run on all of them.

And a run whose ranks all read the same samples is told by its ledger, and by the table. Over gloo on the CPU.
"""

from pathlib import Path

import pytest
from engine_runs import Lab, column, ledger, read_json
from test_same_as_one_process import forked

from engine.rundir import write_json
from metrics import rows, summary

pytestmark = pytest.mark.slow

RUN = {"steps": 12, "batch_size": 8, "micro_batch_size": 2, "log_interval": 4, "eval_interval": 12}
SGD = {"optimizer": "sgd", "lr": 0.1}
WAYS = {  # name: (settings, which rank, where)
    "ddp_gradient": ({}, 1, "gradient"),
    "ddp_loss": ({}, 1, "loss"),
    "ddp_after": ({}, 1, "after"),
    "fsdp_gradient": ({"data_parallel": "fsdp"}, 0, "gradient"),
    "fsdp_after": ({"data_parallel": "fsdp"}, 1, "after"),
    "fsdp_sgd": ({"data_parallel": "fsdp", **SGD}, 1, "gradient"),
    "tensor": ({"tensor_parallel": 2}, 1, "after"),
}
POISONED = 6  # the step; found out with the progress after step 7
SAME = {"on_shared_samples": "report", "steps": 4}


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Lab:
    """A lab in which all runs have been tried; exits.json says how they ended."""
    lab = Lab(tmp_path_factory.mktemp("lab"))

    def run(name: str, settings: dict, **how) -> dict:
        lab.file(run=name, **{**RUN, **settings})
        file = (lab.directory / "run.toml").rename(lab.directory / f"{name}.toml")
        return {"name": name, "processes": 2, "file": file.name, **how}

    runs = [
        run(name, settings, poison={"rank": rank, "step": POISONED, "where": where})
        for name, (settings, rank, where) in WAYS.items()
    ]
    runs += [run("apart", SAME), run("same", SAME, sampler={"reads": "first"})]
    done = forked(lab, runs)
    assert done.returncode == 0, done.stderr
    return lab


def directory(lab: Lab, name: str) -> Path:
    return lab.directory / f"results/by_hand/{name}-1"


@pytest.mark.parametrize("name", WAYS)
def test_no_rank_applies_what_one_has_spoilt_and_all_end_with_one_outcome(ended, name):
    assert read_json(ended.directory / "exits.json")[name] == [4, 4]
    for rank in (0, 1):
        kept = read_json(ended.directory / f"kept-{name}-{rank}.json")
        assert kept.pop("tensors") > 20
        assert kept == {"step": POISONED, "same": True, "finite": True}
    metrics = read_json(directory(ended, name) / "metrics.json")
    assert (metrics["status"], metrics["step"]) == ("diverged", POISONED)
    assert column(directory(ended, name), "step")[-1] == POISONED
    assert not (directory(ended, name) / "model.safetensors").exists()


def test_ranks_that_all_read_the_same_samples_are_told_by_ledger_and_table(ended):
    """Negative scaling was a bug of data sharding: a step of 4 samples, each seen twice, passed for one of 8."""
    lines = [ledger(directory(ended, name))["samples"] for name in ("apart", "same")]
    assert [(line["in_effect"], line["agrees"]) for line in lines] == [
        ("8 distinct", True),
        ("4 distinct of 8 drawn", False),
    ]
    results = directory(ended, "same").parent
    study = {
        "study": "by_hand",
        "question": "?",
        "baseline": "apart",
        "metric": "val_loss",
        "better": "lower",
    }
    study |= {"seeds": [1], "dataset": "text", "runs": {"apart": {}, "same": {}}, "base": {}}
    (results / "configs").mkdir()
    write_json(results / "configs" / "study.json", study)
    apart, same = summary.summarize(rows.read(results)).runs
    assert apart.ledger == ()
    assert same.ledger == (
        "samples: requested 8 distinct, in effect 4 distinct of 8 drawn",
        "samples_of_the_run: requested the 32 planned, once, in effect 32, not as planned",
    )
