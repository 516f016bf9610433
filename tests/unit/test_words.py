"""Word tokenizers: ids by hand, and what is padding, unknown and empty."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from engine.config import Data, resolve
from engine.data import TOKENIZERS
from engine.data.words import FrequentWords, HashedWords, fnv1a
from engine.errors import ConfigError


def settings(**values) -> SimpleNamespace:
    return SimpleNamespace(**(dataclasses.asdict(Data()) | values))


# --- hashed


@pytest.mark.parametrize(
    ("word", "value"),
    # From the test vectors of the hash's authors.
    [
        (b"", 0x811C9DC5),
        (b"a", 0xE40C292C),
        (b"foob", 0x3F5076EF),
        (b"foobar", 0xBF9CF968),
        (b"\xff\x00\x00\x01", 0xC48FB86D),
    ],
)
def test_the_hash_is_fnv1a(word, value):
    assert fnv1a(word) == value


def test_hashed_ids_by_hand():
    made = HashedWords.build("whatever", settings(vocab_size=20_000))
    # 0xE40C292C = 191309 · 19999 + 13529, 0xBF9CF968 = 160744 · 19999 + 16464; ids begin with 1.
    ids, unknown = made.encode_counted("A  foobar\n\ta")
    assert ids.tolist() == [13530, 16465, 13530] and unknown == 0 and ids.dtype == np.uint32
    assert made.unknown_id == 4574  # of no word: 0x811C9DC5 = 108312 · 19999 + 4573
    assert made.vocabulary_size == 20_000
    assert made.decode(np.array([13530, 0, 7])) == "<13530> <pad> <7>"


def test_hashes_are_of_utf8_and_case_does_not_count():
    made = HashedWords(1000)
    assert made.encode("ÉTÉ").tolist() == [1 + fnv1a("été".encode()) % 999]
    assert made.encode(" \n").tolist() == []


def test_no_hash_is_padding_or_beyond_the_vocabulary():
    ids = HashedWords(7).encode(" ".join(f"w{i}" for i in range(500)))
    assert set(ids.tolist()) == {1, 2, 3, 4, 5, 6}


# --- frequent


def test_words_and_punctuation_are_separate_tokens():
    assert FrequentWords.tokens("Don't pay $3.50 (it's M&S_x)!") == (
        ["don", "'t", "pay", "$", "3", ".", "50", "(", "it", "'s", "m", "&", "s_x", ")", "!"]
    )
    assert FrequentWords.tokens("the 'test' — l’été's, they’ll") == (
        ["the", "'", "test", "'", "—", "l", "’", "été", "'s", ",", "they", "’ll"]
    )


def test_the_most_frequent_are_taken_and_ties_alphabetically():
    made = FrequentWords.build("b a c b. a d b", settings(vocab_size=6))
    assert made.words == ["<pad>", "<unk>", "b", "a", ".", "c"]  # ., c and d come once each
    ids, unknown = made.encode_counted("D a! b <unk>")
    assert ids.tolist() == [1, 3, 1, 2, 1, 1, 1] and unknown == 5
    assert made.unknown_id == 1 and made.vocabulary_size == 6
    assert made.decode(ids) == "<unk> a <unk> b <unk> <unk> <unk>"


def test_too_few_words_are_an_error():
    text = "a b c"
    assert FrequentWords.build(text, settings(vocab_size=5)).vocabulary_size == 5
    with pytest.raises(
        ConfigError, match="vocab_size = 6: the training rows have 3 different .* to 5 or less"
    ):
        FrequentWords.build(text, settings(vocab_size=6))


# --- both


@pytest.mark.parametrize("cls", [HashedWords, FrequentWords])
def test_a_saved_tokenizer_is_the_same(cls, tmp_path):
    made = cls.build("größe € it's a b c d", settings(vocab_size=9))
    made.save(tmp_path)
    again = cls.load(tmp_path)
    text = "A größe of € and it's."
    assert again.vocabulary_size == made.vocabulary_size and again.unknown_id == made.unknown_id
    assert again.encode(text).tolist() == made.encode(text).tolist()
    assert again.decode(made.encode(text)) == made.decode(made.encode(text))


@pytest.mark.parametrize("tokenizer", ["hashed_words", "frequent_words"])
def test_text_is_not_for_word_tokenizers(tokenizer):
    with pytest.raises(ConfigError, match=f"tokenizer = '{tokenizer}': not for dataset = 'text'.*gpt2"):
        resolve({"dataset": "text", "data_dir": "x", "tokenizer": tokenizer}, "here")


@pytest.mark.parametrize("tokenizer", sorted(TOKENIZERS.keys() - {"hashed_words", "frequent_words"}))
def test_rows_are_for_tokenizers_with_padding_only(tokenizer):
    rows = {"dataset": "synthetic", "model": "classifier"}
    with pytest.raises(
        ConfigError, match=f"tokenizer = '{tokenizer}': not for .* hashed_words, frequent_words"
    ):
        resolve(rows | {"tokenizer": tokenizer}, "here")
    resolve(rows | {"tokenizer": "hashed_words"}, "here")
