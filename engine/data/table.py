"""A user's own rows: a directory with train.csv, train.jsonl or train.parquet, and perhaps valid.* and test.*.

Text files may end in .xz. `text_column` (several: their texts joined by a space) and `label_column` name the columns;
the classes are the labels of the training rows, sorted, as numbers if all are whole numbers.
Licence: whatever the rows' owner says. It must not change a text or guess a column.
"""

import csv
import difflib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from engine.config import SETTINGS
from engine.data.labelled import Row, Source
from engine.data.parquet import read_parquet
from engine.data.textdir import read_file
from engine.errors import ConfigError

NAME = "table"
VERSION = 1  # of how rows are read; tokens of another one are refused
STEMS = {"train": "train", "validation": "valid", "test": "test"}
ENDINGS = (".csv", ".csv.xz", ".jsonl", ".jsonl.xz", ".parquet")
SHOWN = 10  # problems of one file that are listed

Place = tuple[str, str, str]  # where a row stands, its text, its label


def load(settings) -> Source:
    """The rows of settings.data_dir. Raises ConfigError, naming file and line, for what is not as it should be."""
    if not settings.data_dir:
        raise ConfigError(
            "dataset=table needs a directory with train.csv, train.jsonl or train.parquet: -S data_dir=DIRECTORY"
        )
    paths = _paths(Path(settings.data_dir).expanduser())
    _require_effect(paths, settings)
    places = {split: _read(path, settings) for split, path in paths.items()}
    classes = _sorted({label for _, _, label in places["train"]})
    if len(classes) < 2:
        raise ConfigError(f"{paths['train']}: every label is {classes[0]!r}; classes must be at least two")
    rows = {
        split: _numbered(paths[split], part, classes, settings.label_column) for split, part in places.items()
    }
    return Source(classes, rows["train"], rows.get("validation"), rows.get("test"))


def _paths(directory: Path) -> dict[str, Path]:
    """The file of each split that has one."""
    paths, problems = {}, []
    for split, stem in STEMS.items():
        there = [
            directory / f"{stem}{ending}" for ending in ENDINGS if (directory / f"{stem}{ending}").is_file()
        ]
        if len(there) > 1:
            problems.append(f"{' and '.join(p.name for p in there)} are both there; keep one of them")
        if there:
            paths[split] = there[0]
    if "train" not in paths:
        others = sorted(p.name for p in directory.iterdir())[:SHOWN] if directory.is_dir() else []
        found = f"; it holds {', '.join(others)}" if others else ""
        problems.append(
            f"there is no {', '.join(f'train{e}' for e in ENDINGS[:-1])} or train{ENDINGS[-1]}{found}"
        )
    if problems:
        raise ConfigError(problems, where=f"data_dir={directory}")
    return paths


def _require_effect(paths: dict[str, Path], settings) -> None:
    problems = [
        f"{name} = {getattr(settings, name)}: would do nothing, because {paths[split].name} is there"
        for split, name in (("validation", "validation_rows"), ("test", "test_rows"))
        if split in paths and getattr(settings, name) != SETTINGS[name].default
    ]
    if problems:
        raise ConfigError(problems, where=f"data_dir={settings.data_dir}")


def _read(path: Path, settings) -> list[Place]:
    """The rows of one file, with where each stands."""
    columns = [name.strip() for name in settings.text_column.split(",")]
    read = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[path.suffixes[0]]
    places, problems = [], []
    for where, row in read(path, [*columns, settings.label_column]):
        try:
            text = " ".join(_text(row[name], name) for name in columns)
            places.append((where, text, _label(row[settings.label_column], settings.label_column)))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    _refuse(problems, path)
    if not places:
        raise ConfigError(f"{path} has no rows")
    return places


def _refuse(problems: list[str], path: Path) -> None:
    """Raises ConfigError with the first of the problems with a file's rows, if there are any."""
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ConfigError(problems[:SHOWN] + more, where=str(path))


def _text(value, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name} = {value!r}: must be text")
    return value


def _label(value, name: str) -> str:
    if not isinstance(value, str | int | None):
        raise ValueError(f"{name} = {value!r}: must be text or a whole number")
    label = "" if value is None else str(value).strip()
    if not label:
        raise ValueError(f"{name} is empty; every row needs a label")
    return label


def _csv(path: Path, wanted: list[str]) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts of 128 KiB
    reader = csv.reader(io.StringIO(_content(path), newline=""), strict=True)
    start = 1
    try:
        header = next(reader)
        _require_columns(path, header, wanted)
        start = reader.line_num + 1
        for fields in reader:
            where, start = f"line {start}", reader.line_num + 1
            if not fields:  # an empty line
                continue
            if len(fields) != len(header):
                raise ConfigError(
                    f"{where}: {len(fields)} fields, and the header has {len(header)}", str(path)
                )
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ConfigError(f"line {start}: not valid CSV: {error}", str(path)) from None


def _jsonl(path: Path, wanted: list[str]) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(_content(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"line {number}: not valid JSON: {error}", str(path)) from None
        if not isinstance(row, dict):
            raise ConfigError(f"line {number}: must be an object with {', '.join(wanted)}", str(path))
        _require_columns(path, list(row), wanted, f"line {number}: ")
        yield f"line {number}", row


def _parquet(path: Path, wanted: list[str]) -> Iterator[tuple[str, dict]]:
    names, columns = read_parquet(path)
    _require_columns(path, names, wanted)
    if nested := [name for name in wanted if name not in columns]:
        raise ConfigError(f"{', '.join(nested)}: must be a column of text or whole numbers", str(path))
    for number, values in enumerate(zip(*(columns[name] for name in wanted), strict=True), 1):
        yield f"row {number}", dict(zip(wanted, values, strict=True))


def _content(path: Path) -> str:
    content = read_file(path.parent, path.name.removesuffix(".xz")).removeprefix("\ufeff")
    if not content.strip():
        raise ConfigError(f"{path} is empty")
    return content


def _require_columns(path: Path, names: list[str], wanted: list[str], where: str = "") -> None:
    problems = [f"{where}column {column!r} is there twice" for column in wanted if names.count(column) > 1]
    for column in wanted:
        if column not in names:
            near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
            hint = f" (nearest: {near[0]})" if near else ""
            problems.append(f"{where}no column {column!r}{hint}; the columns are {', '.join(names)}")
    if problems:
        advice = "; set text_column and label_column to names of columns"
        raise ConfigError([problem + advice for problem in problems], where=str(path))


def _sorted(labels: set[str]) -> list[str]:
    numbers = all(re.fullmatch(r"[+-]?[0-9]+", label) for label in labels)
    return sorted(labels, key=lambda label: (int(label), label) if numbers else (0, label))


def _numbered(path: Path, places: list[Place], classes: list[str], column: str) -> list[Row]:
    numbers = {label: i for i, label in enumerate(classes)}
    known = f"no training row has it; the classes are {', '.join(classes)}"
    _refuse(
        [f"{where}: {column} = {label!r}: {known}" for where, _, label in places if label not in numbers],
        path,
    )
    return [(text, numbers[label]) for _, text, label in places]
