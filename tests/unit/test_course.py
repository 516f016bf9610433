"""Perplexity on the way, equal seconds and the time to a loss, from hand-made evaluations."""

import json
import math

import pytest
from fake_results import write_json, write_study

from metrics import course, course_frames, criteria, epochs, findings, rows, summary
from plots import course_tables, figures, outcome_tables
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
    assert adamw.scatter is None  # one evaluation in the last tenth of the steps


def scatter(values, counts=None, every=2, length=100):
    steps = [length - every * place for place in reversed(range(len(values)))]
    nothing = [0.0] * len(values)
    counts = counts or [True] * len(values)
    return course._scatter(course._Seed(steps, list(map(LN, values)), nothing, nothing, counts, length, 1.0))


def test_the_scatter_is_of_the_last_tenth_of_the_steps_and_of_evaluations_that_count():
    """Of 100 steps those after the 90th: evaluations at 92, 94, … 100 of one every 2."""
    assert scatter([64.0, 9.0, 2.0, 4.0, 2.0, 4.0, 3.0]) == pytest.approx(1.0)  # ±1 of 3, twice each
    assert scatter([64.0, 32.0, 9.0, 2.0, 4.0], every=5) is None  # after 95 and 100 steps: two
    assert scatter([2.0, 4.0], every=1) is None
    assert scatter([3.0, 1.0, 2.0, math.inf], every=1) is None
    assert scatter([8.0, 1.0, 2.0, 3.0], [False, True, True, True]) == pytest.approx(1.0)
    assert scatter([8.0, 1.0, 2.0, 3.0], [False, False, True, True]) is None


def slowed(results, run, other, factor):
    """Let the second run have the rows of the first, each step so many times as long."""
    for seed in (1, 2):
        for name in ("evals.csv", "steps.csv", "metrics.json"):
            text = (results / f"{run}-{seed}" / name).read_text()
            if name == "steps.csv":
                text = text.replace(",0.1,", f",{0.1 * factor!r},")
            (results / f"{other}-{seed}" / name).write_text(text)


def equal_seconds_rows(study):
    [(_, (_, cells))] = [t for t in course_tables.course_tables(study) if t[0].startswith("At equal")]
    return cells


def test_a_copy_that_is_a_thousandth_slower_is_no_worse(results):
    slowed(results, "adamw", "sgd", 1.001)
    sgd = course.at_equal_seconds(summarized(results))[2]
    assert sgd.comparison.estimate.mean == 0 and sgd.comparison.verdict == "identical"
    assert sgd.quickest is False and sgd.limit.mean == pytest.approx(30)


def test_between_two_evaluations_a_loss_is_on_the_line(results):
    """At 1.05 × the seconds 30 s are 285.71 steps: 0.7143 of the way from ln 12 to ln 10."""
    slowed(results, "adamw", "sgd", 1.05)
    study = summarized(results)
    adamw, _, sgd = course.at_equal_seconds(study)
    wanted = (1 - (300 / 1.05 - 250) / 50) * LN(12 / 10)
    assert sgd.comparison.estimate.mean == pytest.approx(wanted) and sgd.comparison.verdict == "worse"
    assert sgd.loss.mean - adamw.loss.mean == pytest.approx(wanted)
    written = course_frames.equal_seconds_frame(study).to_dicts()
    assert written[2]["difference_half_width"] == pytest.approx(0, abs=1e-9)
    assert "on the line between the evaluations around it" in course_tables.SECONDS


def test_every_run_that_was_the_quickest_of_a_seed_is_named(results):
    path = results / "sgd-2" / "steps.csv"
    path.write_text(path.read_text().replace(",0.15,", ",0.05,"))
    study = summarized(results)
    assert [one.quickest for one in course.at_equal_seconds(study)] == [True, False, True]
    [line] = [one.text for one in findings.findings(study) if one.text.startswith("At equal seconds")]
    assert "when the quickest run of each seed had ended (adamw, sgd)," in line


