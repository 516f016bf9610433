"""Word tokenizers of labelled rows. Id 0 is padding, and in no row; a row without words is one `unknown_id`.

They forget white space and case, so text comes back as its words only. It must not import a library.
"""

import json
import re
from collections import Counter

import numpy as np

from engine.data.tokenizers import UNKNOWN, Tokenizer
from engine.errors import ConfigError

PAD = "<pad>"


def fnv1a(word: bytes) -> int:
    """The 32-bit FNV-1a hash. Source: Fowler, Noll and Vo, RFC 9923."""
    value = 0x811C9DC5
    for byte in word:
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value


class HashedWords(Tokenizer):
    """Lower-cased words between white space; id = 1 + FNV-1a of the word's UTF-8 bytes mod (vocab_size - 1).

    No vocabulary is learned and nothing is unknown, but different words may share an id.
    """

    def __init__(self, vocabulary_size: int):
        self.vocabulary_size = vocabulary_size
        self._ids = _Hashes(vocabulary_size)
        self.unknown_id = self._ids[""]

    @classmethod
    def build(cls, train_text: str, settings) -> "HashedWords":
        return cls(settings.vocab_size)

    def encode_counted(self, text: str) -> tuple[np.ndarray, int]:
        ids = self._ids
        return np.array([ids[word] for word in text.lower().split()], dtype=np.uint32), 0

    def decode(self, ids: np.ndarray) -> str:
        """<17> for id 17, because a hash does not tell its word."""
        return " ".join(f"<{i}>" if i else PAD for i in np.asarray(ids).tolist())

    def to_json(self) -> str:
        return json.dumps({"tokenizer": "hashed_words", "vocabulary_size": self.vocabulary_size})

    @classmethod
    def from_json(cls, content: str) -> "HashedWords":
        return cls(json.loads(content)["vocabulary_size"])


class _Hashes(dict):
    """Ids of the words seen so far: each word is hashed once."""

    def __init__(self, vocabulary_size: int):
        self.modulus = vocabulary_size - 1

    def __missing__(self, word: str) -> int:
        self[word] = found = 1 + fnv1a(word.encode("utf-8")) % self.modulus
        return found


class FrequentWords(Tokenizer):
    """The most frequent words and punctuation marks of the training rows, lower-cased; the others are <unk>.

    A token is what follows an apostrophe as in it's, don't or we'll (with the apostrophe), a run of letters, digits
    and underscores, or one other character that is no white space: "Don't pay $3.50!" is don 't pay $ 3 . 50 !
    """

    PATTERN = re.compile(r"['’](?:s|t|d|m|ll|re|ve)\b|\w+|[^\w\s]")
    unknown_id = 1

    def __init__(self, words: list[str]):
        self.words = [PAD, UNKNOWN, *words]
        self.vocabulary_size = len(self.words)
        self._ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def tokens(cls, text: str) -> list[str]:
        return cls.PATTERN.findall(text.lower())

    @classmethod
    def build(cls, train_text: str, settings) -> "FrequentWords":
        """Words that are equally frequent are taken in alphabetical order."""
        counts = Counter(cls.tokens(train_text))
        wanted = settings.vocab_size - 2
        if len(counts) < wanted:
            raise ConfigError(
                f"vocab_size = {settings.vocab_size}: the training rows have {len(counts):,} different words; with "
                f"padding and {UNKNOWN}, set vocab_size to {len(counts) + 2} or less"
            )
        return cls(sorted(counts, key=lambda word: (-counts[word], word))[:wanted])

    def encode_counted(self, text: str) -> tuple[np.ndarray, int]:
        look_up, unknown = self._ids.get, self.unknown_id
        ids = np.array([look_up(word, unknown) for word in self.tokens(text)], dtype=np.uint32)
        return ids, int((ids == unknown).sum())

    def decode(self, ids: np.ndarray) -> str:
        """The words with single spaces between them."""
        return " ".join(self.words[i] for i in np.asarray(ids).tolist())

    def to_json(self) -> str:
        return json.dumps({"tokenizer": "frequent_words", "words": self.words[2:]}, ensure_ascii=False)

    @classmethod
    def from_json(cls, content: str) -> "FrequentWords":
        return cls(json.loads(content)["words"])
