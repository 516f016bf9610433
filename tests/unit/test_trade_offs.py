"""Which runs no other run beats in quality, speed and memory."""

import dataclasses
import json
import math

import pytest
from fake_classifier import classifier_study
from fake_results import write_json, write_study

from metrics import rows, summary
from metrics.statistics import Estimate
from metrics.trade_offs import trade_offs


@pytest.fixture
def results(tmp_path):
    runs = dict.fromkeys(("adamw", "slower", "heavier", "worse", "better"), {})
    return write_study(tmp_path, runs=runs)


def _with(results, **means):
    """The study with these (quality, tokens/s, GiB) for its runs; None was not measured."""
    study = summary.summarize(rows.read(results))
    names = ("test_loss", "tokens_per_second", "peak_memory_gib")
    runs = []
    for run in study.runs:
        given = zip(names, means[run.run], strict=True)
        new = {name: None if mean is None else Estimate(mean, 0.1, 3) for name, mean in given}
        runs.append(dataclasses.replace(run, estimates=run.estimates | new))
    return dataclasses.replace(study, runs=tuple(runs))


MEANS = {
    "adamw": (2.0, 100, 8),
    "slower": (2.0, 90, 8),
    "heavier": (2.0, 100, 9),
    "worse": (2.5, 100, 8),
    "better": (1.5, 50, 20),
}


def test_a_run_is_beaten_by_one_that_is_as_good_in_all_and_better_in_one(results):
    frame = trade_offs(_with(results, **MEANS))
    assert frame["frontier"].to_list() == ["yes", "no", "no", "no", "yes"]
    first = frame.row(0, named=True)
    assert first["label"] == "adamw, 8.00 GiB" and first["metric"] == "test loss (nats/token)"
    assert (first["low"], first["value"], first["high"]) == pytest.approx((1.9, 2.0, 2.1))


def test_equal_runs_do_not_beat_each_other(results):
    frame = trade_offs(_with(results, **dict.fromkeys(MEANS, (2.0, 100, 8))))
    assert set(frame["frontier"]) == {"yes"}


def test_memory_counts_only_where_every_run_has_it(results):
    frame = trade_offs(_with(results, **MEANS | {"better": (1.5, 50, None)}))
    assert frame["memory"].null_count() == 5
    assert frame["label"].to_list() == list(MEANS)
    assert frame["frontier"].to_list() == ["yes", "no", "yes", "no", "yes"]  # heavier equals adamw now


def test_runs_without_speed_or_comparison_have_no_row_and_beat_nobody(results):
    study = _with(results, **MEANS | {"slower": (2.0, None, 8)})
    runs = [
        dataclasses.replace(run, not_comparable=("why",)) if run.run == "adamw" else run for run in study.runs
    ]
    frame = trade_offs(dataclasses.replace(study, runs=tuple(runs)))
    assert dict(frame.select("run", "frontier").iter_rows()) == {
        "heavier": "yes",
        "worse": "yes",
        "better": "yes",
    }


def test_a_share_is_in_percent(tmp_path):
    first = trade_offs(summary.summarize(rows.read(classifier_study(tmp_path)))).row(0, named=True)
    half = 4.302653 * 0.1 / math.sqrt(3)  # points
    assert (first["metric"], first["speed"]) == ("test accuracy (%)", pytest.approx(25_600))
    assert (first["low"], first["value"], first["high"]) == pytest.approx((91.2 - half, 91.2, 91.2 + half))


def test_a_diverged_run_has_no_row(results):
    for seed in (1, 2, 3):
        write_json(
            results / f"better-{seed}" / "metrics.json", {"status": "diverged", "step": 7, "reason": "r"}
        )
    frame = trade_offs(summary.summarize(rows.read(results)))
    assert "better" not in frame["run"]


def test_means_are_over_the_seeds_that_all_runs_have(results):
    """A lost seed of one run takes that seed from the others too: here the one with the best loss."""
    for seed, loss in ((1, 2.0), (2, 2.2), (3, 0.1)):
        path = results / "test" / f"slower-{seed}.json"
        write_json(path, json.loads(path.read_text()) | {"test_loss": loss})
    (results / "adamw-3" / "metrics.json").unlink()
    study = summary.summarize(rows.read(results))
    frame = trade_offs(study)
    assert frame.filter(run="slower")["value"][0] == pytest.approx(2.1)
    slower = next(run for run in study.runs if run.run == "slower")
    assert slower.estimates["test_loss"].mean == pytest.approx(4.3 / 3)
