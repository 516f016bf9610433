"""Sparsity from a run's files to the report: curve, table of tensors, columns; by hand."""

import json
import re
import statistics

import polars as pl
import pytest
from fake_results import write_study

from metrics import findings, pruning, rows, summary
from metrics.rows import ResultsError
from plots import figures, outcome_tables, report, tables
from stages import summarize

LAYERS = [("layers.0.mlp.up.weight", 400, None), ("token_embedding.weight", 600, None)]


def pruned(results, run: str = "sgd"):
    """Of 1,000 weights 500 in every seed: of the first tensor 100, 120 and 140, of the second the rest."""
    for seed in (1, 2, 3):
        home = results / f"{run}-{seed}"
        config = (home / "config.toml").read_text()
        (home / "config.toml").write_text(config + '\n[pruning]\npruning = "magnitude"\n')
        lines = ["step,tokens_seen,target,sparsity,zeros"]
        lines += [f"{s},{s * 4096},{s / 600},{s / 600},{s * 10 // 6}" for s in (100, 200, 300)]
        (home / "sparsity.csv").write_text("\n".join(lines) + "\n")
        metrics = json.loads((home / "metrics.json").read_text())
        zeros = (80 + 20 * seed, 420 - 20 * seed)
        metrics |= {
            "sparsity": 0.5,
            "sparsity_target": 0.5,
            "best_val_loss_at_target": 3.25 + seed,
            "pruning": {"score": "magnitude", "version": 1, "formula": "|w|"},
            "sparsity_layers": [
                {"name": name, "weights": size, "zeros": n, "target": target}
                for (name, size, target), n in zip(LAYERS, zeros, strict=True)
            ],
        }
        (home / "metrics.json").write_text(json.dumps(metrics))
    return results


@pytest.fixture
def results(tmp_path):
    return pruned(write_study(tmp_path))


def test_tensors_that_a_threshold_for_all_left_nothing_of_are_told(results):
    def said():
        made = findings.findings(summary.summarize(rows.read(results)))
        return [one.text for one in made if "next to nothing" in one.text]

    assert said() == []
    path = results / "sgd-2" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["sparsity_layers"] = [
        {"name": f"layers.{layer}.mlp.{name}.weight", "weights": 200, "zeros": zeros, "target": None}
        for layer, name, zeros in (
            (0, "up", 0),
            (0, "out", 200),
            (1, "up", 197),
            (1, "out", 198),
            (1, "x", 0),
        )
    ]
    path.write_text(json.dumps(metrics))
    assert said() == [
        "sgd left next to nothing of 2 tensors, at least 99 % of each being 0: layers.*.mlp.out.weight (2)."
    ]


def test_the_table_of_tensors_by_hand(results):
    frame = pruning.layers(rows.read(results))
    assert frame.columns == list(pruning.COLUMNS)
    first, second, together = frame.to_dicts()
    assert (first["run"], first["tensor"], first["weights"], first["target"]) == ("sgd", *LAYERS[0])
    assert [first[c] for c in ("sparsity", "sparsity_low", "sparsity_high")] == pytest.approx(
        [0.3, 0.25, 0.35]
    )
    assert second["sparsity"] == pytest.approx(380 / 600)
    assert (together["tensor"], together["weights"]) == ("all", 1000)
    assert together["sparsity"] == together["target"] == 0.5
    table = outcome_tables.sparsity_tables(summary.summarize(rows.read(results)))["sgd"]
    assert table[1][0] == ["layers.0.mlp.up.weight", "400", "30.00", "25.00", "35.00", "–"]
    assert table[1][2] == ["all", "1,000", "50.00", "50.00", "50.00", "50.00"]


def test_the_report_has_curve_table_and_columns(results):
    study = summary.summarize(rows.read(results))
    drawn = figures.every(study)["sparsity"]
    [data] = [d for d in drawn.chart.to_dict()["datasets"].values() if d and "sparsity" in d[0]]
    assert [(d["run"], d["step"], round(d["sparsity"], 6)) for d in data] == [
        ("sgd", 100, 0.166667),
        ("sgd", 200, 0.333333),
        ("sgd", 300, 0.5),
    ]
    page = report.html(study)
    section = re.search(r"<h2>Sparsity of tensors</h2>(.*?)<h2", page, re.DOTALL)[1]
    assert "sgd: weights that are zero at the end, by magnitude, version 1: |w|" in section
    heads, cells = tables.quality_table(study, full=True)
    row = dict(zip(heads, cells[2], strict=True))
    assert row["sparsity of the prunable weights (%)"].startswith("50")
    assert row["best validation loss at the target sparsity"].startswith(
        "5.2"
    )  # the mean of 4.25, 5.25 and 6.25


def test_a_study_that_prunes_nothing_has_none_of_it(tmp_path):
    study = summary.summarize(rows.read(write_study(tmp_path)))
    assert study.results.sparsity.is_empty() and pruning.layers(study.results).is_empty()
    assert "sparsity" not in report.html(study).lower()


def test_the_stage_writes_the_table_and_removes_an_old_one(results, tmp_path):
    out = tmp_path / "reports"
    assert summarize.main([str(results), str(out)]) == 0
    frame = pl.read_csv(out / "sparsity.csv")
    assert frame.height == 3 and frame["run"].unique().to_list() == ["sgd"]
    other = write_study(tmp_path / "other")
    assert summarize.main([str(other), str(out)]) == 0
    assert not (out / "sparsity.csv").exists()


def test_a_run_that_pruned_must_say_how_sparse_it_was(results):
    (results / "sgd-2" / "sparsity.csv").unlink()
    with pytest.raises(ResultsError, match="sgd-2/sparsity.csv is missing although the run is complete"):
        rows.read(results)


def test_a_run_that_never_was_at_its_target_has_no_best_there(results):
    for seed in (1, 2, 3):
        path = results / f"sgd-{seed}" / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"best_val_loss_at_target": None}))
    study = summary.summarize(rows.read(results))
    assert study.of("sgd").estimates["best_val_loss_at_target"] is None
    assert "best validation loss at the target sparsity" not in tables.quality_table(study, full=True)[0]


def test_the_best_of_equally_sparse_runs_by_hand(results):
    """adamw-checkpointing has adamw's test loss, sgd another; only what prunes, to one share, is compared."""
    study = summary.summarize(rows.read(pruned(results, "adamw-checkpointing")))
    ((said, runs),) = pruning.best_at_each_sparsity(study)
    losses = {run: [one.test["test_loss"] for one in study.results.of(run)] for run in runs}
    assert runs == ("adamw-checkpointing", "sgd") and statistics.mean(losses[runs[0]]) < min(losses["sgd"])
    apart = statistics.mean(a - b for a, b in zip(*losses.values(), strict=True))
    assert said.startswith(
        "Of 2 runs with 50.0 % of their prunable weights 0, adamw-checkpointing has the lowest test loss: "
    )
    assert f", {apart:.3f}" in said and said.endswith(" against the next, sgd; 3 paired seeds.")
    # One that is sparser, or never was at its target, is compared with nobody.
    for seed, change in ((1, {"sparsity_target": 0.6}), (2, {"best_val_loss_at_target": None})):
        path = results / f"sgd-{seed}" / "metrics.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | change))
        assert not list(pruning.best_at_each_sparsity(summary.summarize(rows.read(results))))
        path.write_text(before)
