"""Source text to token files: the only writer and the only reader of a token directory.

    python -m engine.data.prepare FILE.toml

A token directory holds train.bin, validation.bin and test.bin (flat arrays of uint16 or uint32; of documents in
shards where they are large, engine/data/tokenfiles.py), tokenizer.json and meta.json; of labelled rows also where
each row ends and its label: <split>.ends.bin (int64) and <split>.labels.bin (int32); of dialogues these, where each
context and candidate ends, the speaker of each token: <split>.types.bin, and of which dialogue each row is and what
its true reply says: <split>.dialogues.bin and <split>.replies.bin (int32). It appears whole or not at all.
This module must not change the text: it may only cut training text at max_train_bytes, and it refuses splits that
overlap; rows are split in engine/data/labelled.py, documents in engine/data/documents.py. It imports no torch.
"""

import hashlib
import importlib
import json
import os
import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from engine.config import Data
from engine.config import load as load_config
from engine.data import (
    DATASETS,
    DIALOGUES,
    DOCUMENTS,
    LABELLED,
    TOKENIZERS,
    dialogue_tokens,
    dialogues,
    documents,
    labelled,
    places,
)
from engine.data.choices import Choices
from engine.data.examples import Examples
from engine.data.tokenfiles import TokenFiles
from engine.errors import ConfigError, command

SPLITS = labelled.SPLITS
DEFAULTS = {
    f.name: f.default for f in fields(Data)
}  # also of what tokens made earlier could not be asked for
SETTINGS = tuple(DEFAULTS)
META = "meta.json"
FILES = {  # kind: {suffix of a split's file: (its type, None for meta's dtype; how many; its digest)}
    "text": {"": (None, "tokens", "sha256_tokens")},
    "labelled": {
        "": (None, "tokens", "sha256_tokens"),
        ".ends": ("int64", "rows", "sha256_ends"),
        ".labels": ("int32", "rows", "sha256_labels"),
    },
    "dialogues": {
        "": (None, "tokens", "sha256_tokens"),
        ".types": (None, "tokens", "sha256_types"),
        ".ends": ("int64", "segments", "sha256_ends"),
        ".labels": ("int32", "rows", "sha256_labels"),
        ".dialogues": ("int32", "rows", "sha256_dialogues"),
        ".replies": ("int32", "rows", "sha256_replies"),
    },
}
VERSIONED = {"labelled": labelled, "dialogues": dialogues}  # kinds whose making of rows has a version


@dataclass(frozen=True)
class Tokens:
    """An opened token directory, read-only memory maps: arrays of shape (tokens,), or Examples of labelled rows, or
    Choices of dialogues."""

    meta: dict
    train: np.ndarray | TokenFiles | Examples | Choices
    validation: np.ndarray | TokenFiles | Examples | Choices
    test: np.ndarray | TokenFiles | Examples | Choices
    directory: Path

    def sha256(self, split: str) -> str:
        """Of all that the split holds."""
        facts = self.meta["splits"][split]
        return facts.get("sha256_rows") or facts["sha256_tokens"]


