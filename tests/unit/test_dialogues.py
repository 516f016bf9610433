"""Dialogues as rows of tokens, by hand: specials, speakers, labels, who is left out, and what is drawn."""

import json
from dataclasses import replace

import numpy as np
import pytest
from engine_runs import dialogues as made_up
from engine_runs import write_dialogues

from engine.config import Data
from engine.data import dialogue_files, personachat
from engine.data.choices import ChoiceOrder, Choices, eval_batches
from engine.data.dialogue_rows import rows
from engine.data.dialogue_tokens import Encoder
from engine.data.dialogues import Dialogue, Source, persona_key, split
from engine.data.prepare import open_tokens, prepare
from engine.data.tokenizers import Bytes
from engine.errors import ConfigError

BOS, EOS, PAD, USER, BOT = 256, 257, 258, 259, 260  # behind the 256 bytes
CATS = Dialogue(("i like cats .", "me !"), ("hi", "hello", "cats ?", "yes !"))
SETTINGS = Data(
    dataset="dialogues", data_dir="dialogues", candidates=2, max_reply_tokens=8, length_percentile=100.0
)


def ids(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture
def directory(tmp_path):
    return write_dialogues(tmp_path / "dialogues")


def made(directory, **changes):
    """Tokens of the dialogues in `directory`."""
    settings = replace(SETTINGS, data_dir=str(directory), max_reply_tokens=32, **changes)
    prepare(settings, directory.parent / "tokens")
    return open_tokens(directory.parent / "tokens", settings, verify=True)


# --- a dialogue by hand


def test_the_context_and_a_reply_by_hand():
    encoder = Encoder(Bytes())
    assert encoder.vocabulary_size == 261
    tokens, types = encoder.context(CATS.persona, CATS.turns[:3])
    persona = [BOS, *ids("i like cats . me !")]
    assert tokens == [*persona, USER, *ids("hi"), BOT, *ids("hello"), USER, *ids("cats ?")]
    assert types == [BOT] * len(persona) + [USER] * 3 + [BOT] * 6 + [USER] * 7
    assert encoder.reply("yes !") == ([BOT, *ids("yes !"), EOS], [BOT] * 7)


def test_speakers_stay_who_they_are_where_the_oldest_turn_is_left_out():
    tokens, types = Encoder(Bytes()).context(("a",), ("ho", "cats ?"))
    assert tokens == [BOS, *ids("a"), BOT, *ids("ho"), USER, *ids("cats ?")]
    assert types == [BOT] * 5 + [USER] * 7


def two(*numbers: int) -> list[np.ndarray]:
    return [np.array(numbers, np.int32)]


def choices() -> Choices:
    """Two rows of two candidates: contexts of 3 and 2 tokens; 9 ends a reply."""
    parts = [[1, 2, 3], [5, 9], [5, 6, 7, 9], [1, 4], [5, 8, 9], [5, 9]]
    tokens = np.array([i for part in parts for i in part], np.uint16)
    return Choices(
        tokens, tokens + 20, np.cumsum([len(p) for p in parts]), *two(1, 0), *two(0, 1), *two(0, 1), pad=0
    )


def test_inputs_targets_and_padding_by_hand():
    inputs, targets = choices().gather(np.array([0, 1]), context=5, reply=4)
    assert inputs.shape == (2, 2, 4, 4) and inputs.dtype == targets.dtype == np.int64
    assert inputs[0, 0].tolist() == [[1, 2, 3, 0], [0] * 4, [5, 9, 0, 0], [5, 6, 7, 9]]
    assert inputs[1, 0].tolist() == [[1, 4, 0, 0], [0] * 4, [5, 8, 9, 0], [5, 9, 0, 0]]
    assert inputs[0, 1].tolist() == [[21, 22, 23, 0], [0] * 4, [25, 29, 0, 0], [25, 26, 27, 29]]
    # The true reply alone has labels: not its speaker, but its end; and nothing follows that.
    assert targets.tolist() == [[1, 6, 7, 9, -100], [0, 8, 9, -100, -100]]


@pytest.mark.parametrize(("batch", "world"), [(1, 1), (2, 1), (3, 1), (1, 2), (4, 2)])
def test_an_evaluation_has_every_row_once_whatever_the_batch(batch, world):
    ranks = [list(eval_batches(choices(), 5, 4, batch, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [target for batches in ranks for _, targets in batches for target in targets.tolist()]
    assert sorted(t for t in seen if t[0] >= 0) == [[0, 8, 9, -100, -100], [1, 6, 7, 9, -100]]
    assert all(t == [-100] * 5 for t in seen if t[0] < 0)


def test_an_epoch_has_every_row_once():
    order = ChoiceOrder(choices(), 5, 4, batch_size=1, seed=1)
    assert sorted(int(order.batch(order.sample_ids(step))[1][0, 0]) for step in (0, 1)) == [0, 1]


# --- candidates


def test_distractors_are_other_replies_and_the_true_one_stands_anywhere():
    people = [Dialogue((f"p {i}",), ("hi", f"reply {i}", "and ?", f"more {i}")) for i in range(30)]
    found = rows(people, count=4)
    assert len(found) == 60
    said = {text for one in people for text in one.turns[1::2]}
    for row, true in zip(found, [t for one in people for t in one.turns[1::2]], strict=True):
        assert row.candidates[row.gold] == true and len(set(row.candidates)) == 4
        assert set(row.candidates) <= said
        own = {f"reply {row.persona[0][2:]}", f"more {row.persona[0][2:]}"}
        assert not own & (set(row.candidates) - {true})  # nothing else from the same dialogue
    counts = np.bincount([row.gold for row in found], minlength=4)
    assert counts.sum() == 60 and counts.min() >= 5


def test_what_is_drawn_hangs_on_no_other_row():
    people = [Dialogue((f"p {i}",), ("hi", f"reply {i % 7}")) for i in range(20)]
    by_row = {row.persona: row for row in rows(people, 3)}
    assert {row.persona: row for row in rows(people[::-1], 3)} == by_row
    assert [by_row[row.persona] for row in rows(people[3:], 3)] == rows(people[3:], 3)


def test_the_files_own_candidates_are_taken_from_the_end():
    one = Dialogue(("p",), ("hi", "yes"), (("a", "b", "c"),))
    [row] = rows([one], count=3)
    assert sorted(row.candidates) == ["b", "c", "yes"] and row.candidates[row.gold] == "yes"
    with pytest.raises(ConfigError, match="candidates = 5: a reply of the data set has 4; set it to that"):
        rows([one], count=5)


def test_too_few_replies_to_draw_from_are_told():
    with pytest.raises(
        ConfigError, match="candidates = 2: there are too few different replies in a split of 1"
    ):
        rows([Dialogue(("p",), ("hi", "yes"))], count=2)


# --- splits


def test_no_persona_is_in_two_splits():
    one = Dialogue(("I like cats.", "me !"), ("hi", "hello"))
    test = [Dialogue(("me", "i like cats"), ("so", "what"))]  # the same sentences, written otherwise
    others = [Dialogue((f"p {i}",), ("hi", "hello")) for i in range(10)]
    found = split(
        Source(train=[one, *others, others[0]], test=test), replace(SETTINGS, validation_percent=20)
    )
    assert found.dropped["of a persona in the test set"] == 1
    assert len(found.dialogues["validation"]) in (2, 3) and found.dialogues["test"] == test
    keys = [{persona_key(d) for d in found.dialogues[name]} for name in ("train", "validation", "test")]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert len(found.dialogues["train"]) == 8 and len(set(found.dialogues["train"])) == 8
    given = split(Source(train=[*others], test=test, validation=[others[3], *test]), SETTINGS)
    assert given.dropped["of a persona in the validation set"] == 1
    assert given.dropped["of the validation set, of a persona in the test set"] == 1


def test_long_rows_are_dropped_in_training_and_lose_their_oldest_turns_elsewhere(directory):
    whole, cut = made(directory), made(directory, length_percentile=50.0)
    assert [whole.meta["splits"][s]["rows"] for s in ("train", "validation", "test")] == [120, 21, 15]
    room = cut.meta["context_tokens"]
    lengths = whole.train.lengths()[:, 0]
    assert room == sorted(lengths)[59] and whole.meta["context_tokens"] == lengths.max()
    assert len(cut.train) == (lengths <= room).sum() >= 60
    assert cut.meta["dropped"][f"with more than {room} tokens before the reply"] == 120 - len(cut.train)
    assert len(cut.test) == 15 and cut.test.lengths()[:, 0].max() <= room
    assert cut.meta["shortened"]["test"] == (whole.test.lengths()[:, 0] > room).sum() > 0
    assert np.array_equal(cut.test.lengths()[:, 1:], whole.test.lengths()[:, 1:])


def test_a_reply_that_is_too_long_is_dropped_in_training_and_refused_elsewhere(directory):
    long = [{"persona": ["new"], "turns": ["so", "x" * 40]}]
    path = directory / "train.jsonl"
    path.write_text(path.read_text() + json.dumps(long[0]) + "\n")
    tokens = made(directory)
    assert len(tokens.train) == 120 and tokens.meta["dropped"]["with a reply of more than 32 tokens"] == 1
    (directory / "test.jsonl").write_text("".join(json.dumps(d) + "\n" for d in [*made_up(2, 5), *long]))
    with pytest.raises(
        ConfigError, match="max_reply_tokens = 32: a reply in the test set has 42 with its speaker"
    ):
        made(directory)


def test_training_rows_can_be_fewer(directory):
    tokens = made(directory, max_train_rows=50)
    assert len(tokens.train) == 50 and tokens.meta["dropped"]["not among max_train_rows"] == 70
    # They are chosen among those that are not too long, so that there are as many as were asked for.
    short = made(directory, max_train_rows=50, length_percentile=50.0)
    assert len(short.train) == 50 and short.meta["context_tokens"] < tokens.meta["context_tokens"]
    with pytest.raises(ConfigError, match=r"max_train_rows = 110: \d\d training rows are left"):
        made(directory, max_train_rows=110, length_percentile=50.0)
    with pytest.raises(
        ConfigError, match="max_train_rows = 500: 120 training rows are left; 0 takes them all"
    ):
        made(directory, max_train_rows=500)


def test_tokens_of_other_settings_or_another_version_are_refused(directory, monkeypatch):
    tokens = made(directory)
    asked = replace(SETTINGS, data_dir=str(directory), max_reply_tokens=32, candidates=3)
    with pytest.raises(ConfigError, match="candidates: the tokens were made with 2, this run asks for 3"):
        open_tokens(tokens.directory, asked)
    monkeypatch.setattr(dialogue_files, "VERSION", 7)
    with pytest.raises(
        ConfigError, match="dialogues: the tokens were made with version 2 .* this is version 7"
    ):
        open_tokens(tokens.directory, replace(asked, candidates=2))


# --- files


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"personas": [], "turns": []}', "line 2: lacks 'persona'; it has personas, turns"),
        ('{"persona": ["a"], "turns": ["b"]}', "line 2: turns: has 1, and 2 are needed"),
        (
            '{"persona": ["a"], "turns": ["b", " "]}',
            "line 2: turns: must be a list of texts that are not empty",
        ),
        ('{"persona": "a", "turns": ["b", "c"]}', "line 2: persona: must be a list of texts"),
        ("[1]", "line 2: must be an object with persona and turns"),
        ("{", "line 2: not valid JSON"),
        (
            '{"persona": ["a"], "turns": ["b", "c"], "candidates": [["d"], ["e"]]}',
            "for each of the 1 replies",
        ),
        ('{"persona": ["a"], "turns": ["b", "c"], "candidates": [["d"]]}', "some dialogues have candidates"),
    ],
)
def test_a_wrong_line_is_named(line, problem):
    good = '{"persona": ["a"], "turns": ["b", "c"]}\n'
    with pytest.raises(ConfigError, match="train.jsonl.*" + problem.replace("[", r"\[")):
        dialogue_files.parsed(good + line, "train.jsonl")


def test_missing_files_are_all_named(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)train_partial.jsonl is missing.*valid_full.jsonl is missing"):
        personachat.load(replace(SETTINGS, data_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="dataset=dialogues needs a directory"):
        dialogue_files.load(replace(SETTINGS, data_dir=""))


def hub_rows(**changes) -> list[dict]:
    first = {"conv_id": 3, "utterance_idx": 0, "personality": ["i like cats ."], "history": ["hi"]}
    second = first | {"utterance_idx": 1, "history": ["hi", "hello", "cats ?"]}
    return [
        second | {"candidates": ["no", "so", "yes !"]} | changes,
        first | {"candidates": ["a", "b", "hello"]},
    ]


def test_rows_by_name_become_dialogues_with_their_candidates():
    [one] = personachat.from_rows(hub_rows(), "train")
    assert one == Dialogue(("i like cats .",), ("hi", "hello", "cats ?", "yes !"), (("a", "b"), ("no", "so")))
    with pytest.raises(
        ConfigError, match="dialogue 3: the history of reply 0 is not what was said before it"
    ):
        personachat.from_rows(hub_rows(history=["ho", "hello", "cats ?"]), "train")
    with pytest.raises(ConfigError, match="train: no column candidates; there are conv_id"):
        personachat.from_rows([{"conv_id": 1, "utterance_idx": 0, "personality": [], "history": []}], "train")


def test_by_name_a_stand_in_for_the_network(monkeypatch):
    monkeypatch.setattr(personachat, "_fetch", lambda: {"train": hub_rows(), "validation": hub_rows()[1:]})
    found = personachat.load(replace(SETTINGS, data_dir=""))
    assert [len(found.train[0].candidates), len(found.test[0].candidates)] == [2, 1]
    assert found.of_rows == {"train": 131_438, "test": 7_801}


def test_other_bytes_under_a_known_name_are_refused(directory):
    for name in ("train_partial", "valid_full"):
        (directory / f"{name}.jsonl").write_text((directory / "train.jsonl").read_text())
    with pytest.raises(ConfigError, match=r"(?s)train_partial.*wrong sha256.*valid_full.*wrong sha256"):
        personachat.load(replace(SETTINGS, data_dir=str(directory)))
