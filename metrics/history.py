"""The figures of one study as its revisions reported them, in order of time: which runs' changed, and by how much.

A difference between two revisions has no interval, and settings, data or machine may have changed between them: it is
never a verdict. Must not read a repository or write files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from metrics.measures import METRICS
from metrics.words import number

Figures = dict[str, dict[str, Any]]  # run → what reports/<study>/metrics/<run>.json holds
SPEEDS = ("tokens_per_second", "samples_per_second")
SCHEMA = {
    "place": pl.Int64,
    "revision": pl.String,
    "aside": pl.Boolean,
    "run": pl.String,
    "value": pl.Float64,
}


@dataclass(frozen=True)
class Revision:
    """A commit, an experiment or the workspace, with what it says of the study's runs."""

    name: str
    date: str
    says: str
    runs: Figures
    before: Figures = field(default_factory=dict)  # of the commit that it came from
    aside: bool = False  # an experiment, which nothing came from


@dataclass(frozen=True)
class Change:
    """A run whose figures are not what they were. None: not measured, or no number."""

    revision: Revision
    run: str
    value: float | None  # as in the rows: a share from 0 to 1
    difference: float | None  # to the revision that it came from
    speed: float | None  # tokens/s, or samples/s
    memory: float | None  # peak, GiB
    verdict: str


def figures(revisions: Iterable[Revision]) -> tuple[str, ...]:
    """The metrics that any run of theirs has, that of the study first: as its files have them, newest first."""
    newest_first = reversed(list(revisions))
    found = (name for one in newest_first for own in one.runs.values() for name in own)
    return tuple(dict.fromkeys(name for name in found if name in METRICS))


def changes(revisions: Iterable[Revision], metric: str) -> list[Change]:
    """A row for each revision and run whose figures, any of them, differ from before; in the order given.

    A run that has not run yet is none.
    """
    return [
        Change(
            one,
            run,
            value,
            None if value is None or before is None else value - before,
            next((speed for name in SPEEDS if (speed := _number(own, name)) is not None), None),
            _number(own, "peak_memory_gib"),
            str(own.get("verdict", "–")),
        )
        for one in revisions
        for run, own in one.runs.items()
        if own != one.before.get(run) and (run in one.before or own.get("verdict") != "missing")
        for value, before in [(_number(own, metric), _number(one.before.get(run, {}), metric))]
    ]


def ends(found: Sequence[Change]) -> list[tuple[Change, Change]]:
    """Of each run the first and the last revision that measured it, experiments apart; none of a run with one."""
    kept: dict[str, list[Change]] = {}
    for one in found:
        if one.value is not None and not one.revision.aside:
            kept.setdefault(one.run, []).append(one)
    return [(own[0], own[-1]) for own in kept.values() if len(own) > 1]


def then_and_now(old: Change, new: Change, metric: str) -> str:
    """A run's first revision against its last, in a sentence."""
    assert old.value is not None and new.value is not None
    of = METRICS[metric]
    before, after = (number(one.value * of.factor) for one in (old, new))
    by = f"{signed(new.value - old.value, metric)} {of.difference_unit}".strip()
    said = [f"{new.run}, {old.revision.name} → {new.revision.name}: {of.label} {before} → {after} ({by})"]
    if old.speed and new.speed:
        said.append(f"speed {new.speed / old.speed:.2f} ×")
    if old.memory and new.memory:
        said.append(f"peak memory {new.memory / old.memory:.2f} ×")
    return ", ".join(said)


def signed(difference: float | None, metric: str) -> str:
    """A difference in the unit that is shown, with its sign."""
    sign = "+" if difference and difference > 0 else ""
    return "–" if difference is None else sign + number(difference * METRICS[metric].factor)


def frame(found: Sequence[Change], metric: str) -> pl.DataFrame:
    """A row a change that has a value: place (of its revision, from 0), revision, aside, run, value as shown."""
    names = list(dict.fromkeys(one.revision.name for one in found))
    rows = [
        (
            names.index(one.revision.name),
            one.revision.name,
            one.revision.aside,
            one.run,
            one.value * METRICS[metric].factor,
        )
        for one in found
        if one.value is not None
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _number(own: dict[str, Any], name: str) -> float | None:
    """A file says in words what is not finite."""
    value = own.get(name)
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None
