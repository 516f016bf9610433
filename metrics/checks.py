"""Whether a file of results is what its place says: of that run, with the settings planned, its steps in order.

Used by `metrics.rows` and `metrics.files`, the only readers. Must not repair or leave out anything: what is wrong
is refused.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import polars as pl

from metrics.measures import AXES


class ResultsError(Exception):
    """Results are missing or a file of theirs is malformed; the message names the file and what to do."""


AGAIN = "Remove it and run `dvc repro`."


def require_identity(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ResultsError if `found`, the content of `path`, says that it is of another run.

    expected: some of study, run, seed and config_sha256.
    """
    others = [
        f"{key} {found[key]!r}, not {value!r}"
        for key, value in expected.items()
        if key in found and found[key] != value
    ]
    if others:
        raise ResultsError(f"{path} is of {'; '.join(others)}: copied from elsewhere? {AGAIN}")


def is_of(plan: Path, metrics: dict[str, Any]) -> bool:
    """Whether a run with these metrics had the settings of the file `plan`; yes where one of them does not say."""
    asked = metrics.get("config_sha256")
    return asked is None or not plan.is_file() or hashlib.sha256(plan.read_bytes()).hexdigest() == asked


def require_order(path: Path, steps: pl.Series, every_step: bool, expected: int | None) -> None:
    """Raise ResultsError for the first line of the table `path` whose step does not follow from the line before.

    every_step: it must be the next one. expected: how many rows there must be.
    """
    before = None
    for line, step in enumerate(steps, start=2):
        if before is not None and (step is None or step <= before or (every_step and step != before + 1)):
            raise ResultsError(
                f"{path}, line {line}: step {step} after step {before}. Two runs wrote it, or rows are lost. {AGAIN}"
            )
        before = step
    if expected is not None and len(steps) != expected:
        raise ResultsError(f"{path} has {len(steps)} rows, and metrics.json says {expected} steps. {AGAIN}")


def require_numbers(path: Path, values: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Raise ResultsError unless each of `keys` is there, and a number or null."""
    for key in keys:
        if key not in values:
            raise ResultsError(f"{path} lacks {key}")
        value = values[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ResultsError(f"{path}: {key} must be a number, got {value!r}")


def require_budgets(path: Path, values: dict[str, Any]) -> None:
    """What an axis compares, where it is there, must be finite: no comparison with NaN is ever false."""
    present = tuple(axis.key for axis in AXES.values() if values.get(axis.key) is not None)
    require_numbers(path, values, present)
    for key in present:
        if not math.isfinite(values[key]):
            raise ResultsError(f"{path}: {key} must be finite, got {values[key]!r}")


def require_scaling(path: Path, values: dict[str, Any]) -> None:
    """Raise ResultsError unless `values` is what a probe of steps writes: counts, and seconds of each rank."""
    for key in ("ranks", "batch_size", "samples_drawn", "samples_distinct", "steps", "turns"):
        if type(values.get(key)) is not int or values[key] < 1:
            raise ResultsError(f"{path}: {key} must be a whole number ≥ 1, got {values.get(key)!r}. {AGAIN}")
    drawn, distinct = values["samples_drawn"], values["samples_distinct"]
    if distinct > drawn:
        raise ResultsError(f"{path}: {distinct} distinct samples of {drawn} drawn cannot be. {AGAIN}")
    for key in ("loaded_seconds", "ready_seconds", "alone_seconds"):
        seconds = values.get(key)
        if key == "alone_seconds" and seconds is None and isinstance(values.get("exchange"), str):
            continue
        good = isinstance(seconds, list) and all(
            type(s) in (int, float) and 0 < s < math.inf for s in seconds
        )
        if not good or len(seconds) != values["ranks"]:
            raise ResultsError(
                f"{path}: {key} must be the seconds of each of {values['ranks']} ranks, got {seconds!r}. {AGAIN}"
            )
