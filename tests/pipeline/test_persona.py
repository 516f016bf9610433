"""The study persona end to end, at a size that a CPU finishes; on made-up dialogues."""

import csv
import json

import pytest
from engine_runs import write_dialogues
from sandbox import ran

SMALL = (
    "dataset=dialogues",
    "data_dir=.dialogues",
    "tokenizer=bytes",
    "candidates=4",
    "hits_candidates=12",
    "max_train_rows=0",
    "length_percentile=100",
    "context=176",
    "layers=1",
    "heads=2",
    "width=32",
    "dropout=0",
    "pad_vocabulary_to=1",
    "precision=fp32",
    "tf32=false",
    "compile=none",
    "batch_size=12",
    "micro_batch_size=6",
    "lr=0.003",
    "lr_batch_size=12",
    "steps=20",
    "warmup_steps=10",
    "eval_interval=10",
    "eval_train_rows=24",
    "budget=240",
    "seeds=[1]",
    "~runs.ac_same_lr",
    "runs.ac_scaled_lr={activation_checkpointing: full, batch_size: 24, micro_batch_size: 12, steps: 10, "
    "warmup_steps: 5, eval_interval: 5}",
    "+runs.ac_scaled_lr.shared_context=false",
    "criteria=[{run: baseline, measure: test_accuracy, at_least: 0.2}, "
    "{run: baseline, measure: test_reply_perplexity, at_most: 2}]",  # which cannot be
    "falsified_by.when=[{run: ac_scaled_lr, measure: test_accuracy, at_most: 0.1}]",
)


def table(path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_study_of_two_heads(sandbox):
    write_dialogues(sandbox.path / ".dialogues", train=40, valid=7, test=20)
    output = sandbox.experiment("study=persona", *SMALL)
    names = ("baseline", "ac_scaled_lr")
    assert {f"train@1-{run}" for run in names} <= ran(output)
    results, reports = sandbox.path / "results/persona", sandbox.path / "reports/persona"
    for run in names:
        metrics = json.loads((results / f"{run}-1/metrics.json").read_text())
        assert metrics["samples"] == 240 and metrics["choices"] == 4
        test = json.loads((results / f"test/{run}-1.json").read_text())
        assert (test["examples"], test["candidates"], test["chance_accuracy"]) == (60, 4, 0.25)
        assert test["hits_candidates"] == 12 and (60 * test["hits_at_1"]) % 1 == pytest.approx(0, abs=1e-9)
        assert 0 < test["tfidf_hits_at_1"] < test["tfidf_accuracy"] < 1  # by hand: test_ranking_stage.py
        ledger = json.loads((results / f"{run}-1/ledger.json").read_text())["entries"]
        assert [line["what"] for line in ledger if not line["agrees"]] == []
    peak = next(line for line in ledger if line["what"] == "lr")
    assert (peak["requested"], peak["in_effect"]) == ("0.006 = 0.003 × (24 / 12)", "0.006")
    assert [row["met"] for row in table(reports / "criteria.csv")] == ["yes", "no"]
    assert [row["chooser"] for row in table(reports / "choices.csv")] == ["chance", "TF-IDF ranker", *names]
    batches = {row["run"]: row for row in table(reports / "batches.csv")}
    assert [batches[run]["peak_lr"] for run in names] == ["0.003", "0.006"]
    course = [row for row in table(reports / "epochs.csv") if row["run"] == "baseline" and row["seed"] == "1"]
    assert [float(row["epoch"]) for row in course] == [1.0, 2.0]
    assert all(0 <= float(row["eval_train_accuracy"]) <= 1 for row in course)
    assert "test_accuracy" in sandbox.run("dvc", "metrics", "show")
