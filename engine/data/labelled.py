"""Labelled rows: published or read ones to training, validation and test rows that share no text.

Rows are drawn and ordered by a hash of their text, so neither the order of a file nor another number of held-out rows
moves a row that need not move. Test rows that are published are never changed; training rows give way to them.
"""

import hashlib
import importlib
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.data import LABELLED
from engine.data.examples import Examples
from engine.errors import ConfigError

SPLITS = ("train", "validation", "test")
Row = tuple[str, int]  # a text and the number of its class


@dataclass(frozen=True)
class Source:
    """What a data set's `load(settings)` gives. `validation` and `test` are None where rows are to be held out."""

    classes: list[str]
    train: list[Row]
    validation: list[Row] | None = None
    test: list[Row] | None = None
    of_rows: dict[str, int] = field(default_factory=dict)  # size of the published splits, where it is known


@dataclass(frozen=True)
class Splits:
    """Rows as they will be tokenized, by split, and how many were dropped why."""

    source: Source
    rows: dict[str, list[Row]]
    dropped: dict[str, int]

    def training_text(self) -> str:
        """What a tokenizer's vocabulary is made from. No word goes over the end of a row."""
        return "\n".join(text for text, _ in self.rows["train"])


def version(dataset: str) -> int:
    """Of a data set's clean-up: tokens made with another one are other tokens."""
    return importlib.import_module(LABELLED[dataset]).VERSION


def load(settings) -> Splits:
    """The rows of settings.dataset. Raises ConfigError for missing or wrong data and for too few rows."""
    source = importlib.import_module(LABELLED[settings.dataset]).load(settings)
    try:
        return split(source, settings)
    except ConfigError as error:
        raise ConfigError(error.problems, f"dataset={settings.dataset}") from None


def key(text: str) -> bytes:
    """What two texts have in common that differ in white space and case only; also the order of rows, 32 bytes."""
    return hashlib.sha256(" ".join(text.lower().split()).encode("utf-8")).digest()


def split(source: Source, settings) -> Splits:
    """Hold out what is to be held out, and drop what would be in two splits or twice among the training rows."""
    rows, dropped = {"test": source.test, "validation": source.validation}, {}
    held = {key(text) for text, _ in source.test or ()}
    dropped["also in the test set"] = dropped["also in the validation set"] = 0
    if source.validation is not None:
        rows["validation"] = [row for row in source.validation if key(row[0]) not in held]
        dropped["of the validation set, also in the test set"] = len(source.validation) - len(
            rows["validation"]
        )
    validating = {key(text) for text, _ in rows["validation"] or ()}
    groups: dict[bytes, list[Row]] = defaultdict(list)
    for row in source.train:
        digest = key(row[0])
        if digest in held:
            dropped["also in the test set"] += 1
        elif digest in validating:
            dropped["also in the validation set"] += 1
        else:
            groups[digest].append(row)
    kept = _once(groups, dropped)
    # The test first: another number of validation rows then leaves it as it is.
    for name, count in (("test", settings.test_rows), ("validation", settings.validation_rows)):
        if rows[name] is None:
            rows[name], kept = _hold_out(kept, name, count)
        elif not rows[name]:
            given = len(source.validation if name == "validation" else source.test)
            raise ConfigError(
                f"all {given} {name} rows are also in the test set"
                if given
                else f"the {name} set has no rows"
            )
    if settings.max_train_rows > len(kept):
        raise ConfigError(
            f"max_train_rows = {settings.max_train_rows}: {len(kept):,} training rows are left; set it to 0 for all"
        )
    rows["train"] = kept[: settings.max_train_rows or None]
    _require_all_classes(source.classes, rows["train"])
    return Splits(source, {name: rows[name] for name in SPLITS}, dropped)


def _once(groups: dict[bytes, list[Row]], dropped: dict[str, int]) -> list[Row]:
    """One row of each group of equal texts, in the order of their hashes; none where their labels differ."""
    kept = []
    dropped["repeated"] = dropped["same text with different labels"] = 0
    for digest in sorted(groups):
        same = groups[digest]
        if len({label for _, label in same}) > 1:
            dropped["same text with different labels"] += len(same)
        else:
            dropped["repeated"] += len(same) - 1
            kept.append(min(same))
    return kept


def _hold_out(rows: list[Row], name: str, count: int) -> tuple[list[Row], list[Row]]:
    if count >= len(rows):
        raise ConfigError(
            f"{name}_rows = {count}: must leave training rows, and there are {len(rows):,} rows to hold out from"
        )
    return rows[:count], rows[count:]


def _require_all_classes(classes: list[str], rows: list[Row]) -> None:
    missing = sorted(set(range(len(classes))) - {label for _, label in rows})
    if missing:
        raise ConfigError(
            f"no training row is left of {', '.join(classes[i] for i in missing)}; hold out fewer rows "
            "(validation_rows, test_rows), or use more (max_train_rows)"
        )


def write(splits: Splits, settings, tokenizer, dtype: np.dtype, directory: Path) -> dict:
    """Write the files of each split into `directory`; returns what meta.json says of labelled rows."""
    source = splits.source
    return {
        "kind": "labelled",
        "version": version(settings.dataset),
        "classes": source.classes,
        "dropped": splits.dropped,
        "source_rows": {name: len(rows) for name in SPLITS if (rows := getattr(source, name)) is not None},
        "of_rows": source.of_rows,
        "splits": {
            name: _write_split(splits.rows[name], len(source.classes), tokenizer, dtype, directory / name)
            for name in SPLITS
        },
    }


def _write_split(rows: list[Row], classes: int, tokenizer, dtype: np.dtype, path: Path) -> dict:
    parts, unknown, empty = [], 0, 0
    for text, _ in rows:
        ids, unknown_here = tokenizer.encode_counted(text)
        if not len(ids):
            ids, empty = [tokenizer.unknown_id], empty + 1
        parts.append(np.asarray(ids, dtype=dtype))
        unknown += unknown_here
    examples = Examples(
        tokens=np.concatenate(parts),
        ends=np.cumsum([len(part) for part in parts], dtype=np.int64),
        labels=np.array([label for _, label in rows], dtype=np.int32),
    )
    assert int(examples.tokens.min()) > 0 and int(examples.tokens.max()) < tokenizer.vocabulary_size, path
    for array, suffix in ((examples.tokens, ""), (examples.ends, ".ends"), (examples.labels, ".labels")):
        array.tofile(path.with_name(f"{path.name}{suffix}.bin"))
    size, content = sum(len(text.encode("utf-8")) for text, _ in rows), hashlib.sha256()
    for row in rows:
        content.update(json.dumps(row).encode() + b"\n")
    return {
        "rows": len(rows),
        "rows_per_class": np.bincount(examples.labels, minlength=classes).tolist(),
        "empty_rows": empty,
        "tokens": len(examples.tokens),
        "bytes": size,
        "bytes_per_token": size / len(examples.tokens),
        "unknown_tokens": unknown,
        "sha256_text": content.hexdigest(),
        "sha256_tokens": hashlib.sha256(examples.tokens).hexdigest(),
        "sha256_ends": hashlib.sha256(examples.ends).hexdigest(),
        "sha256_labels": hashlib.sha256(examples.labels).hexdigest(),
        "sha256_rows": examples.sha256(),
    }
