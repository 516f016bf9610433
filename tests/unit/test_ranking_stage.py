"""What the eval stage adds of dialogues: texts as they were encoded, and the share that the ranker gets, by hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import finished_run
import numpy as np
import pytest

from engine import children
from engine.data.choices import Choices
from engine.data.dialogue_tokens import Encoder
from engine.data.prepare import load_tokenizer, open_tokens, prepare
from engine.data.tokenizers import Chars
from engine.rundir import toml, write_json
from stages import eval as command
from stages import ranking

ANIMALS = ["owls", "cats", "dogs", "bears", "wolves", "birds", "fish", "snakes", "mice", "horses"]
SETTINGS = {
    "dataset": "dialogues",
    "data_dir": "dialogues",
    "model": "double_heads",
    "tokenizer": "chars",
    "candidates": 3,
    "max_reply_tokens": 24,
    "length_percentile": 100.0,
    "context": 120,
}


def dialogue(animal: str, reply: str) -> dict:
    turns = ["hello", "hi", "and you?", reply]
    return {"persona": [f"i am the friend of {animal}.", "i sing."], "turns": turns}


@pytest.fixture
def config(lab):
    """Tokens of ten training dialogues, and three in the test whose last replies only the persona tells apart."""
    home = lab.directory / "dialogues"
    home.mkdir()
    test = [
        dialogue("lions", "lions"),
        dialogue("tigers", "a tiger and tigers"),
        dialogue("hens", "hello idea"),
    ]
    files = {
        "train": [dialogue(f"old {a}", f"my {a}") for a in ANIMALS],
        "valid": [dialogue(f"young {a}", f"your {a}") for a in ANIMALS],
        "test": test,
    }
    for name, rows in files.items():
        (home / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = finished_run.config(**SETTINGS)
    prepare(config.data, config.tokens_directory)
    return config


def scored(config, tokens=None) -> dict:
    """What engine.evaluate and engine.hits leave of the test."""
    rows = open_tokens(tokens or config.tokens_directory).test
    return {"split": "test", "test_accuracy": 0.5, "evaluation_sha256": rows.sha256()}


def test_rows_are_the_texts_that_were_encoded(config):
    tokens = open_tokens(config.tokens_directory)
    texts = ranking.Texts(load_tokenizer(config.tokens_directory), tokens.meta["specials"])
    found = list(texts.rows(tokens.test))
    assert len(found) == 6
    context, candidates, gold = found[3]
    assert context == ["i am the friend of tigers. i sing.", "hello", "hi", "and you?"]
    assert candidates[gold] == "a tiger and tigers" and len(set(candidates)) == 3
    assert found[0][0] == ["i am the friend of lions. i sing.", "hello"] and found[0][1][found[0][2]] == "hi"
    assert set(texts.utterances(tokens.train)) == {"hello", "hi", "and you?", *(f"my {a}" for a in ANIMALS)}


def test_utterances_are_turns_and_true_replies_once_each():
    """a to e are 0 to 4, the specials 5 to 9: persona a; b and c said; d is true, e wrong. Then a; b said, d true."""
    parts = [[5, 0, 8, 1, 9, 2], [9, 4, 6], [9, 3, 6], [5, 0, 8, 1], [9, 3, 6], [9, 4, 6]]
    tokens = np.concatenate(parts).astype(np.uint16)
    ends = np.cumsum([len(part) for part in parts])
    rows = Choices(tokens, tokens, ends, *[np.array([1, 0])] * 3, pad=7)
    encoder = Encoder(Chars("abcd"))  # and what is none of them
    assert encoder.ids["bos"] == 5
    texts = ranking.Texts(encoder.tokenizer, encoder.ids)
    assert texts.utterances(rows) == ["b", "c", "d"]
    assert next(texts.rows(rows)) == (["a", "b", "c"], ["\ufffd", "d"], 1)


def test_the_rankers_share_by_hand(config):
    """The first reply of each is "hi", which shares nothing with "hello". Beside it stand the replies of the other
    two dialogues: twice "hello idea", which does, then neither: 0, 0 and a third.

    Of the others lions and tigers are named by their personas alone: 1 each. "hello idea" shares nothing with its
    last two turns, and "a tiger and tigers" beside it does with "and you?": 0.
    """
    output = config.directory / "out.json"
    config.directory.mkdir(parents=True)
    write_json(output, scored(config))
    (config.directory / "config.toml").write_text(toml(config), encoding="utf-8")
    ranking.add(config.directory, output)
    found = json.loads(output.read_text())
    assert found["test_accuracy"] == 0.5 and found["candidates"] == 3
    assert found["chance_accuracy"] == pytest.approx(1 / 3)
    assert found["tfidf_accuracy"] == pytest.approx((0 + 0 + 1 / 3 + 1 + 1 + 0) / 6)


def test_nothing_is_added_where_nothing_was_scored_or_chosen(config):
    config.directory.mkdir(parents=True)
    output = config.directory / "out.json"
    for one, values in ((config, {"reason": "diverged"}), (finished_run.config(), {"test_loss": 2.0})):
        (config.directory / "config.toml").write_text(toml(one), encoding="utf-8")
        write_json(output, values)
        ranking.add(config.directory, output)
        assert json.loads(output.read_text()) == values


@pytest.mark.parametrize("code", [0, 3])
def test_the_stage_adds_it_behind_the_engines_own_figures(config, monkeypatch, code):
    """And ends as the engine does where that fails, with nothing added."""
    config.directory.mkdir(parents=True)
    (config.directory / "config.toml").write_text(toml(config), encoding="utf-8")
    output = config.directory / "out.json"

    class Engine:
        def __init__(self, given):
            write_json(output, scored(config) | {"given": given[1:]})

        def wait(self):
            return code

    monkeypatch.setattr(children, "start", Engine)
    monkeypatch.setattr(sys, "argv", ["eval", str(config.directory), str(output)])
    if code:
        with pytest.raises(SystemExit, match="3"):
            command.main()
    else:
        command.main()
    found = json.loads(output.read_text())
    assert found["given"] == ["-m", "engine.evaluate", str(config.directory), "test", str(output)]
    assert ("tfidf_accuracy" in found) == (code == 0)


def test_the_stage_scores_among_more_candidates_where_that_is_asked_for(config, monkeypatch):
    """The tokens are those that engine.hits left beside the run's; of them the ranker finds a share of its own."""
    asked = replace(config, evaluation=replace(config.evaluation, hits_candidates=4))
    config.directory.mkdir(parents=True)
    (config.directory / "config.toml").write_text(toml(asked), encoding="utf-8")
    test = config.directory.parents[2] / "dialogues" / "test.jsonl"
    test.write_text(f"{test.read_text()}\n{json.dumps(dialogue('ants', 'they sing'))}")
    among = config.tokens_directory.with_name(f"{config.run.study}_among_4")
    prepare(config.data, config.tokens_directory)
    prepare(replace(config.data, candidates=4), among)
    output, calls = config.directory / "out.json", []

    class Engine:
        def __init__(self, given):
            calls.append(given[2:-1])
            more = given[2] == "engine.hits"
            found = scored(config, among if more else None) | (
                {"candidates": 4, "hits_at_1": 0.25} if more else {}
            )
            write_json(Path(given[-1]), found)

        def wait(self):
            return 0

    monkeypatch.setattr(children, "start", Engine)
    monkeypatch.setattr(sys, "argv", ["eval", str(config.directory), str(output)])
    command.main()
    run = str(config.directory)
    assert calls == [["engine.evaluate", run, "test"], ["engine.hits", run, "--output"]]
    found, more = json.loads(output.read_text()), config.directory / "more.json"
    write_json(more, scored(config, among))
    ranking.add(config.directory, more, among)
    assert (found["candidates"], found["hits_candidates"], found["hits_at_1"]) == (3, 4, 0.25)
    assert (
        found["tfidf_hits_at_1"] == json.loads(more.read_text())["tfidf_accuracy"] != found["tfidf_accuracy"]
    )


