"""IMDb: film reviews, positive or negative (Maas et al. 2011, Learning Word Vectors for Sentiment Analysis).

25,000 training and 25,000 test rows, half of each class. A directory holds reviews.parquet with split, label (pos,
neg, and unsup, which is left out) and text; its line breaks are lost. By name they are `<br />`, and become spaces,
so the two sources give different tokens. Licence: for research; cite the paper. It must accept only the known file,
and by name only the known counts.
"""

import re
from collections import Counter
from pathlib import Path

from engine.data.hub import fetching
from engine.data.labelled import Row, Source
from engine.data.parquet import read_parquet
from engine.data.places import OR_BY_NAME
from engine.errors import ConfigError

NAME = "IMDb reviews"
VERSION = 1  # of `cleaned`; tokens of another one are refused
CLASSES = ["neg", "pos"]
FILE = "reviews.parquet"
SHA256 = {FILE: "ec6291ab08eb3ed2b17c0dd4862c3f136bc3a3277ddf0c535c0125bdd7dcbfa5"}
OF_ROWS = {"train": 25_000, "test": 25_000}
BREAK = re.compile(r"<br\s*/?>")


def cleaned(text: str) -> str:
    """A review for tokenizing: line breaks written as HTML become spaces, and white space is single spaces."""
    return " ".join(BREAK.sub(" ", text).split())


def load(settings) -> Source:
    """The rows of settings.data_dir or, when that is empty, by name through `datasets`.

    Raises ConfigError when they are missing, cannot be fetched, or are not the known ones.
    """
    raw = _directory(settings.data_dir) if settings.data_dir else _fetch()
    found = {split: Counter(CLASSES[label] for _, label in rows) for split, rows in raw.items()}
    wanted = {split: {name: count // 2 for name in CLASSES} for split, count in OF_ROWS.items()}
    if found != wanted:
        raise ConfigError(f"IMDb: expected rows {wanted}, found { {s: dict(c) for s, c in found.items()} }")
    rows = {split: [(cleaned(text), label) for text, label in part] for split, part in raw.items()}
    return Source(CLASSES, rows["train"], test=rows["test"], of_rows=OF_ROWS)


def _directory(directory: str) -> dict[str, list[Row]]:
    try:
        _, table = read_parquet(Path(directory).expanduser() / FILE, SHA256[FILE], OR_BY_NAME)
    except ConfigError as error:
        raise ConfigError(error.problems, where=f"data_dir={directory}") from None
    rows = {split: [] for split in OF_ROWS}
    for split, label, text in zip(table["split"], table["label"], table["text"], strict=True):
        if label in CLASSES:
            rows[split].append((text, CLASSES.index(label)))
    return rows


def _fetch() -> dict[str, list[Row]]:
    with fetching("dataset=imdb", "stanfordnlp/imdb", FILE):
        import datasets

        loaded = datasets.load_dataset("stanfordnlp/imdb")
        return {s: list(zip(loaded[s]["text"], loaded[s]["label"], strict=True)) for s in OF_ROWS}
