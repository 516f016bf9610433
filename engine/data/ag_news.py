"""AG News: titles and first sentences of news, four classes (Zhang, Zhao and LeCun 2015, arXiv:1509.01626).

120,000 training and 7,600 test rows. A directory holds test.csv and train.csv (without a header: class 1 to 4, title,
description), or instead of train.csv the 50,670 of its rows in train_subset.csv (with one: label, text, source).
Licence: for research and other non-commercial use. It must accept only the known rows
(by name: the known test rows, and 120,000 training rows).

The published text is damaged, and is cleaned by `cleaned`. What has no trace left stays lost ("Turner   Newall").
"""

import csv
import hashlib
import html
import io
import re
from pathlib import Path

from engine.data.hub import fetching
from engine.data.labelled import Row, Source
from engine.data.places import OR_BY_NAME
from engine.data.textdir import read_file
from engine.errors import ConfigError

NAME = "AG News"
VERSION = 1  # of `cleaned`; tokens of another one are refused
CLASSES = ["World", "Sports", "Business", "Sci/Tech"]
OF_ROWS = {"train": 120_000, "test": 7_600}
FULL, SUBSET, TEST = "train.csv", "train_subset.csv", "test.csv"
SHA256 = {
    FULL: "76a0a2d2f92b286371fe4d4044640910a04a803fdd2538e0f3f29a5c6f6b672e",
    SUBSET: "75ac2004563a3b8e7dd7a2feceb2beea30f4a082ed5e4e27c43919315f5ffb20",
    TEST: "521465c2428ed7f02f8d6db6ffdd4b5447c1c701962353eb2c40d548c3c85699",
}
HUB_TEST_SHA256 = "b16da15cd930a32515c7793fcb8497b525c668ae7235a46a83a0e11a209ef1f6"  # by rows_sha256
# Entities that lost their "&": "month #39;s", " quot;propaganda quot;". A space stands in its place.
ENTITY = re.compile(r"[ &]?(#[0-9]{2,5}|quot|amp|lt|gt|nbsp|hellip|[lr][sd]quo|[mn]dash|[a-z]acute);")
TAG = re.compile(r"</?[A-Za-z][^<>]*>")


def cleaned(text: str) -> str:
    r"""A row's text for tokenizing.

    "\$" is a dollar sign, any other backslash a line break, which becomes a space. Entities become characters, with
    or without their "&" ("M amp;S" is M&S), and then HTML tags a space. White space is single spaces.
    """
    text = text.replace("\\$", "$").replace("\\", " ")
    text = ENTITY.sub(lambda found: html.unescape(f"&{found[1]};"), text)
    return " ".join(TAG.sub(" ", html.unescape(text)).split())


def load(settings) -> Source:
    """The rows of settings.data_dir or, when that is empty, by name through `datasets`.

    Raises ConfigError when files are missing, cannot be fetched, or are not the known ones.
    """
    raw = _directory(settings.data_dir) if settings.data_dir else _fetched()
    rows = {split: [(cleaned(text), label) for text, label in found] for split, found in raw.items()}
    return Source(CLASSES, rows["train"], test=rows["test"], of_rows=OF_ROWS)


def _directory(directory: str) -> dict[str, list[Row]]:
    files, problems = {}, []
    for split, names in {"train": (FULL, SUBSET), "test": (TEST,)}.items():
        there = [name for name in names if any(Path(directory).expanduser().glob(f"{name}*"))]
        name = (there or names)[0]
        try:
            files[split] = name, read_file(directory, name, SHA256[name])
        except ConfigError as error:
            problems += [p + ("" if there else _instead(names) + OR_BY_NAME) for p in error.problems]
    if problems:
        raise ConfigError(problems, where=f"data_dir={directory}")
    return {split: parsed(text, subset=name == SUBSET) for split, (name, text) in files.items()}


def _instead(names: tuple[str, ...]) -> str:
    return "".join(f", nor {name}, which would do" for name in names[1:])


def parsed(content: str, *, subset: bool) -> list[Row]:
    """The rows of a CSV file as they are written, with classes from 0."""
    rows = list(csv.reader(io.StringIO(content, newline=""), strict=True))
    if subset:
        return [(_unquoted(text), int(label) - 1) for label, text, _ in rows[1:]]
    return [(f"{title} {description}", int(label) - 1) for label, title, description in rows]


def _unquoted(text: str) -> str:
    """A field of CSV within a field: part of the subset was quoted twice."""
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    return text.replace('""', '"')


def rows_sha256(rows: list[Row]) -> str:
    """sha256, in hex, of rows as they are published, white space aside."""
    lines = (f"{label} {' '.join(text.split())}\n" for text, label in rows)
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def _fetched() -> dict[str, list[Row]]:
    rows = _fetch()
    found = {split: len(rows[split]) for split in OF_ROWS}
    problems = [] if found == OF_ROWS else [f"expected {OF_ROWS} rows, found {found}"]
    if (digest := rows_sha256(rows["test"])) != HUB_TEST_SHA256:
        problems.append(f"test: wrong sha256: expected {HUB_TEST_SHA256}, found {digest}")
    if problems:
        raise ConfigError(problems, where="AG News as fetched")
    return rows


def _fetch() -> dict[str, list[Row]]:
    files = f"{TEST} and {FULL} (or the same names with .xz)"
    with fetching("dataset=ag_news", "fancyzhx/ag_news", files):
        import datasets

        loaded = datasets.load_dataset("fancyzhx/ag_news")
        return {s: list(zip(loaded[s]["text"], loaded[s]["label"], strict=True)) for s in OF_ROWS}