def test_starting_again_is_in_no_time(results):
    for run in RUNS:
        for seed in (1, 2):
            (results / f"{run}-{seed}" / "events.jsonl").write_text("")
    plain = course.to_targets(summarized(results))
    path = results / "sgd-1" / "steps.csv"
    lines = path.read_text().splitlines()
    for step in (100, 101, 102):
        lines[step + 1] = lines[step + 1].replace(",0.15,", ",50,")
    path.write_text("\n".join(lines) + "\n")
    assert course.to_targets(summarized(results)) != plain
    (results / "sgd-1" / "events.jsonl").write_text('{"event": "resumed", "step": 100}\n')
    for one, other in zip(course.to_targets(summarized(results)), plain, strict=True):
        assert (one.seconds and one.seconds.mean) == pytest.approx(other.seconds and other.seconds.mean)


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


def test_files_have_the_ratios_and_intervals_of_their_tables(results):
    written = {
        (row["run"], row["target"]): row
        for row in course_frames.targets_frame(summarized(results)).to_dicts()
    }
    sgd = written["sgd", LN(11.5)]
    names = ("tokens_ratio", "tokens_ratio_low", "tokens_ratio_high")
    assert [sgd[name] for name in names] == pytest.approx([0.5] * 3)


def test_tables_files_and_the_baseline_to_beat(results, tmp_path):
    study = summarized(results)
    titles = [title for title, _ in course_tables.course_tables(study)]
    assert [title.split(":")[0] for title in titles] == [
        "On the way",
        "Course",
        "At equal seconds",
        "Time to a validation loss of 2.44235",
        "Time to a validation loss of 2.25129",
    ]
    cells = {row[0]: row[1:] for row in course_tables.course_tables(study)[3][1][1]}
    assert cells["sgd"][0] == "2 of 2" and cells["sgd"][-1].startswith("0.75")
    [line] = [one.text for one in findings.findings(study) if one.text.startswith("Baseline to beat")]
    assert (
        line.startswith("Baseline to beat: adamw, test loss 2.1")
        and "Best of the others: adamw-check" in line
    )
    [line] = [one for one in findings.findings(study) if one.text.startswith("At equal seconds")]
    assert line.text.startswith(
        "At equal seconds of training, 30.00 s, when the quickest run of each seed had ended (adamw), sgd has the "
        "lowest validation loss: 2.084"
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
    [cells] = [row for row in equal_seconds_rows(study) if row[0] == "sgd"]
    assert cells[-1] == "not at its target sparsity yet"
    written = {row["run"]: row for row in course_frames.equal_seconds_frame(study).to_dicts()}
    assert written["sgd"]["why_no_loss"] == "not at its target sparsity yet"
    assert summarized(results).of("sgd").estimates["best_val_loss"].mean == pytest.approx(LN(9.0))
    best = [row["step"] for row in epochs.epochs(study.results).to_dicts() if row["best"] == "yes"]
    assert best == [299, 299, 299, 299, 249, 249]  # sgd's after 250 steps, not after 200
    caption = outcome_tables.epoch_caption(study, "sgd")
    assert caption.endswith("best by validation loss, at the target sparsity")
    said = [one.text for one in findings.findings(study) if "sgd reached adamw's final" in one.text]
    assert [text.split(" after ")[1].split(" the tokens")[0] for text in said] == [
        "0.83 ×"
    ]  # 250 of 300 steps
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
        {
            "run": "sgd",
            "measure": "seconds_to_target",
            "target": LN(1.5),
            "against": "adamw",
            "at_most": 0.5,
        },
    ]
    plan = results / "configs" / "study.json"
    write_json(plan, json.loads(plan.read_text()) | {"criteria": asked})
    ratio, seconds, never, memory, neither = criteria.criteria(summarized(results))
    assert neither.value is None and neither.why == "not reached by sgd and adamw"
    assert ratio.value == pytest.approx(0.75) and not ratio.met
    assert ratio.metric.label == "time to a validation loss of 2.44235, ratio to adamw"
    assert (ratio.shown, ratio.bound) == ("0.7500 ×", "≤ 0.5 ×")
    assert seconds.value == pytest.approx(22.5) and seconds.met and seconds.bound == "≤ 30 s"
    assert never.value is None and never.why == "not reached in any seed" and not never.met
    assert memory.value == pytest.approx(12.1 / 60.3) and memory.met


