"""Perplexity on the way, equal seconds and the time to a loss, from hand-made evaluations."""

import json
import math

import pytest
from fake_results import write_json, write_study

from metrics import course, criteria, findings, rows, summary
from plots import course_tables, figures
from stages import summarize

LN = math.log
# run → validation perplexities after 50, 100, … 300 steps, and seconds a step
RUNS = {
    "adamw": ([64.0, 32.0, 20.0, 16.0, 12.0, 10.0], 0.1),
    "adamw-checkpointing": ([64.0, 32.0, 20.0, 16.0, 12.0, 10.0], 0.2),
    "sgd": ([60.0, 25.0, 11.0, 8.0, 9.0, 10.0], 0.15),
}


@pytest.fixture
def results(tmp_path):
    asked = {"perplexity_at": [50, 200, 225], "targets": [LN(11.5), LN(9.5)]}
    found = write_study(tmp_path, seeds=(1, 2), **asked)
    for name, (values, seconds) in RUNS.items():
        for seed in (1, 2):
            home = found / f"{name}-{seed}"
            scale = 1 + 0.01 * (seed - 1)  # the second seed is one percent worse
            losses = [LN(value * scale) for value in values]
            lines = [f"{50 * (i + 1) - 1},{50 * (i + 1) * 4096},{loss!r}" for i, loss in enumerate(losses)]
            (home / "evals.csv").write_text("\n".join(["step,tokens_seen,val_loss", *lines]) + "\n")
            head = "step,tokens_seen,train_loss,lr,grad_norm,step_seconds,tokens_per_second"
            steps = [f"{i},{(i + 1) * 4096},3.0,0.001,1.0,{9.0 if i < 3 else seconds},1" for i in range(300)]
            (home / "steps.csv").write_text("\n".join([head, *steps]) + "\n")
            path = home / "metrics.json"
            write_json(path, json.loads(path.read_text()) | {"val_loss": losses[-1]})
    return found


def summarized(results):
    return summary.summarize(rows.read(results))


def test_perplexity_on_the_way_is_that_of_the_evaluation_there(results):
    adamw, _, sgd = course.courses(summarized(results))
    assert adamw.at[50].mean == pytest.approx(64 * 1.005) and adamw.at[200].mean == pytest.approx(16 * 1.005)
    assert adamw.at[225] is None  # not evaluated there: never between two
    assert (sgd.best.mean, sgd.last.mean) == (pytest.approx(8 * 1.005), pytest.approx(10 * 1.005))
    assert sgd.gain.mean == pytest.approx((8 - 60) * 1.005)
    assert sgd.degradation.mean == pytest.approx(0.25) and adamw.degradation.mean == 0
    values = RUNS["adamw"][0]
    mean = sum(values) / 6
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 5)
    assert adamw.scatter.mean == pytest.approx(deviation * 1.005)


def test_the_scatter_is_of_the_last_ten(monkeypatch):
    assert course._scatter([1e9, *([2.0, 4.0] * 5)]) == pytest.approx(math.sqrt(10 / 9))
    assert course._scatter([1.0, 2.0]) is None and course._scatter([1.0, 2.0, math.inf]) is None


def test_at_equal_seconds_each_is_where_the_quickest_had_ended(results):
    """30 s: all of adamw, 150 steps of checkpointing, 200 of sgd; compiling in the first 3 steps is no time."""
    adamw, checkpointing, sgd = course.at_equal_seconds(summarized(results))
    assert adamw.limit.mean == pytest.approx(30) and checkpointing.seconds.mean == pytest.approx(60)
    assert math.exp(adamw.loss.mean) == pytest.approx(10 * math.sqrt(1.01))
    assert math.exp(checkpointing.loss.mean) == pytest.approx(20 * math.sqrt(1.01))
    assert math.exp(sgd.loss.mean) == pytest.approx(8 * math.sqrt(1.01))
    assert adamw.comparison is None
    assert sgd.comparison.estimate.mean == pytest.approx(LN(0.8))
    assert (sgd.comparison.verdict, checkpointing.comparison.verdict) == ("better", "worse")


def test_the_time_to_a_loss_and_who_never_got_there(results):
    found = {(one.run, round(math.exp(one.target), 1)): one for one in course.to_targets(summarized(results))}
    adamw, sgd = found["adamw", 11.5], found["sgd", 11.5]
    assert (adamw.reached, adamw.seeds) == (2, 2) and adamw.tokens.mean == 300 * 4096
    assert adamw.seconds.mean == pytest.approx(30) and adamw.seconds_ratio is None
    assert sgd.seconds.mean == pytest.approx(150 * 0.15)
    assert sgd.tokens_ratio.mean == pytest.approx(0.5) and sgd.seconds_ratio.mean == pytest.approx(0.75)
    never = found["adamw", 9.5]
    assert never.reached == 0 and never.seconds is None
    assert (
        found["sgd", 9.5].reached == 2 and found["sgd", 9.5].seconds_ratio is None
    )  # nothing to be paired with


