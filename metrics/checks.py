"""Whether a file of results is what its place says: of that run, with the settings planned, its steps in order.

Used by `metrics.rows`, the only reader. Must not repair or leave out anything: what is wrong is refused.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import polars as pl


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
