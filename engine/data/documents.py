"""Text of documents to token files: a hash of its text decides the split of each, and none comes twice.

So no document is in two splits, whatever the order of the source. An end-of-text token stands before each document.
Documents are read, encoded and written in parts, so that the source may be larger than memory. This module must not
change a document's text.
"""

import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.data import DOCUMENTS
from engine.data.labelled import SPLITS, key
from engine.data.tokenfiles import Writer
from engine.errors import ConfigError

AT_A_TIME = 1 << 22  # characters that are encoded together
REPEATED, EMPTY = "repeated", "empty"


@dataclass(frozen=True)
class Source:
    """What a data set's `load(settings)` gives.

    documents: a function that gives the texts from the first, each time it is called. facts: what is known of the
    files, for meta.json. stands_in_for: what the data set only replaces, in words; unverified: what it is said to be,
    where that could not be checked; both empty where it is what it is.
    """

    documents: Callable[[], Iterator[str]]
    facts: dict = field(default_factory=dict)
    stands_in_for: str = ""
    unverified: str = ""


def load(settings) -> Source:
    """The documents of settings.dataset. Raises ConfigError for missing or wrong data."""
    return importlib.import_module(DOCUMENTS[settings.dataset]).load(settings)


def split_of(text: str, settings) -> str:
    """The split of a document: its hash among 100 parts. Other validation_percent leaves the test as it is."""
    part = int.from_bytes(key(text)[:8], "big") % 100
    if part < settings.test_percent:
        return "test"
    return "validation" if part < settings.test_percent + settings.validation_percent else "train"


def divided(source: Source, settings, dropped: Counter) -> Iterator[tuple[str, str]]:
    """(split, text) of every document that is kept, in the source's order; counts in `dropped` those that are not.

    Ends where settings.max_train_bytes of training text are full: with the document before the first too many.
    """
    seen, train_bytes = set(), 0
    for text in source.documents():
        digest = key(text)[:16]
        if not text.strip() or digest in seen:
            dropped[REPEATED if text.strip() else EMPTY] += 1
            continue
        seen.add(digest)
        split = split_of(text, settings)
        if split == "train":
            train_bytes += len(text.encode("utf-8"))
            if settings.max_train_bytes and train_bytes > settings.max_train_bytes:
                return
        yield split, text


def training_documents(source: Source, settings) -> Iterator[str]:
    """The training texts, for a tokenizer that is trained."""
    return (text for split, text in divided(source, settings, Counter()) if split == "train")


def write(source: Source, settings, tokenizer, dtype: np.dtype, directory: Path) -> dict:
    """Write the files of each split into `directory`; returns what meta.json says of documents.

    Raises ConfigError if a split that was asked for has no document.
    """
    splits = {name: _Split(directory, name, tokenizer, dtype) for name in SPLITS}
    dropped = Counter({REPEATED: 0, EMPTY: 0})
    for name, text in divided(source, settings, dropped):
        splits[name].add(text)
    facts = {name: one.done() for name, one in splits.items()}
    wanted = [name for name in SPLITS if name != "test" or settings.test_percent]
    if empty := [name for name in wanted if not facts[name]["documents"]]:
        count = sum(one["documents"] for one in facts.values())
        are = "document is" if count == 1 else "documents are"
        raise ConfigError(
            f"{count} {are} too few: none is left for {', '.join(empty)}; hold out more or fewer "
            "(validation_percent, test_percent), or use more (max_train_bytes)",
            f"dataset={settings.dataset}",
        )
    return {
        "kind": "documents",
        "separator_id": tokenizer.separator_id,
        "stands_in_for": source.stands_in_for,
        "unverified": source.unverified,
        "source": source.facts,
        "dropped": dict(dropped),
        "splits": facts,
    }


class _Split:
    """One split while it is written."""

    def __init__(self, directory: Path, name: str, tokenizer, dtype: np.dtype):
        self.tokenizer, self.writer = tokenizer, Writer(directory, name, dtype)
        self.documents = self.bytes = self._characters = 0
        self._sha256, self._waiting = hashlib.sha256(), []

    def add(self, text: str) -> None:
        self.documents += 1
        self.bytes += len(text.encode("utf-8"))
        self._sha256.update(json.dumps(text).encode() + b"\n")
        self._waiting.append(text)
        self._characters += len(text)
        if self._characters >= AT_A_TIME:
            self._encode()

    def done(self) -> dict:
        self._encode()
        facts = self.writer.done()
        tokens = facts["tokens"]
        return {
            "documents": self.documents,
            "tokens": tokens,
            "bytes": self.bytes,
            "bytes_per_token": self.bytes / tokens if tokens else None,
            "unknown_tokens": 0,
            "sha256_text": self._sha256.hexdigest(),
            **{name: facts[name] for name in ("sha256_tokens", "shards")},
        }

    def _encode(self) -> None:
        separator = np.array([self.tokenizer.separator_id])
        for ids in self.tokenizer.encode_documents(self._waiting):
            assert not len(ids) or int(ids.max()) < self.tokenizer.vocabulary_size
            self.writer.add(np.concatenate([separator, ids]))
        self._waiting, self._characters = [], 0
