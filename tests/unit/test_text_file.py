"""One text cut by position: its parts are the text, their windows share no character, and there may be no test."""

import json
import sys

import fake_results
import numpy as np
import pytest
from engine_runs import ledger, prose

from engine import evaluate
from engine.data import textfile
from engine.data.batches import TrainOrder, eval_batches
from engine.data.prepare import open_tokens, prepare
from engine.errors import ConfigError
from metrics import frames, rows, summary
from plots import tables
from stages import plan

UNIQUE = "".join(chr(0x4E00 + i) for i in range(1000))  # no character twice: sharing one means overlapping


@pytest.mark.parametrize(("validation", "test", "sizes"), [(10, 0, [900, 100, 0]), (5, 5, [900, 50, 50])])
def test_the_parts_are_the_text_and_share_no_character(validation, test, sizes):
    parts = textfile.by_position(UNIQUE, validation, test)
    assert [len(parts[s]) for s in ("train", "validation", "test")] == sizes
    assert parts["train"] + parts["validation"] + parts["test"] == UNIQUE


@pytest.mark.parametrize("stride", [0, 3])
def test_no_validation_window_shares_a_character_with_a_training_window(stride):
    """Each token is its position in the text; every training window of three epochs, every window of validation."""
    parts = textfile.by_position(UNIQUE, 10, 0)
    cut, context = len(parts["train"]), 16
    positions = np.arange(len(UNIQUE))
    order = TrainOrder(positions[:cut], context, 4, seed=1)
    ids = np.arange(3 * order.samples_per_epoch)
    inputs, targets = order.batch(ids)
    trained = set(inputs.ravel()) | set(targets.ravel())
    scored = set()
    for x, y in eval_batches(positions[cut:], context, 4, stride=stride):
        scored |= set(x[y != -100].tolist()) | set(y[y != -100].tolist())
    assert scored == set(range(cut, len(UNIQUE)))
    assert not trained & scored and max(trained) < cut


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ConfigError, match="1 characters are too few: no text is left for train"):
        textfile.by_position("1", 10, 0)
    with pytest.raises(ConfigError, match="no text is left for train, validation, test"):
        textfile.by_position("", 10, 5)


def text_file(lab) -> str:
    path = lab.directory / "play.txt"
    path.write_text(prose(7, 700)[:2520], encoding="utf-8")
    return str(path)


def settings_of(lab, **changes) -> dict:
    return {
        "dataset": "text_file",
        "data_dir": "",
        "data_file": text_file(lab),
        "tokenizer": "chars",
        "validation_percent": 10,
        "test_percent": 0,
        **changes,
    }


def test_the_file_must_be_named_and_there(lab):
    with pytest.raises(ConfigError, match=r"-S data_file=FILE"):
        prepare(lab.config(**settings_of(lab, data_file="")).data, "tokens/a")
    with pytest.raises(ConfigError, match=r"data_file = .nowhere.txt.: no such file"):
        prepare(lab.config(**settings_of(lab, data_file="nowhere.txt")).data, "tokens/a")


def test_without_a_test_there_are_no_test_tokens_and_the_run_says_so(lab, monkeypatch):
    run = lab.train(**settings_of(lab))
    meta = open_tokens(lab.config(**settings_of(lab)).tokens_directory).meta
    assert [meta["splits"][s]["tokens"] for s in ("train", "validation", "test")] == [2268, 252, 0]
    assert all(line["agrees"] for line in ledger(run).values())
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run), "test", "test.json"])
    evaluate.main()
    said = json.loads((lab.directory / "test.json").read_text())
    assert said["reason"] == "there is no test text" and "test_loss" not in said
    assert said["config_sha256"] == json.loads((run / "metrics.json").read_text())["config_sha256"]
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run), "validation", "validation.json"])
    evaluate.main()
    scored = json.loads((lab.directory / "validation.json").read_text())
    assert scored["validation_loss"] == json.loads((run / "metrics.json").read_text())["val_loss"]


def test_tokens_made_before_a_setting_existed_are_as_its_default_makes_them(lab):
    lab.train()
    meta = lab.directory / lab.config().tokens_directory / "meta.json"
    content = json.loads(meta.read_text())
    for name in ("data_file", "validation_percent", "test_percent"):
        del content["settings"][name]
    meta.write_text(json.dumps(content))
    assert open_tokens(meta.parent, lab.config().data).meta["dataset"] == "text"


def test_a_study_is_not_judged_by_a_test_that_there_is_not():
    study = {
        "study": "s",
        "question": "q",
        "baseline": "a",
        "metric": "test_loss",
        "seeds": [1],
        "runs": {"a": {}},
    }
    base = {"dataset": "text_file", "data_file": "x", "test_percent": 0}
    message = r"metric = 'test_loss': there is no test with test_percent = 0; set metric = 'val_loss'"
    with pytest.raises(ConfigError, match=message):
        plan.resolve_study(study | base)
    assert plan.resolve_study(study | base | {"metric": "val_loss"})[0]["metric"] == "val_loss"


def test_a_study_without_a_test_is_judged_by_its_validation(tmp_path):
    results = fake_results.write_study(tmp_path, metric="val_loss")
    for path in (results / "test").iterdir():
        path.write_text(json.dumps({"split": "test", "reason": "there is no test text"}))
    study = summary.summarize(rows.read(results))
    assert all(one.test == {} for one in study.results.runs)
    assert next(run for run in study.runs if run.run == "sgd").status == "worse"
    text = tables.markdown(study)
    assert "validation loss" in text and "test loss" not in text
    assert "test_loss" not in frames.table_frame(study).columns
