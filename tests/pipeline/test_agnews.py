"""The study agnews end to end, in two gloo processes, at a size that a CPU finishes; on made-up rows."""

import csv
import json

import pytest
from sandbox import ran

SMALL = (
    "dataset=synthetic",
    "vocab_size=600",
    "validation_rows=200",
    "test_rows=300",
    "context=32",
    "width=32",
    "heads=2",
    "mlp_width=64",
    "dropout=0",  # it draws other numbers in each process
    "embedding_dropout=0",
    "token_dropout=0",
    "precision=fp32",
    "compile=none",
    "steps=40",
    "eval_interval=20",
    "warmup_steps=5",
    "lr=0.005",
    "batch_size=64",
    "scaling_probe_steps=3",
    "cpu_threads=1",  # two processes on two cores
    "seeds=[1,2]",
    "~runs.large_1",
    "~runs.large_2",
    "~runs.large_2_weak",
    "~scaling.large_2",
    "~scaling.large_2_weak",
    "criteria=[{run: small_1, measure: test_accuracy, at_least: 0.4}, "
    "{run: small_2, measure: speedup, at_least: 3}]",  # of two processes it cannot be
)


def table(path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_study_in_two_processes(sandbox):
    output = sandbox.experiment("study=agnews", *SMALL)
    runs = {f"train@{seed}-{run}" for seed in (1, 2) for run in ("small_1", "small_2")}
    assert runs <= ran(output)
    results, reports = sandbox.path / "results/agnews", sandbox.path / "reports/agnews"
    for seed in (1, 2):
        one, two = (json.loads((results / f"small_{n}-{seed}/metrics.json").read_text()) for n in (1, 2))
        assert two["samples"] == one["samples"] == 40 * 64
        assert two["data_order_sha256"] == one["data_order_sha256"]
        first = [float(table(results / f"small_{n}-{seed}/steps.csv")[0]["train_loss"]) for n in (1, 2)]
        assert first[1] == pytest.approx(first[0], rel=1e-5)  # of the same weights on the same samples
        ledger = json.loads((results / f"small_2-{seed}/ledger.json").read_text())["entries"]
        assert [line["what"] for line in ledger if not line["agrees"]] == []
        assert json.loads((results / f"small_2-{seed}/scaling.json").read_text())["ranks"] == 2
    [pair] = table(reports / "scaling.csv")
    assert (pair["run"], pair["reference"], pair["kind"], pair["processes"]) == (
        "small_2",
        "small_1",
        "strong",
        "2",
    )
    parts = ("shared_samples", "data_wait", "communication", "imbalance", "too_little_work")
    assert sum(float(pair[part]) for part in parts) == pytest.approx(float(pair["lost"]), abs=1e-6)
    assert float(pair["shared_samples"]) == 0
    assert [row["met"] for row in table(reports / "criteria.csv")] == ["yes", "no"]
    assert len(table(reports / "epochs.csv")) >= 4
    for said in ("small_2", "criteria not met", "Scaling", "of each step", "samples a second of small_1"):
        assert said in " ".join(output.split()), said
    page = (reports / "report.html").read_text(encoding="utf-8")
    assert "efficiency" in page and "epoch" in page
    shown = sandbox.run("dvc", "metrics", "show")
    assert "test_accuracy" in shown and "perplexity" not in shown
