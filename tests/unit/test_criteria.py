"""Criteria: met or not by the mean over all seeds; what was not measured meets nothing."""

import json

import pytest
from fake_classifier import classifier_study
from fake_results import write_json

from metrics import rows, summary
from metrics.criteria import Criterion, criteria, criteria_frame, metric, verdict
from stages import summarize

SEEDS = (1, 2, 3)


def found(results):
    return criteria(summary.summarize(rows.read(results)))


def test_each_is_judged_by_its_mean_and_bounds(tmp_path):
    speedup, accuracy, efficiency = found(classifier_study(tmp_path))
    assert (speedup.shown, speedup.bound, speedup.result) == ("1.905 ×", "≥ 1.8 ×", "pass")
    assert accuracy.value == pytest.approx((0.911 + 0.912 + 0.913) / 3)
    assert (accuracy.shown, accuracy.bound, accuracy.result) == ("91.20 %", "91 to 95 %", "pass")
    assert (efficiency.shown, efficiency.bound, efficiency.result) == ("62.50 %", "≥ 70 %", "fail")
    said = "1 of 3 criteria not met: small_2 efficiency 62.50 %, wanted ≥ 70 %."
    assert verdict((speedup, accuracy, efficiency)) == said
    assert verdict((speedup, accuracy)) == "All 2 criteria are met."


def test_a_time_has_an_upper_bound(tmp_path):
    wanted = [{"run": "large_1", "measure": "train_seconds", "at_most": bound} for bound in (1.2, 1.1)]
    met, missed = found(classifier_study(tmp_path, criteria=wanted))
    assert (met.shown, met.bound, met.result) == ("1.200 s", "≤ 1.2 s", "pass")
    assert (missed.bound, missed.result) == ("≤ 1.1 s", "fail")


@pytest.mark.parametrize(
    ("value", "at_least", "at_most", "shown", "met"),
    [
        (0.91, 0.91, None, "91.00 %", True),
        (0.909996, 0.91, None, "90.9996 %", False),  # 91.00 would look as if it were met
        (0.95, None, 0.95, "95.00 %", True),
        (0.9500001, None, 0.95, "95.00001 %", False),
        (float("nan"), 0.91, None, "not a number %", False),
        (None, 0.91, None, "–", False),
    ],
)
def test_a_value_at_its_bound(value, at_least, at_most, shown, met):
    one = Criterion("r", "test_accuracy", metric("test_accuracy", True), at_least, at_most, value, "")
    assert (one.shown, one.met) == (shown, met)


def lost_seed(results):
    (results / "large_2-2" / "metrics.json").unlink()
    return "2 of 3 seeds complete"


def diverged(results):
    for seed in SEEDS:
        write_json(
            results / f"large_2-{seed}" / "metrics.json", {"status": "diverged", "step": 3, "reason": "nan"}
        )
    return "0 of 3 seeds complete"


def reference_gone(results):
    for seed in SEEDS:
        (results / f"large_1-{seed}" / "metrics.json").unlink()
    return "large_1 has no result; no seed in common"


def one_pair_less(results):
    (results / "large_1-2" / "metrics.json").unlink()
    return "measured in 2 of 3 seeds"


def invalid(results):
    for seed in SEEDS:
        path = results / f"large_2-{seed}" / "metrics.json"
        write_json(path, json.loads(path.read_text()) | {"val_accuracy": 0.99})
    return "large_2 is invalid: metrics.json says val_accuracy 0.99, evals.csv ends in 0.919"


@pytest.mark.parametrize("harm", [lost_seed, diverged, reference_gone, one_pair_less, invalid])
def test_what_was_not_measured_fails_and_says_why(tmp_path, harm):
    results = classifier_study(tmp_path)
    why = harm(results)
    speedup = found(results)[0]
    assert (speedup.value, speedup.met, speedup.result) == (None, False, "fail: not measured")
    assert speedup.why.startswith(why)
    assert f"large_2 speedup not measured ({why}" in verdict(found(results))


def test_no_figure_of_an_invalid_run_meets_anything(tmp_path):
    results = classifier_study(tmp_path)
    write_json(results / "small_1-2" / "env.json", {"device_memory_gib": 0.125, "processes": 1})
    _, accuracy, _ = found(results)
    assert accuracy.result == "fail: not measured"
    assert accuracy.why.startswith(
        "small_1 is invalid: peak memory 0.25 GiB, and its device has 0.125 (seed 2)"
    )


def test_a_measure_that_the_runs_do_not_have_fails(tmp_path):
    wanted = [{"run": "small_1", "measure": "peak_memory_gib", "at_most": 9}]
    results = classifier_study(tmp_path, criteria=wanted)
    assert found(results)[0].result == "pass"
    for seed in SEEDS:  # not known of such a device
        path = results / f"small_1-{seed}" / "metrics.json"
        write_json(path, json.loads(path.read_text()) | {"peak_memory_gib": None})
    [one] = found(results)
    assert (one.result, one.why) == ("fail: not measured", "not recorded")


def test_criteria_are_told_first_and_stop_nothing(tmp_path, capsys):
    results, reports = classifier_study(tmp_path), tmp_path / "reports"
    assert summarize.main([str(results), str(reports)]) == 0
    said = "1 of 3 criteria not met: small_2 efficiency 62.50 %, wanted ≥ 70 %."
    for text in (
        capsys.readouterr().out,
        (reports / "table.md").read_text(),
        (reports / "report.html").read_text(),
    ):
        assert 0 < text.index(said) < text.index("Against small_1 on test accuracy")
        assert "fail" in text
    assert r"small\_2 & efficiency & 62.50 \% & $\geq$ 70 \% & fail" in (reports / "table.tex").read_text()
    lines = (reports / "criteria.csv").read_text().splitlines()
    assert lines[0] == "run,measure,value,at_least,at_most,met,why_not_measured"
    assert [line.split(",")[5] for line in lines[1:]] == ["yes", "yes", "no"]


def test_a_study_without_criteria_says_nothing_of_them(tmp_path, capsys):
    results, reports = classifier_study(tmp_path, criteria=[], scaling={}), tmp_path / "reports"
    reports.mkdir()
    for name in ("criteria.csv", "scaling.csv"):
        (reports / name).write_text("of what it declared before")
    assert summarize.main([str(results), str(reports)]) == 0
    assert not (reports / "criteria.csv").exists() and not (reports / "scaling.csv").exists()
    page, printed = (reports / "report.html").read_text(), capsys.readouterr().out
    for word in ("Criteria", "criteria not", "<h2>Scaling", "Speedup"):
        assert word not in page and word not in printed and word not in (reports / "table.md").read_text()
    assert criteria_frame(summary.summarize(rows.read(results))).is_empty()
