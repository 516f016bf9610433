"""The course of a training: epochs from samples, seconds without evaluation, the best row marked."""

import json

import polars as pl
import pytest
from fake_classifier import classifier_study
from fake_results import write_json, write_study

from engine import probes
from metrics import rows, summary
from metrics.epochs import (
    WARM_UP_STEPS,
    csv_frame,
    epoch_bars,
    epoch_seconds,
    epochs,
    mean_epochs,
    seconds_until,
    steady_seconds,
)
from metrics.frames import bars
from plots import figures, outcome_tables, report
from plots.outcome_tables import epoch_caption, epoch_tables
from stages import summarize


@pytest.fixture
def results(tmp_path):
    return classifier_study(tmp_path)


def of(frame, run, seed=None):
    return frame.filter(
        (pl.col("run") == run) & (True if seed is None else pl.col("seed") == seed)
    ).to_dicts()


def test_a_row_an_evaluation_by_hand(results):
    first, second, third = of(epochs(rows.read(results)), "small_1", 1)
    assert (first["step"], first["epoch"], first["tokens_seen"]) == (9, 1.0, 10 * 256 * 128)
    assert first["train_loss"] == pytest.approx(1 - 0.045)  # of steps 0 to 9: 1.00, 0.99, …
    assert second["train_loss"] == pytest.approx(1 - 0.145)  # of steps 10 to 19 alone
    assert [row["seconds"] for row in (first, second, third)] == pytest.approx([0.1, 0.1, 0.1])
    assert [row["seconds_total"] for row in (first, second, third)] == pytest.approx([0.1, 0.2, 0.3])
    assert (second["val_loss"], second["val_accuracy"]) == pytest.approx((0.27, 0.913))
    assert [row["best"] for row in (first, second, third)] == ["no", "yes", "no"]


def test_an_epoch_is_of_samples_whatever_the_batch(results):
    large = of(epochs(rows.read(results)), "large_2", 1)
    assert [(row["step"], row["epoch"]) for row in large] == [(4, 1.0), (9, 2.0), (14, 3.0)]
    assert large[0]["seconds"] == pytest.approx(5 * 0.042)


def test_the_mean_is_of_evaluations_that_every_seed_has(results):
    path = results / "small_1-2" / "evals.csv"
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([head, *lines[1:]]))
    read = rows.read(results)
    mean = of(mean_epochs(read), "small_1")
    assert [row["step"] for row in mean] == [19, 29]
    assert mean[0]["val_accuracy"] == pytest.approx((0.913 + 0.914 + 0.915) / 3)
    assert (mean[0]["val_accuracy_low"], mean[0]["val_accuracy_high"]) == pytest.approx((0.913, 0.915))
    written = csv_frame(read)
    assert [row["seed"] for row in of(written, "small_1")] == ["1"] * 3 + ["2"] * 2 + ["3"] * 3 + ["mean"] * 2
    assert of(epochs(read), "small_1", 2)[0]["seconds"] == pytest.approx(0.2)  # nothing is left out


def test_the_best_row_is_the_first_of_equals_and_never_no_number(results):
    path = results / "small_1-1" / "evals.csv"
    head, *_ = path.read_text().splitlines()
    shares = ("nan", "0.9", "0.9")
    path.write_text("\n".join([head, *(f"{10 * n + 9},{n},0.3,{share}" for n, share in enumerate(shares))]))
    assert [row["best"] for row in of(epochs(rows.read(results)), "small_1", 1)] == ["no", "yes", "no"]


def test_a_language_model_has_no_accuracy_and_its_least_loss_is_best(tmp_path):
    read = rows.read(write_study(tmp_path))
    written = csv_frame(read)
    assert "val_accuracy" not in written.columns and "epoch" not in written.columns
    own = of(written, "sgd")
    assert [row["best"] for row in own if row["seed"] == "mean"] == ["no"] * 5 + ["yes"]
    assert [row["step"] for row in own if row["seed"] == "1"] == [50, 100, 150, 200, 250, 300]
    assert epoch_seconds(read) == dict.fromkeys(("adamw", "adamw-checkpointing", "sgd"), {})


def test_seconds_of_an_epoch(results):
    read = rows.read(results)
    assert epoch_seconds(read)["large_2"] == pytest.approx(dict.fromkeys((1, 2, 3), 15 * 0.042 / 3))
    bars = epoch_bars(summary.summarize(read))
    assert bars["value"].to_list() == pytest.approx([0.1, 0.08, 0.4, 0.21])
    assert bars["label"][0] == "small_1: 0.1000 ± 0"


