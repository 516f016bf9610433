"""Reading results and summarizing them: what counts, what does not, and what is said about it."""

import json
import math
import shutil

import polars as pl
import pytest
from fake_results import RUNS, write_json, write_run, write_study

from metrics import frames, rows, summary, words


@pytest.fixture
def results(tmp_path):
    return write_study(tmp_path)


def _of(study, run):
    return next(one for one in study.runs if one.run == run)


def test_means_verdicts_and_ratios(results):
    study = summary.summarize(rows.read(results))
    assert [run.status for run in study.runs] == ["baseline", "identical", "worse"]
    baseline, checkpointing, _ = study.runs
    expected = 2.10 + 0.02 * sum(math.sin(seed) for seed in (1, 2, 3)) / 3
    assert baseline.estimates["test_loss"].mean == pytest.approx(expected)
    assert baseline.estimates["step_milliseconds"].mean == pytest.approx(100, rel=0.02)
    assert checkpointing.ratios["activation_mib"].mean == pytest.approx(12.1 / 60.3)
    assert "exactly the same test loss in all 3" in words.verdict_sentence(study, checkpointing)
    assert "activations kept 80 % less" in words.cost_sentence(study, checkpointing)


def test_unfinished_seeds_show_no_numbers(results):
    shutil.rmtree(results / "sgd-1")
    (results / "sgd-2" / "metrics.json").unlink()
    write_json(
        results / "sgd-3" / "metrics.json", {"status": "failed", "reason": "out of memory", "val_loss": 9.9}
    )
    read = rows.read(results)
    assert [one.state for one in read.of("sgd")] == ["missing", "incomplete", "failed"]
    assert set(read.steps["run"]) == {"adamw", "adamw-checkpointing"}
    study = summary.summarize(read)
    sgd = _of(study, "sgd")
    assert set(sgd.estimates.values()) == {None}
    assert sgd.notes[2] == "seed 3: failed: out of memory"
    assert frames.dvc_metrics(sgd, "test_loss") == {"seeds": 0, "verdict": "incomplete", "in_effect": "-"}
    row = frames.table_frame(study).filter(pl.col("run") == "sgd")
    assert row.select(pl.selectors.float()).null_count().row(0) == (1,) * len(
        row.select(pl.selectors.float()).columns
    )


def test_a_lost_seed_is_named_and_the_rest_compared(results):
    (results / "sgd-2" / "metrics.json").unlink()
    sgd = _of(summary.summarize(rows.read(results)), "sgd")
    assert sgd.comparison.seeds == (1, 3)
    assert sgd.complete_seeds == (1, 3)
    others = "its means are over seeds 1, 3, the baseline's over seeds 1, 2, 3"
    assert sgd.notes == ("seed 2: incomplete: interrupted or still running (no metrics.json)", others)


def test_one_seed_gives_no_verdict(tmp_path):
    study = summary.summarize(rows.read(write_study(tmp_path, seeds=(1,))))
    sgd = _of(study, "sgd")
    assert (sgd.comparison.verdict, sgd.status) == (None, "no verdict")
    assert "adamw-checkpointing, sgd: no verdict: one seed gives no verdict" in words.footnotes(study)
    assert sgd.estimates["test_loss"].half_width is None


def test_ledger_differences_are_named(results):
    write_run(results, "sgd", 2, agrees=False)
    sgd = _of(summary.summarize(rows.read(results)), "sgd")
    assert sgd.ledger == ("compile: requested true, in effect false (seed 2)",)
    assert frames.dvc_metrics(sgd, "test_loss")["in_effect"] == sgd.ledger[0]


def test_a_diverged_run_is_not_judged(results):
    write_run(results, "sgd", 2, test_loss=math.nan)
    sgd = _of(summary.summarize(rows.read(results)), "sgd")
    assert sgd.comparison.reason == "not finite in seed 2"
    assert frames.dvc_metrics(sgd, "test_loss")["test_loss"] == "not finite"


def test_missing_baseline_leaves_no_verdict(results):
    for seed in (1, 2, 3):
        shutil.rmtree(results / f"adamw-{seed}")
    study = summary.summarize(rows.read(results))
    sgd = _of(study, "sgd")
    assert (sgd.status, sgd.comparison) == ("not comparable", None)
    assert sgd.not_comparable == ("no seed in common with the baseline",)
    assert sgd.ratios["tokens_per_second"] is None
    assert "no seed in common with the baseline" in words.verdict_sentence(study, sgd)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sgd-1/metrics.json", "{", r"sgd-1/metrics.json is not valid JSON"),
        ("sgd-1/metrics.json", '{"status": "complete"}', r"sgd-1/metrics.json lacks train_loss"),
        (
            "sgd-1/ledger.json",
            '{"entries": [{"what": "x"}]}',
            r"sgd-1/ledger.json must hold a list 'entries'",
        ),
        ("sgd-1/events.jsonl", '{}\n{"event', r"sgd-1/events.jsonl, line 2, is not valid JSON"),
        ("sgd-1/samples.jsonl", '{"step": 1, "prompt": "a"}', r"sgd-1/samples.jsonl, sample 1, must have"),
        ("sgd-1/samples.jsonl", "[]", r"sgd-1/samples.jsonl, line 1, must be a JSON object"),
        ("sgd-1/config.toml", "= 1", r"sgd-1/config.toml is not valid TOML"),
        ("sgd-1/steps.csv", "step,train_loss\n1,2\n", r"sgd-1/steps.csv lacks the column tokens_seen"),
        (
            "sgd-1/evals.csv",
            "step,tokens_seen,val_loss\n1,2,high\n",
            r"sgd-1/evals.csv is not a table of numbers",
        ),
        (
            "test/sgd-1.json",
            '{"test_loss": "low"}',
            r"test/sgd-1.json: test_loss must be a number, got 'low'",
        ),
        ("configs/study.json", '{"study": "x"}', r"configs/study.json lacks question, baseline"),
    ],
)
def test_malformed_files_are_named(results, name, content, message):
    (results / name).write_text(content)
    with pytest.raises(rows.ResultsError, match=message):
        rows.read(results)