def test_tables_files_and_the_baseline_to_beat(results, tmp_path):
    study = summarized(results)
    titles = [title for title, _ in course_tables.course_tables(study)]
    assert [title.split(":")[0] for title in titles] == [
        "Course",
        "At equal seconds",
        "Time to a validation loss of 2.44235",
        "Time to a validation loss of 2.25129",
    ]
    cells = {row[0]: row[1:] for row in course_tables.course_tables(study)[2][1][1]}
    assert cells["sgd"][0] == "2 of 2" and cells["sgd"][-1].startswith("0.75")
    [line] = [one.text for one in findings.findings(study) if one.text.startswith("Baseline to beat")]
    assert (
        line.startswith("Baseline to beat: adamw, test loss 2.1")
        and "Best of the others: adamw-check" in line
    )
    [line] = [one for one in findings.findings(study) if one.text.startswith("At equal seconds")]
    assert line.text.startswith(
        "At equal seconds of training, 30.00 s, in which adamw is through, sgd has the lowest validation loss: 2.084"
    )
    assert line.text.endswith("(better).") and line.runs == ("sgd", "adamw")
    assert "perplexity_time" in figures.every(study)
    assert figures.every(study)["perplexity_time"].caption.startswith("Area of a circle: peak memory.")
    reports = tmp_path / "reports"
    reports.mkdir()
    summarize.write_tables(reports, study)
    assert {"course.csv", "equal_seconds.csv", "targets.csv"} <= {p.name for p in reports.iterdir()}
    assert "At equal seconds" in (reports / "report.html").read_text()
    assert "Time to a validation loss" in (reports / "table.md").read_text()


def test_what_a_pruned_run_had_while_it_was_dense_is_not_its_best(results):
    """sgd prunes, and is at its target from step 250 on: its 8.0 at step 200 is of a denser model."""
    for seed in (1, 2):
        path = results / f"sgd-{seed}" / "config.toml"
        path.write_text(path.read_text() + '\n[pruning]\npruning = "magnitude"\npruning_hold = 50\n')
        path = results / f"sgd-{seed}" / "metrics.json"
        write_json(path, json.loads(path.read_text()) | {"best_val_loss_at_target": LN(9.0)})
        course_of_sparsity = "step,tokens_seen,target,sparsity\n249,1024000,0.5,0.5\n"
        (results / f"sgd-{seed}" / "sparsity.csv").write_text(course_of_sparsity)
    study = summarized(results)
    sgd = course.courses(study)[2]
    assert sgd.best.mean == pytest.approx(9 * 1.005) and sgd.at[200].mean == pytest.approx(8 * 1.005)
    assert sgd.degradation.mean == pytest.approx(1 / 9)
    found = {(one.run, round(math.exp(one.target), 1)): one for one in course.to_targets(study)}
    assert found["sgd", 11.5].tokens.mean == 250 * 4096  # not the 150 of before
    by_run = {one.run: one for one in course.at_equal_seconds(study)}
    assert by_run["sgd"].loss is None  # after 200 steps it was not there yet
    path = results / "sgd-2" / "metrics.json"
    write_json(path, json.loads(path.read_text()) | {"best_val_loss_at_target": None})
    assert course.courses(summarized(results))[2].best is None  # measured: one seed never was


def test_a_criterion_may_be_a_ratio_and_about_the_time_to_a_loss(results):
    asked = [
        {
            "run": "sgd",
            "measure": "seconds_to_target",
            "target": LN(11.5),
            "against": "adamw",
            "at_most": 0.5,
        },
        {"run": "sgd", "measure": "seconds_to_target", "target": LN(11.5), "at_most": 30},
        {"run": "adamw", "measure": "seconds_to_target", "target": LN(9.5), "at_most": 30},
        {"run": "adamw-checkpointing", "measure": "activation_mib", "against": "adamw", "at_most": 0.25},
    ]
    plan = results / "configs" / "study.json"
    write_json(plan, json.loads(plan.read_text()) | {"criteria": asked})
    ratio, seconds, never, memory = criteria.criteria(summarized(results))
    assert ratio.value == pytest.approx(0.75) and not ratio.met
    assert ratio.metric.label == "time to a validation loss of 2.44235, ratio to adamw"
    assert (ratio.shown, ratio.bound) == ("0.7500 ×", "≤ 0.5 ×")
    assert seconds.value == pytest.approx(22.5) and seconds.met and seconds.bound == "≤ 30 s"
    assert never.value is None and never.why == "not reached in any seed" and not never.met
    assert memory.value == pytest.approx(12.1 / 60.3) and memory.met


def test_a_study_that_does_not_ask_has_none(tmp_path):
    study = summarized(write_study(tmp_path))
    assert course_tables.course_tables(study) == [] and "perplexity_time" not in figures.every(study)
    assert all(frame.is_empty() for frame in course.frames(study).values())
    said = ("Baseline to beat", "At equal seconds")
    assert not [one for one in findings.findings(study) if one.text.startswith(said)]


def test_a_run_with_a_budget_of_its_own_is_in_no_ranking(results):
    plan = results / "configs" / "study.json"
    write_json(plan, json.loads(plan.read_text()) | {"own_budget": ["sgd"]})
    for seed in (1, 2):
        path = results / f"sgd-{seed}" / "metrics.json"
        write_json(path, json.loads(path.read_text()) | {"tokens": 301 * 4096, "steps": 301})
        steps = results / f"sgd-{seed}" / "steps.csv"
        steps.write_text(steps.read_text() + f"300,{301 * 4096},3.0,0.001,1.0,0.15,1\n")
    study = summarized(results)
    assert [one.run for one in course.courses(study)] == ["adamw", "adamw-checkpointing", "sgd"]
    for found in (course.at_equal_seconds(study), course.to_targets(study)):
        assert {one.run for one in found} == {"adamw", "adamw-checkpointing"}
