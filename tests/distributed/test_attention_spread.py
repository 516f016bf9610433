"""Attention is looked at alike however a run is spread: shards are gathered where its scores are written out."""

import pytest
from engine_runs import ledger, rows

RUN = {"eval_interval": 3, "attention_sequences": 2, "attention_form": "latent", "latent_width": 8}


@pytest.mark.parametrize("data_parallel", ["ddp", "fsdp"])
def test_two_processes_leave_the_rows_of_one(lab, data_parallel):
    one = rows(lab.launch(**RUN) / "attention.csv")
    run = lab.launch(processes=2, data_parallel=data_parallel, **RUN)
    two = rows(run / "attention.csv")
    assert [row.keys() for row in one] == [row.keys() for row in two] and len(one) == 2
    for mine, theirs in zip(one, two, strict=True):
        for name, value in mine.items():
            assert float(theirs[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-4), name
    assert ledger(run)["attention_sequences"]["agrees"]
