"""Runs by their peak memory, and what a GiB of it changes in perplexity or accuracy, by hand; bars of perplexity."""

import json

import pytest
from fake_classifier import classifier_study
from fake_results import write_json, write_study

from metrics import criteria, frames, rows, summary
from metrics.trade_offs import by_memory, natural
from plots import figures, report, tables
from plots.measured_tables import memory_tables
from stages.study import study_problems

PEAKS = {"adamw": 2.0, "adamw-checkpointing": 4.0, "sgd": 1.5}
PERPLEXITIES = {"adamw": (10, 12, 14), "adamw-checkpointing": (9, 11, 13), "sgd": (11, 14, 15)}


@pytest.fixture
def results(tmp_path):
    found = write_study(tmp_path)
    for run, peak in PEAKS.items():
        for seed, perplexity in enumerate(PERPLEXITIES[run], 1):
            change(found / f"{run}-{seed}" / "metrics.json", peak_memory_gib=peak)
            change(found / "test" / f"{run}-{seed}.json", test_perplexity=perplexity)
    return found


def change(path, **values):
    write_json(path, json.loads(path.read_text()) | values)


def read(results):
    return summary.summarize(rows.read(results))


def test_ranks_savings_and_the_change_for_each_gib_by_hand(results):
    """sgd: +1, +2, +1 with 0.5 GiB less; deviation 1/√3, so ± 4.302653 / 3, and twice that for a whole GiB."""
    sgd, adamw, checkpointing = by_memory(read(results))
    assert [one.rank for one in (sgd, adamw, checkpointing)] == [1, 2, 3]
    assert (sgd.saved, adamw.saved, checkpointing.saved) == (0.5, None, -2.0)
    assert sgd.difference.mean == pytest.approx(4 / 3)
    assert sgd.difference.half_width == pytest.approx(4.302653 / 3, rel=1e-6)
    assert sgd.per_gib_saved.mean == pytest.approx(8 / 3) and sgd.per_gib_more is None
    assert sgd.per_gib_saved.half_width == pytest.approx(2 * 4.302653 / 3, rel=1e-6)
    assert checkpointing.per_gib_more.mean == -0.5 and checkpointing.per_gib_saved is None


def test_the_table_in_words(results):
    study = read(results)
    ((caption, (heads, cells)),) = memory_tables(study)
    assert (
        caption.startswith("Memory, ranked: peak, least first; saved, and differences") and "adamw" in caption
    )
    assert heads[-4:] == ["test perplexity", "difference", "for each GiB saved", "for each GiB more"]
    assert cells[0][:5] == ["sgd", "1", "1.500", "0.5000", "0.75"]
    assert cells[0][6:] == ["+1.3 ± 1.4", "+2.7 ± 2.9", "–"]
    assert cells[1][3:5] == ["–", "–"] and cells[1][6:] == ["–"] * 3
    assert cells[2][3] == "-2.000" and cells[2][6:] == ["-1.000 ± 0", "–", "-0.5000 ± 0"]
    assert caption in tables.markdown(study) and "<h2>Memory</h2>" in report.html(study)
    # A terminal has no room for it.
    assert caption not in [title for title, _ in tables.outcome_tables(study)]


def test_equal_peaks_share_a_rank_and_near_ones_have_no_change_a_gib(results):
    for seed in (1, 2, 3):
        change(results / f"adamw-checkpointing-{seed}" / "metrics.json", peak_memory_gib=1.5)
        change(results / f"sgd-{seed}" / "metrics.json", peak_memory_gib=1.981)  # 0.95 % less
    found = by_memory(read(results))
    assert [(one.run, one.rank) for one in found] == [("adamw-checkpointing", 1), ("sgd", 2), ("adamw", 3)]
    assert found[1].saved == pytest.approx(0.019) and found[1].per_gib_saved is None
    for seed in (1, 2, 3):
        change(results / f"sgd-{seed}" / "metrics.json", peak_memory_gib=1.5)
    assert [one.rank for one in by_memory(read(results))] == [1, 1, 3]


def test_peaks_that_are_alike_are_not_ranked(results):
    for run in PEAKS:
        for seed in (1, 2, 3):
            change(results / f"{run}-{seed}" / "metrics.json", peak_memory_gib=1.0 + 0.009 * (run == "sgd"))
    study = read(results)
    assert (
        by_memory(study) == () and memory_tables(study) == [] and "<h2>Memory</h2>" not in report.html(study)
    )


def test_classifiers_are_told_in_accuracy(tmp_path):
    study = read(classifier_study(tmp_path, metric="test_loss"))
    assert natural(study) == "test_accuracy" and "test_accuracy" in figures.every(study)
    assert "test_perplexity" not in figures.every(study)


def test_perplexity_has_bars_that_start_at_zero(results):
    drawn = figures.every(read(results))
    spec = json.dumps(drawn["test_perplexity"].chart.to_dict())
    assert '"type": "bar"' in spec and "test perplexity, lower is better" in spec
    assert '"type": "bar"' not in json.dumps(drawn["test_loss"].chart.to_dict())
    assert "test perplexity" in frames.dvc_bars(read(results))["metric"].to_list()


def test_an_interval_of_perplexity_ends_at_one(results):
    """adamw's 10, 12 and 14 are 12 ± 5.0; 2, 4 and 30 are 12 ± 39."""
    frame = frames.bars(read(results), ("test_perplexity",))
    assert frame["low"][0] == pytest.approx(12 - 4.302653 * 2 / 3**0.5, rel=1e-6)
    for seed, perplexity in enumerate((2, 4, 30), 1):
        change(results / "test" / f"adamw-{seed}.json", test_perplexity=perplexity)
    assert frames.bars(read(results), ("test_perplexity",))["low"][0] == 1.0


def test_a_study_without_a_test_has_no_perplexity(results):
    plan = results / "configs" / "study.json"
    change(plan, metric="val_loss")
    for path in (results / "test").glob("*.json"):
        path.unlink()
    study = read(results)
    assert natural(study) == "val_loss" and "test_perplexity" not in figures.every(study)
    assert memory_tables(study)[0][1][0][5] == "validation loss (nats/token)"


@pytest.mark.parametrize(("measured", "result"), [(3.0, "pass"), (4.0, "fail"), (None, "fail: not measured")])
def test_the_memory_of_an_optimizer_can_be_a_criterion(tmp_path, measured, result):
    wanted = {"run": "sgd", "measure": "optimizer_memory_multiple", "at_most": 3.25}
    plan = {"study": "s", "question": "q", "baseline": "adamw", "metric": "test_loss", "seeds": [1]}
    plan |= {"runs": {"adamw": {}, "sgd": {}}, "axis": "tokens", "frozen": [], "scaling": {}, "to_beat": {}}
    assert study_problems(plan | {"criteria": [wanted]}, "wikitext2") == []
    results = write_study(tmp_path, criteria=[wanted])
    for seed in (1, 2, 3):
        change(results / f"sgd-{seed}" / "metrics.json", optimizer_memory_multiple=measured)
    [one] = criteria.criteria(read(results))
    assert (one.result, one.bound, one.metric.label) == (result, "≤ 3.25 × weights", "optimizer memory")
