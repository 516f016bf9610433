"""Film reviews in turns, by hand: sentences, what stands for a persona, and what is held out."""

from types import SimpleNamespace

import pytest

from engine.data import imdb_text, imdb_turns
from engine.data.dialogues import Dialogue
from engine.errors import ConfigError


def test_sentences_are_written_as_personachat_is():
    review = 'I "loved" it, really!  Yes. The Café was (sadly) empty?! And so on...'
    assert imdb_turns.sentences(review) == [
        'i " loved " it , really !',
        "the caf was ( sadly ) empty ? !",
        "and so on . . .",
    ]  # "Yes." is too short


def test_a_long_sentence_is_cut_at_a_comma_or_else_where_there_is_no_more_room():
    words = [f"w{n}" for n in range(30)]
    assert imdb_turns.sentences(" ".join(words)) == [" ".join(words[:18]), " ".join(words[18:])]
    words[9] = "w9,"
    first, second, third = imdb_turns.sentences(" ".join(words) + " x" * 16)
    assert first == "w0 w1 w2 w3 w4 w5 w6 w7 w8 w9 ,"
    assert second.split() == words[10:28] and third.split() == [*words[28:], *["x"] * 16]


def test_a_review_in_turns():
    said = [f"this is sentence {n} ." for n in range(30)]
    found = imdb_turns.dialogue(" ".join(said))
    assert found == Dialogue(tuple(said[:4]), tuple(said[4:16]))
    assert imdb_turns.dialogue(" ".join(said[:6])).turns == tuple(said[4:6])
    assert imdb_turns.dialogue(" ".join(said[:5])) is None


def test_short_reviews_are_held_out_and_are_in_no_other_split(monkeypatch):
    long = "a b c d e f g h i j k l m n o ."  # 16 words
    texts = [
        f"one {n} is it . two is it . three is it . four is it . so it is . now it is ." for n in range(600)
    ]
    texts += [
        f"one {n} is long . two is it . three is it . four is it . so it is . {long}" for n in range(50)
    ]
    monkeypatch.setattr(
        imdb_text, "reviews", lambda directory: {"train": texts[:300], "unsupervised": texts[300:]}
    )
    source = imdb_turns.load(SimpleNamespace(data_dir="there"))
    splits = [set(part) for part in (source.train, source.validation, source.test)]
    assert [len(part) for part in splits] == [150, 250, 250]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]
    assert sum(long in one.turns for one in source.train) == 50
    assert not any(long in one.turns for one in [*source.validation, *source.test])


def test_missing_reviews_are_told(tmp_path):
    with pytest.raises(ConfigError, match="reviews.parquet is missing"):
        imdb_turns.load(SimpleNamespace(data_dir=str(tmp_path)))