def test_the_table_has_percents_and_marks_the_best(results):
    study = summary.summarize(rows.read(results))
    heads, cells = epoch_tables(study)["small_1"]
    assert heads[-2:] == ["validation accuracy (%)", "best"]
    assert cells[1] == ["20", "2.00", "0.8550", "0.1000", "0.2000", "0.2700", "91.40", "best"]
    for seed in (1, 2, 3):
        (results / f"small_2-{seed}" / "metrics.json").unlink()
    assert list(epoch_tables(summary.summarize(rows.read(results)))) == ["small_1", "large_1", "large_2"]


def compiles(results, run, seconds, seeds=(1, 2, 3)):
    """Let the first step of a run have taken so long."""
    for seed in seeds:
        path = results / f"{run}-{seed}" / "steps.csv"
        head, first, *others = path.read_text().splitlines()
        cells = first.split(",")
        path.write_text("\n".join([head, ",".join([*cells[:5], str(seconds), *cells[6:]]), *others]) + "\n")


def test_compiling_is_in_no_time(results):
    plain = rows.read(results)
    compiles(results, "small_1", 19.0)
    read = rows.read(results)
    assert read.steps["step_seconds"].max() == 19.0
    assert epochs(read)["seconds"].to_list() == pytest.approx(epochs(plain)["seconds"].to_list())
    assert epoch_seconds(read)["small_1"] == pytest.approx(dict.fromkeys((1, 2, 3), 0.1))
    caption = epoch_caption(summary.summarize(read), "small_1")
    assert "seconds at the median step, compiling not counted" in caption


def test_seconds_until_a_step_have_the_first_three_at_the_median():
    steps = pl.DataFrame({"step": range(6), "step_seconds": [19.0, 5.0, 4.0, 1.0, 2.0, 3.0]})
    assert [seconds_until(steps, step) for step in (0, 2, 3, 5)] == [2.0, 6.0, 7.0, 12.0]
    assert (steady_seconds(steps), steady_seconds(steps.head(3)), seconds_until(steps.head(3), 2)) == (
        2,
        5,
        15,
    )
    again = pl.DataFrame({"step": range(9), "step_seconds": [19.0, 5.0, 4.0, 1.0, 2.0, 90.0, 30.0, 2.0, 2.0]})
    assert (
        seconds_until(again, 8, starts=(5,)) == 8 * 2.0 + 1
    )  # of the steps after the fifth three compile again
    assert seconds_until(again, 8, starts=(5, 6)) == 8 * 2.0 + 1 and seconds_until(again, 4, (5,)) == 9
    assert WARM_UP_STEPS == probes.WARM_UP_STEPS
    assert all(
        steady_seconds(steps.head(n)) == probes.steady(steps["step_seconds"][:n].to_list()) for n in (2, 5, 6)
    )


def test_an_interval_of_times_ends_at_nothing(results):
    for seed, seconds in ((1, 0.001), (2, 0.03), (3, 0.06)):
        path = results / f"large_1-{seed}" / "steps.csv"
        path.write_text(path.read_text().replace(",0.04,", f",{seconds},"))
        path = results / f"large_1-{seed}" / "metrics.json"
        write_json(path, json.loads(path.read_text()) | {"peak_memory_gib": 10 * seconds})
    study = summary.summarize(rows.read(results))
    drawn = epoch_bars(study).filter(run="large_1")
    assert drawn["low"][0] == 0.0 and drawn["high"][0] > 2 * drawn["value"][0]
    assert bars(study, ("peak_memory_gib",)).filter(run="large_1")["low"][0] == 0.0


def test_the_means_are_made_once_for_all_runs(results, tmp_path, monkeypatch):
    made = []
    whole = outcome_tables.mean_epochs
    monkeypatch.setattr(outcome_tables, "mean_epochs", lambda *of: made.append(of) or whole(*of))
    study = summary.summarize(rows.read(results))
    assert report.html(study).count("<details><summary>") == 4 and len(made) == 1


def test_a_language_model_s_charts_ask_for_no_means(tmp_path, monkeypatch):
    monkeypatch.delattr(figures, "mean_epochs")
    assert "val_loss" in figures.every(summary.summarize(rows.read(write_study(tmp_path))))


def test_the_terminal_has_the_baselines_and_the_report_every_runs(results, tmp_path, capsys):
    assert summarize.main([str(results), str(tmp_path / "reports")]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": each evaluation, means over 3 seeds") == 1
    assert "small_1: each evaluation, means over 3 seeds" in printed and "91.40   best" in printed
    page = (tmp_path / "reports" / "report.html").read_text()
    for run in ("small_1", "small_2", "large_1", "large_2"):
        assert f"<details><summary>{run}</summary>" in page
    assert (
        (tmp_path / "reports" / "epochs.csv")
        .read_text()
        .startswith("run,seed,step,tokens_seen,epoch,train_loss")
    )