def test_unknown_metric(tmp_path):
    with pytest.raises(rows.ResultsError, match="unknown metric 'accuracy'; one of test_loss"):
        summary.summarize(rows.read(write_study(tmp_path, metric="accuracy")))


def test_means_of_curves_do_not_depend_on_the_order_of_rows(tmp_path):
    """Of 1e16, -1e16 and 1 nothing is left when they are added up the other way; threads may take any."""
    read = rows.read(write_study(tmp_path))
    loss = pl.col("seed").replace_strict({1: 1e16, 2: -1e16, 3: 1.0})
    steps = read.steps.with_columns(loss.alias("train_loss"))
    one, other = (frames.curves(read, order, ("train_loss",)) for order in (steps, steps.reverse()))
    assert one.equals(other) and set(one["train_loss"]) == {1 / 3}


def test_runs_that_were_left_out_are_named_below_the_tables(results):
    assert not [note for note in words.footnotes(summary.summarize(rows.read(results))) if "left out" in note]
    plan = results / "configs" / "study.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"left_out": ["muon", "mla"]}))
    notes = words.footnotes(summary.summarize(rows.read(results)))
    assert notes[-1] == "2 of the study's 5 runs are left out, with what is asked of them: muon, mla"


def test_curves_keep_measured_steps_only(results):
    read = rows.read(results)
    curves = frames.curves(read, read.steps, ("train_loss",), points=50)
    assert curves.group_by("run", maintain_order=True).len()["len"].to_list() == [50, 50, 50]
    assert curves["run"].unique(maintain_order=True).to_list() == list(RUNS)
    first = read.steps.filter((pl.col("run") == "sgd") & (pl.col("step") == 1))["train_loss"]
    drawn = curves.filter((pl.col("run") == "sgd") & (pl.col("step") == 1)).row(0, named=True)
    assert drawn["train_loss"] == pytest.approx(first.mean())
    assert (drawn["train_loss_low"], drawn["train_loss_high"]) == (first.min(), first.max())
    assert curves["step"].max() == 300


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (2.34567, "2.346"),
        (41234.5, "41,234"),
        (0.0, "0"),
        (math.inf, "∞"),
        (3e-9, "3.000e-09"),
        (6.0574e17, "6.057e+17"),
        (-131_072e6, "-131,072,000,000"),
    ],
)
def test_numbers_as_words(value, text):
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        ((2.34567, 0.0123, 3), "+2.346 ± 0.012"),
        ((-41234.5, 310.0, 3), "-41,234 ± 310"),
        ((2.0, 0.0, 3), "+2.000 ± 0"),
        ((2.34567, None, 1), "+2.346"),
    ],
)
def test_intervals_as_words(estimate, text):
    assert words.with_interval(summary.Estimate(*estimate), signed=True) == text


def test_an_accuracy_is_better_when_higher_and_has_a_binomial_interval(tmp_path):
    results = write_study(tmp_path, metric="test_accuracy")
    for run, share in {"adamw": 0.90, "adamw-checkpointing": 0.90, "sgd": 0.95}.items():
        for seed in (1, 2, 3):
            path = results / "test" / f"{run}-{seed}.json"
            scored = json.loads(path.read_text()) | {"test_accuracy": share + seed / 1000, "examples": 7600}
            write_json(path, scored | ({"test_accuracy": 0.9531} if (run, seed) == ("sgd", 3) else {}))
    study = summary.summarize(rows.read(results))
    sgd = _of(study, "sgd")
    assert sgd.status == "better"
    share = sgd.proportions["test_accuracy"]
    assert share.count == 7600 and share.low < sgd.estimates["test_accuracy"].mean < share.high
    assert words.binomial(sgd, "test_accuracy") == f"{100 * share.low:.2f}–{100 * share.high:.2f}"
    [note] = [note for note in words.footnotes(study) if "binomial" in note]
    assert note.startswith(
        "adamw, adamw-checkpointing, sgd: test accuracy: the binomial interval is Wilson's"
    )
    assert "95 %, of 7,600 rows" in note
    assert _of(summary.summarize(rows.read(write_study(tmp_path / "b"))), "sgd").proportions == {}