def prepare(settings, directory: str | Path) -> dict:
    """Tokenize settings.dataset into `directory`, replacing an older token directory; returns its meta.

    Everything is written beside `directory` and renamed at the end, so a process killed half-way leaves
    nothing that looks finished. Raises ConfigError for missing or wrong data and for splits that overlap.
    """
    directory = Path(directory).absolute()
    if (
        directory.exists()
        and not (directory / META).is_file()
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise ConfigError(f"{directory} exists and is not a token directory; it was left as it is")
    content, tokenizer = _content(settings)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # a killed process with the same id may have left one
    partial.mkdir(parents=True)
    try:
        meta = _write(settings, content, tokenizer, partial)
        _replace(directory, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def _content(settings):
    """What is to be tokenized, and the tokenizer, of which the vocabulary comes from the training text."""
    places.require(settings)
    cls = _tokenizer_class(settings.tokenizer)
    if settings.dataset in LABELLED:
        content = labelled.load(settings)
        return content, cls.build(content.training_text(), settings)
    if settings.dataset in DIALOGUES:
        content = dialogues.load(settings)
        return content, cls.build(content.training_text(), settings)
    if settings.dataset in DOCUMENTS:
        content = documents.load(settings)
        return content, cls.build_for_documents(documents.training_documents(content, settings), settings)
    content = source_texts(settings)
    return content, cls.build(content["train"], settings)


def source_texts(settings) -> dict[str, str]:
    """The text of each split, as it will be tokenized. Raises ConfigError for missing or overlapping text."""
    texts = importlib.import_module(DATASETS[settings.dataset]).load(settings)
    assert set(texts) == set(SPLITS), texts.keys()
    problems = [
        f"the {small} text is contained in the {large} text; splits must not overlap"
        for small in ("validation", "test")
        for large in SPLITS
        if small != large and texts[small] and texts[small] in texts[large]
    ]
    if problems:
        raise ConfigError(problems, where=f"dataset={settings.dataset}")
    if settings.max_train_bytes:
        texts["train"] = cut_at_line_end(texts["train"], settings.max_train_bytes)
    return texts


def cut_at_line_end(text: str, max_bytes: int) -> str:
    """The whole lines of `text` within its first `max_bytes` UTF-8 bytes.

    Raises ConfigError if there is none.
    """
    content = text.encode("utf-8")
    if len(content) <= max_bytes:
        return text
    end = content.rfind(b"\n", 0, max_bytes) + 1
    if not end:
        raise ConfigError(f"max_train_bytes = {max_bytes}: the first line of the training text is longer")
    return content[:end].decode("utf-8")


def open_tokens(directory: str | Path, settings=None, *, verify: bool = False) -> Tokens:
    """Open a token directory; with `settings`, only if made with them; with `verify`, check every byte.

    Raises ConfigError when it is missing, incomplete, changed in size (or bytes), or made with other
    settings.
    """
    directory = Path(directory)
    if not (directory / META).is_file():
        raise ConfigError(
            f"no tokens in {directory}; run the tokenize stage (dvc repro tokenize), or "
            "python -m engine.data.prepare FILE.toml"
        )
    try:
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{META} is damaged: {error}; run the tokenize stage again", str(directory)
        ) from None
    problems = []
    if settings is not None:
        problems = [
            f"{name}: the tokens were made with {meta['settings'].get(name, DEFAULTS[name])!r}, this run asks for "
            f"{getattr(settings, name)!r}; run the tokenize stage again"
            for name in SETTINGS
            if meta["settings"].get(name, DEFAULTS[name]) != getattr(settings, name)
        ]
        versions = VERSIONED.get(_kind(meta))
        if not problems and versions and meta["version"] != (now := versions.version(settings.dataset)):
            problems.append(
                f"{settings.dataset}: the tokens were made with version {meta['version']} of its clean-up, this is "
                f"version {now}; run the tokenize stage again"
            )
    if problems := problems or _damage(directory, meta, verify):
        raise ConfigError(problems, where=str(directory))
    splits = {split: _opened(directory, meta, split) for split in SPLITS}
    return Tokens(meta=meta, **splits, directory=directory)


def _files(directory: Path, meta: dict, split: str):
    """(path, type, what meta says how many there are, what digest they have) of a split's files."""
    facts = meta["splits"][split]
    if _kind(meta) == "documents":
        for one in facts["shards"]:
            yield directory / one["file"], np.dtype(meta["dtype"]), one["tokens"], one["sha256"]
        return
    for suffix, (kind, count, digest) in FILES[_kind(meta)].items():
        yield directory / f"{split}{suffix}.bin", np.dtype(kind or meta["dtype"]), facts[count], facts[digest]


def _kind(meta: dict) -> str:
    return meta.get("kind", "text")  # tokens made before there were labelled rows


def _damage(directory: Path, meta: dict, verify: bool) -> list[str]:
    problems = []
    for split in SPLITS:
        for path, dtype, count, digest in _files(directory, meta, split):
            size, expected = path.stat().st_size if path.is_file() else 0, count * dtype.itemsize
            if size != expected:
                problems.append(f"{path.name}: expected {expected} bytes, found {size}")
            elif verify and (found := _sha256(path.read_bytes())) != digest:
                problems.append(f"{path.name}: wrong sha256: expected {digest}, found {found}")
    return problems


def _opened(directory: Path, meta: dict, split: str) -> np.ndarray | TokenFiles | Examples | Choices:
    maps = [
        np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)
        for path, dtype, count, _ in _files(directory, meta, split)
    ]
    if _kind(meta) == "labelled":
        return Examples(*maps)
    if _kind(meta) == "dialogues":
        return Choices(*maps, pad=meta["specials"]["pad"])
    return TokenFiles(maps) if len(maps) > 1 else maps[0]


