"""Runs beside chance and a TF-IDF ranker of the same candidates."""

import json

import pytest
from fake_classifier import classifier_study
from fake_results import write_json

from metrics import rows, summary
from metrics.ranking import ranking
from plots import outcome_tables, tables
from stages import summarize

COLUMNS = "val_lm_loss,val_mc_loss,eval_train_loss,eval_train_accuracy"
SEEDS = (1, 2, 3)
RUNS = {"small_1": {}, "large_1": {"width": 256}}


@pytest.fixture
def results(tmp_path):
    results = classifier_study(tmp_path, runs=RUNS, scaling={}, criteria=[])
    for run in RUNS:
        for seed in SEEDS:
            scored(results, run, seed, candidates=8, chance_accuracy=0.125, tfidf_accuracy=0.6)
    return results


def scored(results, run, seed, **values):
    path = results / "test" / f"{run}-{seed}.json"
    write_json(path, json.loads(path.read_text()) | values)


def read(results):
    return summary.summarize(rows.read(results))


def test_chance_the_ranker_and_each_run_by_hand(results):
    """Wilson's interval of 4,560 of 7,600: centre (p + z²/2n) / (1 + z²/n), half z √(pq/n + z²/4n²) / (1 + z²/n)."""
    frame = ranking(read(results))
    assert frame["chooser"].to_list() == ["chance", "TF-IDF ranker", "small_1", "large_1"]
    assert frame["accuracy"].to_list() == pytest.approx([0.125, 0.6, 0.912, 0.921])
    assert frame["low"].to_list()[:2] == [None, pytest.approx(0.588938, abs=1e-6)]
    assert frame["high"].to_list()[:2] == [None, pytest.approx(0.610961, abs=1e-6)]
    assert frame["examples"].to_list() == [7600] * 4


def test_the_table_in_words_and_its_file(results, tmp_path):
    [(caption, (heads, cells))] = outcome_tables.ranking_tables(read(results))
    assert caption.startswith("Choosing the true one of 8 replies, 7,600 times")
    assert heads == ["chooser", "accuracy (%)", "binomial interval (%)", "× chance"]
    assert cells[:3] == [
        ["chance", "12.50", "–", "1.00"],
        ["TF-IDF ranker", "60.00", "58.89–61.10", "4.80"],
        ["small_1", "91.20", "90.54–91.82", "7.30"],
    ]
    assert caption in tables.markdown(read(results))
    (tmp_path / "reports").mkdir()
    summarize.write_tables(tmp_path / "reports", read(results))
    assert (tmp_path / "reports" / "choices.csv").read_text().startswith("chooser,candidates,accuracy")


def test_hits_among_more_are_beside_it_where_every_seed_has_them(results):
    """1,140 of 7,600 are hits of the ranker; of small_1 half in the mean; large_1 has a seed without."""
    for run in RUNS:
        for seed, hits in zip(SEEDS, (0.4, 0.5, 0.6), strict=True):
            scored(results, run, seed, hits_candidates=20, hits_at_1=hits, tfidf_hits_at_1=0.15)
    path = results / "test" / "large_1-2.json"
    write_json(path, {k: v for k, v in json.loads(path.read_text()).items() if k != "hits_at_1"})
    frame = ranking(read(results))
    assert frame["hits_at_1"].to_list() == [0.05, 0.15, pytest.approx(0.5), None]
    assert frame["hits_low"].to_list()[:3] == [
        None,
        pytest.approx(0.142149, abs=1e-6),
        pytest.approx(0.488762, abs=1e-6),
    ]
    [(_, (heads, cells))] = outcome_tables.ranking_tables(read(results))
    assert heads[4:] == ["hits@1 among 20 (%)", "binomial interval (%)"]
    assert [row[4:] for row in cells] == [
        ["5.000", "–"],
        ["15.00", "14.21–15.82"],
        ["50.00", "48.88–51.12"],
        ["–", "–"],
    ]


def test_a_run_that_was_scored_otherwise_is_not_beside_the_others(results):
    for seed in SEEDS:
        scored(results, "large_1", seed, evaluation_sha256="0" * 64)
        path = results / f"large_1-{seed}" / "metrics.json"
        write_json(path, json.loads(path.read_text()) | {"evaluation_sha256": "0" * 64})
    assert ranking(read(results))["chooser"].to_list() == ["chance", "TF-IDF ranker", "small_1"]


def test_a_study_without_candidates_has_no_such_table(tmp_path):
    found = read(classifier_study(tmp_path))
    assert ranking(found).is_empty() and outcome_tables.ranking_tables(found) == []


def test_both_parts_of_the_loss_are_in_the_tables(results):
    for seed in SEEDS:
        scored(results, "small_1", seed, test_reply_perplexity=20.0, test_lm_loss=3.0, test_mc_loss=0.5)
        path = results / f"small_1-{seed}" / "evals.csv"
        head, *lines = path.read_text().splitlines()
        parts = [f"{line},3.{n},0.{n},1.{n},0.{n}" for n, line in enumerate(lines, start=4)]
        path.write_text("\n".join([f"{head},{COLUMNS}", *parts]))
    found = read(results)
    heads, cells = tables.quality_table(found)
    assert (heads[-1], cells[0][-1], cells[1][-1]) == ("test perplexity of replies", "20.00", "–")
    heads, cells = tables.quality_table(found, full=True)
    at = [heads.index(name) for name in ("test loss of replies", "test loss of choices")]
    assert [cells[0][i] for i in at] == ["3.000 ± 0", "0.5000 ± 0"]
    course = outcome_tables.epoch_tables(found)
    heads, cells = course["small_1"]
    assert heads[-5:-3] == ["validation loss of replies", "validation loss of choices"]
    assert heads[-3:] == ["loss of training rows, as validation's", "accuracy of training rows (%)", "best"]
    assert [row[-5:-1] for row in cells[:2]] == [
        ["3.400", "0.4000", "1.400", "40.00"],
        ["3.500", "0.5000", "1.500", "50.00"],
    ]
    assert "validation loss of replies" not in course["large_1"][0]  # a run without them