def test_a_criterion_on_the_time_of_a_training_does_not_count_what_compiled(results):
    """First steps took 9 s, for compiling; each later one 0.1 s of adamw, 0.15 s of sgd."""
    plan = results / "configs" / "study.json"
    one = {"run": "sgd", "measure": "steady_train_seconds", "at_most": 50}
    write_json(plan, json.loads(plan.read_text()) | {"criteria": [{**one, "against": "adamw"}, one]})
    ratio, seconds = criteria.criteria(summarized(results))
    assert ratio.value == pytest.approx(1.5) and seconds.value == pytest.approx(45)
    assert ratio.metric.label == "training time, compiling not counted, ratio to adamw"
    assert (seconds.bound, seconds.met) == ("≤ 50 s", True)
    (results / "sgd-2" / "metrics.json").unlink()
    assert [one.why for one in criteria.criteria(summarized(results))] == ["1 of 2 seeds complete"] * 2


def test_a_study_that_does_not_ask_has_none(tmp_path):
    study = summarized(write_study(tmp_path))
    assert course_tables.course_tables(study) == [] and "perplexity_time" not in figures.every(study)
    assert all(frame.is_empty() for frame in course_frames.frames(study).values())
    said = ("Baseline to beat", "At equal seconds")
    assert not [one for one in findings.findings(study) if one.text.startswith(said)]


def test_a_run_with_a_budget_of_its_own_is_in_no_ranking(results):
    plan = results / "configs" / "study.json"
    asked = {"run": "sgd", "measure": "seconds_to_target", "target": LN(11.5), "against": "adamw"}
    more = {"own_budget": ["sgd"], "criteria": [{**asked, "at_most": 0.8}]}
    write_json(plan, json.loads(plan.read_text()) | more)
    for seed in (1, 2):
        path = results / f"sgd-{seed}" / "metrics.json"
        write_json(path, json.loads(path.read_text()) | {"tokens": 301 * 4096, "steps": 301})
        steps = results / f"sgd-{seed}" / "steps.csv"
        steps.write_text(steps.read_text() + f"300,{301 * 4096},3.0,0.001,1.0,0.15,1\n")
    study = summarized(results)
    assert [(one.run, one.aside) for one in course.courses(study)] == [
        ("adamw", ""),
        ("adamw-checkpointing", ""),
        ("sgd", "own budget"),
    ]
    for _, (_, cells) in course_tables.course_tables(study)[:2]:
        assert [row[0] for row in cells] == ["adamw", "adamw-checkpointing", "sgd (own budget)"]
    assert course_frames.course_frame(study)["not_ranked"].to_list() == [None, None, "own budget"]
    captions = [one.caption for one in figures.every(study).values()]
    assert "Not drawn, for a budget of its own: sgd." in captions
    assert {one.run for one in course.at_equal_seconds(study)} == {"adamw", "adamw-checkpointing"}
    # How soon it has a loss is no ranking: that is told of any run, and can be a criterion.
    timed = {one.run: one.aside for one in course.to_targets(study)}
    assert timed == {"adamw": "", "adamw-checkpointing": "", "sgd": "own budget"}
    _, (_, cells) = course_tables.course_tables(study)[-2]
    assert [(row[0], row[-1]) for row in cells][2] == ("sgd (own budget)", "0.75")
    [soon] = criteria.criteria(study)
    assert soon.value == pytest.approx(0.75) and soon.met
