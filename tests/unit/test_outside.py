"""A figure from outside that a study sets out to beat: each run's distance to it by hand, or why none is told."""

import json

import pytest
from fake_classifier import classifier_study
from fake_results import write_json, write_run, write_study

from metrics import findings, rows, summary
from metrics.outside import outside, sentence
from plots import report, tables
from plots.outcome_tables import outside_tables
from stages.study import study_problems

LOSSES = {"adamw": (2.1, 2.2, 2.3), "adamw-checkpointing": (2.1, 2.2, 2.3), "sgd": (1.9, 1.9, 1.9)}
TO_BEAT = {"measure": "test_loss", "value": 2.0, "says": "a published model of the same words"}


def read(results):
    return summary.summarize(rows.read(results))


@pytest.fixture
def results(tmp_path):
    return of(tmp_path, TO_BEAT)


def of(tmp_path, to_beat, losses=LOSSES):
    found = write_study(tmp_path, to_beat=to_beat)
    for run, values in losses.items():
        for seed, loss in enumerate(values, 1):
            write_run(found, run, seed, test_loss=loss)
    return found


def test_each_run_is_held_to_the_figure_by_hand(results):
    """adamw: mean 2.2, deviation 0.1, t = 0.2 √3 / 0.1 = √12, 2 degrees: p = 1 − √(12 / 14), which Holm doubles."""
    ((caption, (heads, cells)),) = outside_tables(read(results))
    assert caption.startswith("To beat: test loss 2 nats/token, a published model of the same words; 95 %")
    assert heads == ["run", "test loss (nats/token)", "difference", "p", "verdict"]
    half = 4.302653 * 0.1 / 3**0.5
    assert f"{2 * (1 - (12 / 14) ** 0.5):.4f}" == "0.1484"
    assert cells[:2] == [
        [run, f"2.20 ± {half:.2f}", f"+0.20 ± {half:.2f}", "0.1484", "inconclusive"]
        for run in ("adamw", "adamw-checkpointing")
    ]
    assert cells[2][0] == "sgd" and cells[2][2:] == ["-0.1000 ± 0", "< 0.0001", "better"]


def test_the_line_names_the_best_and_its_distance(results):
    study = read(results)
    said = (
        "Figure to beat: test loss 2 nats/token (a published model of the same words). Best here: sgd, 1.900 ± 0, "
        "which is -0.1000 ± 0 nats/token; better."
    )
    assert [one for one in findings.findings(study) if one.text == said and one.runs == ("sgd",)]
    assert said in tables.markdown(study) and "To beat: test loss 2 nats/token" in tables.markdown(study)
    assert "<h2>To beat</h2>" in report.html(study)


def test_what_is_not_comparable_has_no_distance(tmp_path):
    study = read(of(tmp_path, TO_BEAT | {"not_comparable": "it is of other words"}))
    found = outside(study)
    assert (found.best, found.comparisons, outside_tables(study)) == ("sgd", {}, [])
    assert sentence(found).endswith("Best here: sgd, 1.900 ± 0: not comparable: it is of other words.")
    assert "<h2>To beat</h2>" not in report.html(study)


def test_one_seed_has_a_distance_and_no_verdict(tmp_path):
    results = write_study(tmp_path, seeds=(1,), to_beat=TO_BEAT)
    for run in LOSSES:
        write_run(results, run, 1, test_loss=2.5)
    assert sentence(outside(read(results))).endswith(
        "which is +0.5000 nats/token; one seed gives no verdict."
    )


def test_runs_that_are_not_ranked_are_not_held_to_it(results):
    for seed in (1, 2, 3):
        path = results / f"sgd-{seed}" / "metrics.json"
        write_json(path, json.loads(path.read_text()) | {"tokens": 7})
    found = outside(read(results))
    assert found.best == "adamw" and list(found.comparisons) == ["adamw", "adamw-checkpointing"]


def test_a_share_is_shown_in_percent_and_more_of_it_is_better(tmp_path):
    said = {"measure": "test_accuracy", "value": 0.905, "says": "a published classifier"}
    study = read(classifier_study(tmp_path, to_beat=said))
    found = outside(study)
    assert found.figure == "test accuracy 90.5 %" and found.best == "large_1"  # 0.921 of seed 2 is the most
    ((_, (heads, cells)),) = outside_tables(study)
    assert heads[1] == "test accuracy (%)" and cells[0][1].startswith("91.20 ± ")
    assert cells[0][2].startswith("+0.70 ± ") and "percentage points; better" in sentence(found)


def test_a_study_without_the_figure_says_nothing_of_it(tmp_path):
    study = read(write_study(tmp_path))
    assert outside(study) is None and outside_tables(study) == []
    said = {"measure": "test_lm_loss", "value": 3.0, "says": "a chatbot"}
    assert sentence(outside(read(write_study(tmp_path / "other", to_beat=said)))) == (
        "Figure to beat: test loss of replies 3 nats/reply token (a chatbot): no run here has one that is comparable."
    )


PLAN = {
    "study": "s",
    "question": "q",
    "baseline": "a",
    "metric": "test_loss",
    "seeds": [1],
    "runs": {"a": {}},
}
PLAN |= {"axis": "tokens", "frozen": [], "scaling": {}, "criteria": []}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"measure": "test_perplexty"}, "to_beat.measure = 'test_perplexty': must be one of test_loss, "),
        ({"measure": "test_perplexty"}, "(nearest: test_perplexity)"),
        ({"measure": "speedup"}, "to_beat.measure = 'speedup': must be one of test_loss, "),
        (
            {"measure": "test_accuracy", "value": 0.9},
            "to_beat.measure = 'test_accuracy': runs on text have none",
        ),
        ({"value": "42.82"}, "to_beat.value = '42.82': must be a number above 0"),
        ({"value": 0}, "to_beat.value = 0: must be a number above 0"),
        ({"measure": "sparsity", "value": 50}, "must be a share from 0 to 1 (0.5 for 50 %)"),
        ({"says": ""}, "to_beat.says = '': must be text that says whose figure it is, and of what"),
        ({"not_comparable": True}, "to_beat.not_comparable = True: must be text that says why it is not"),
        ({"comparable": False}, "to_beat.comparable: unknown key (nearest: not_comparable)"),
    ],
)
def test_a_mistake_in_the_declaration_is_named(changes, problem):
    [said] = study_problems(PLAN | {"to_beat": TO_BEAT | changes}, "wikitext2")
    assert problem in said


def test_a_declaration_has_three_parts():
    assert study_problems(PLAN | {"to_beat": TO_BEAT | {"not_comparable": "other words"}}, "wikitext2") == []
    assert study_problems(PLAN | {"to_beat": {"value": 2.0}}, "wikitext2") == ["to_beat: lacks measure, says"]
    assert study_problems(PLAN | {"to_beat": 42.82}, "wikitext2") == [
        "to_beat = 42.82: must be a mapping with measure, value, says"
    ]