def load_tokenizer(directory: str | Path):
    """The tokenizer that made the tokens in `directory`, an `engine.data.tokenizers.Tokenizer`."""
    return tokenizer_in(directory, open_tokens(directory).meta["tokenizer"])


def tokenizer_in(directory: str | Path, name: str):
    """The tokenizer of this `name` whose tokenizer.json is in `directory`."""
    return _tokenizer_class(name).load(directory)


def _write(settings, content, tokenizer, directory: Path) -> dict:
    size = tokenizer.vocabulary_size
    if settings.dataset in DIALOGUES:
        size += len(dialogue_tokens.SPECIALS)
    dtype = np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)
    if settings.dataset in DIALOGUES:
        facts = dialogue_tokens.write(content, settings, tokenizer, dtype, directory)
    elif settings.dataset in LABELLED:
        facts = labelled.write(content, settings, tokenizer, dtype, directory)
    elif settings.dataset in DOCUMENTS:
        facts = documents.write(content, settings, tokenizer, dtype, directory)
    else:
        splits = {s: _write_text(content[s], tokenizer, dtype, directory / f"{s}.bin") for s in SPLITS}
        facts = {"kind": "text", "splits": splits}
    tokenizer.save(directory)
    meta = {
        "dataset": settings.dataset,
        "tokenizer": settings.tokenizer,
        "settings": {name: getattr(settings, name) for name in SETTINGS},
        "dtype": dtype.name,
        "vocabulary_size": size,
        **facts,
    }
    (directory / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta


def _write_text(text: str, tokenizer, dtype: np.dtype, path: Path) -> dict:
    content = text.encode("utf-8")
    ids, unknown = tokenizer.encode_counted(text)
    assert not ids.size or int(ids.max()) < tokenizer.vocabulary_size, (path, ids.size)
    ids = ids.astype(dtype)
    ids.tofile(path)
    return {
        "tokens": ids.size,
        "bytes": len(content),
        "bytes_per_token": len(content) / ids.size if ids.size else None,
        "unknown_tokens": unknown,
        "sha256_text": _sha256(content),
        "sha256_tokens": _sha256(ids.tobytes()),
    }


def _replace(directory: Path, new: Path) -> None:
    """Put `new` in the place of `directory`; at no time is there a mixture of the two."""
    if not directory.exists():
        new.rename(directory)
        return
    old = directory.with_name(new.name + ".old")
    directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old)


def _tokenizer_class(name: str):
    module, _, attribute = TOKENIZERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@command
def main(arguments: list[str]) -> None:
    """Tokenize the data of one run's TOML file into the directory where the run will look for it."""
    if len(arguments) != 1:
        raise ConfigError("usage: python -m engine.data.prepare FILE.toml")
    config = load_config(arguments[0])
    meta = prepare(config.data, config.tokens_directory)
    print(json.dumps({"directory": str(config.tokens_directory), **meta}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
