"""What optimizers count, from metrics.json to the summary's tables."""

import json

import polars as pl
import pytest
from fake_results import write_study
from test_fairness import SEEDS, change, summarized

from engine.optimizers.counters import figures
from metrics import frames
from plots import report, tables


@pytest.fixture
def results(tmp_path):
    return write_study(tmp_path)


def test_figures_of_a_run_by_hand():
    names = ("clipped_coordinates", "largest_square_ratio", "optimizer_resets", "update_factor")
    values = [(0, 0.5, 0, 0.1), (30, 9.5, 0, 1), (6, 7.0, 1, 0.1)]
    rows = [dict(zip(names, map(str, one), strict=True)) for one in values]
    assert figures(rows, names, 1200) == {
        "clipped_coordinates": 36,
        "clipped_fraction": 36 / 3600,
        "largest_square_ratio": 9.5,
        "optimizer_resets": 1,
    }
    rows = [{**row, "optimizer_spikes": s} for row, s in zip(rows, ("0.0", "1.0", "1.0"), strict=True)]
    assert figures(rows, (*names, "optimizer_spikes"), 1200)["optimizer_spikes"] == 2
    assert figures([{"step": "0"}], (), 1200) == {}


def counted(results):
    for seed in SEEDS:
        change(results / f"adamw-{seed}" / "metrics.json", optimizer_memory_multiple=3.0)
        change(
            results / f"sgd-{seed}" / "metrics.json",
            optimizer_memory_multiple=2.0,
            clipped_fraction=0.001 * seed,
            largest_square_ratio=100.0 * seed,
            optimizer_resets=4,
        )


def test_a_study_in_which_an_optimizer_counts_has_a_table_of_it(results):
    counted(results)
    study = summarized(results)
    ((caption, (heads, rows)),) = tables.outcome_tables(study)
    assert caption.startswith("Optimizers: weight decay in effect; weights, state and masks over weights")
    assert heads == ["run", "optimizer memory (× weights)", "gradients cut (%)", "largest g² / v", "resets"]
    by_run = {row[0]: row[1:] for row in rows}
    assert by_run["adamw"] == ["3.000", "–", "–", "–"]
    assert by_run["sgd"] == ["2.000", "0.2000", "200.0", "4.000"]  # means of three seeds
    assert "Optimizers" in tables.markdown(study) and "<h2>Optimizers</h2>" in report.html(study)
    assert frames.table_frame(study).filter(pl.col("run") == "sgd")["clipped_fraction"].item() == 0.002


def test_it_shows_the_decay_that_each_group_really_had(results):
    counted(results)
    for seed in SEEDS:
        path = results / f"sgd-{seed}" / "ledger.json"
        ledger = json.loads(path.read_text())
        own = "0.1 of matrices, 0 of vectors" if seed > 1 else "0.1 of matrices, 0.1 of vectors"
        line = {"what": "weight_decay", "requested": own, "in_effect": own, "how": "groups", "agrees": True}
        path.write_text(json.dumps(ledger | {"entries": [*ledger["entries"], line]}))
    ((_, (heads, rows)),) = tables.outcome_tables(summarized(results))
    assert heads[:2] == ["run", "weight decay"]
    shown = {row[0]: row[1] for row in rows}
    assert shown["sgd"] == "0.1 of matrices, 0.1 of vectors; 0.1 of matrices, 0 of vectors"
    assert shown["adamw"] == "–"


def test_a_study_in_which_none_does_has_none(results):
    study = summarized(results)
    assert tables.outcome_tables(study) == [] and "<h2>Optimizers</h2>" not in report.html(study)