def test_the_command_ranks_what_was_scored_among_more_candidates(config, monkeypatch, capsys):
    """Tokens of the same files, with a fourth dialogue in the test so that there are enough replies to draw from."""
    config.directory.mkdir(parents=True)
    (config.directory / "config.toml").write_text(toml(config), encoding="utf-8")
    more, output = config.tokens_directory.with_name("more"), config.directory / "hits.json"
    test = config.directory.parents[2] / "dialogues" / "test.jsonl"
    test.write_text(f"{test.read_text()}\n{json.dumps(dialogue('ants', 'they sing'))}")
    prepare(replace(config.data, candidates=4), more)
    write_json(output, scored(config, more))
    monkeypatch.setattr(sys, "argv", ["ranking", *map(str, (config.directory, output, more))])
    ranking.main()
    found = json.loads(output.read_text())
    assert (found["candidates"], found["chance_accuracy"]) == (4, 0.25)
    write_json(output, scored(config))
    with pytest.raises(SystemExit, match="2"):
        ranking.main()
    assert "what was scored is not the test split of" in capsys.readouterr().err


def test_the_command_says_what_it_wants(capsys):
    with pytest.raises(SystemExit, match="0"):
        ranking.main(["--help"])
    assert "directory of the token files that were scored" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        ranking.main(["run"])
    assert "the following arguments are required: hits, tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "no such file; engine.hits writes it: --output FILE"),
        ("{", "not valid JSON: Expecting property name"),
        ("[1]", "is a list, and not what engine.hits leaves"),
        ('{"split": "tset", "evaluation_sha256": "x"}', "it does not say what was scored"),
        ('{"split": "test"}', "it does not say what was scored"),
        ('{"split": "test", "reason": "the loss is not finite"}', "the loss is not finite"),
    ],
)
def test_a_file_that_holds_no_scores_is_named(config, capsys, text, problem):
    config.directory.mkdir(parents=True)
    (config.directory / "config.toml").write_text(toml(config), encoding="utf-8")
    output = config.directory / "hits.json"
    if text is not None:
        output.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        ranking.main([str(config.directory), str(output), str(config.tokens_directory)])
    said = capsys.readouterr().err
    assert said.startswith("error: 1 problem in ") and problem in said
    assert (output.read_text() if text else None) == text  # as it was


def test_tokens_or_a_run_that_are_not_of_dialogues_are_named(config, lab, capsys):
    other = finished_run.config()
    prepare(lab.config().data, "tokens/text")
    config.directory.mkdir(parents=True)
    output = config.directory / "hits.json"
    write_json(output, scored(config))
    for settings, tokens, problem in (
        (config, "tokens/text", "tokens that are not of dialogues"),
        (other, "tokens/text", "the run is not on dialogues"),
        (config, "tokens/nowhere", "no tokens in tokens/nowhere"),
    ):
        (config.directory / "config.toml").write_text(toml(settings), encoding="utf-8")
        with pytest.raises(SystemExit, match="2"):
            ranking.main([str(config.directory), str(output), tokens])
        assert problem in capsys.readouterr().err
