"""One study's rows on two machines: which seeds are compared, what came again, and what is said of it."""

import json
import sys
from pathlib import Path

import pytest
from fake_results import write_json, write_run, write_study

from metrics import rows
from metrics.beside import beside
from metrics.rows import ResultsError
from plots.beside import sentences, tables
from stages.beside import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def both(tmp_path):
    """Three seeds; and two, with SGD far better in the second, its seed 2 alone, and a run that is new there."""
    first = write_study(tmp_path / "a")
    runs = json.loads((first / "configs/study.json").read_text())["runs"] | {"late": {}}
    second = write_study(tmp_path / "b", seeds=(1, 2), runs=runs)
    write_run(second, "sgd", 1, test_loss=1.5)
    write_run(second, "sgd", 2, test_loss=1.5)
    return first, second


def compared(both):
    return beside(*map(rows.read, both))


def test_both_sides_have_the_seeds_that_both_finished(both):
    found = compared(both)
    assert {pair.run: pair.seeds for pair in found.pairs} == {
        run: (1, 2) for run in ("adamw", "adamw-checkpointing", "sgd", "late")
    }
    assert [pair.first.complete_seeds for pair in found.both] == [(1, 2)] * 3
    (late,) = (pair for pair in found.pairs if pair.run == "late")
    assert late.first is None and late.distances == {}


def test_distances_are_of_each_seed_and_the_largest_is_named(both):
    """SGD's two figures by hand: 2.61 + 0.02 sin s + 0.01 cos 3s in the first, 1.5 in the second."""
    found = compared(both)
    (sgd,) = (pair for pair in found.pairs if pair.run == "sgd")
    assert sgd.distances == pytest.approx({1: 1.116929, 2: 1.137788}, abs=1e-5)
    assert found.furthest == (sgd.distances[2], "sgd", 2)
    assert found.typical == 0  # four of six are 0


def test_a_verdict_that_did_not_come_again_is_named(both):
    said = sentences(compared(both))
    assert said[0] == "3 runs on both sides, with the same seeds; 2 have the same verdict"
    assert said[1] == "sgd: worse in the first, better in the second"
    assert said[2].endswith("0 nats/token apart in the median, and at most 1.1 nats/token (sgd, seed 2)")
    assert len(said) == 3


def test_the_same_rows_are_the_same(both):
    said = sentences(compared((both[0], both[0])))
    assert said == [
        "3 runs on both sides, with the same seeds; 3 have the same verdict",
        "the two figures of each seed are the same",
    ]


def test_the_tables_have_a_column_a_side(both):
    outcome, against, cost = (table for _, table in tables(compared(both)))
    rows_of = {row[0]: row for row in outcome[1]}
    assert rows_of["late"][2:] == ["–", rows_of["adamw"][3], "–", "–", "identical"]
    assert rows_of["sgd"][3] == "1.500" and rows_of["sgd"][5:] == ["worse", "better"]
    assert [len(heads) for heads, _ in (outcome, against, cost)] == [7, 5, 5]


def test_settings_data_and_test_rows_that_differ_are_said(both):
    first, second = both
    config = second / "adamw-1/config.toml"
    config.write_text(config.read_text().replace("batch_size = 32", "batch_size = 64"))
    new = second / "sgd-1/config.toml"
    new.write_text(new.read_text() + "epochs = 0.0\n")
    scores = second / "test/sgd-2.json"
    write_json(scores, json.loads(scores.read_text()) | {"evaluation_sha256": "f" * 64})
    for side, digest in ((first, "a"), (second, "b")):
        metrics = side / "adamw-2/metrics.json"
        write_json(metrics, json.loads(metrics.read_text()) | {"train_sha256": digest * 64})
    assert sentences(compared(both))[-4:] == [
        "adamw: batch_size 32 in the first, 64 in the second",
        "adamw: was trained on other tokens (sha256 bbbbbbbbbbbb) than the first (aaaaaaaaaaaa)",
        "sgd: was scored on other test tokens or windows than the first",
        "settings that only one side's rows name: epochs",
    ]


def test_rows_of_two_studies_are_refused(both, tmp_path):
    other = write_study(tmp_path / "c", metric="val_loss")
    with pytest.raises(
        ResultsError, match="different studies: metric 'test_loss' in the first, 'val_loss' in the s"
    ):
        compared((both[0], other))


def test_without_a_common_seed_there_is_nothing_to_compare(both, tmp_path):
    with pytest.raises(ResultsError, match="no run and seed with the study's metric is finished in both"):
        compared((both[0], write_study(tmp_path / "d", seeds=(7,))))


def test_a_directory_without_results_is_one_message(both, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["beside", str(both[0]), "nowhere"])
    with pytest.raises(SystemExit, match="^2$"):
        main()
    assert "configs/study.json is missing: there are no results here yet" in capsys.readouterr().err


@pytest.mark.parametrize("study", ["gpt2", "persona-best"])
def test_what_records_keep_of_two_machines_is_what_is_printed(monkeypatch, capsys, study):
    monkeypatch.chdir(ROOT)
    sides = [f"records/{study}-{machine}/results" for machine in ("h200", "h100")]
    monkeypatch.setattr(sys, "argv", ["beside", *sides])
    main()
    kept = ROOT / f"records/{study}-h100/beside.txt"
    assert capsys.readouterr().out == kept.read_text(encoding="utf-8")
