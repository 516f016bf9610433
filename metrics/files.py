"""The files of one run, other than its tables of numbers: read, and refused by name where they are malformed.

Must not know which files a run has, nor compute a metric.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from metrics import checks, columns
from metrics.checks import ResultsError


def json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{path} is missing although the run is complete: run it again.") from None
    except ValueError as error:
        raise ResultsError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ResultsError(f"{path} must hold one JSON object, got {type(value).__name__}")
    return value


def latency(
    path: Path, config: dict[str, Any], ledger: tuple[dict[str, Any], ...] = ()
) -> tuple[dict[str, float], ...]:
    """The figures of each length; none where it was not asked for, or, as the ledger says, could not be measured."""
    failed = {"what": "latency_lengths", "in_effect": "not measured"}.items()
    if not config.get("latency_lengths") or any(failed <= line.items() for line in ledger):
        return ()
    found = json_object(path).get("lengths")
    if not isinstance(found, list) or not found:
        raise ResultsError(
            f"{path} must hold a list 'lengths' of objects with {', '.join(columns.LATENCY_KEYS)}"
        )
    for one in found:
        checks.require_numbers(path, one if isinstance(one, dict) else {}, columns.LATENCY_KEYS)
    return tuple(found)


def scaling(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What the run's probe timed; nothing where it was not asked to."""
    if not config.get("scaling_probe_steps"):
        return {}
    found = json_object(path)
    checks.require_scaling(path, found)
    return found


def ledger(path: Path) -> tuple[dict[str, Any], ...]:
    """Its lines."""
    entries = json_object(path).get("entries")
    keys = {"what", "requested", "in_effect", "how", "agrees"}
    if not isinstance(entries, list) or not all(isinstance(e, dict) and keys <= e.keys() for e in entries):
        raise ResultsError(f"{path} must hold a list 'entries' of objects with {', '.join(sorted(keys))}")
    return tuple(entries)


def events(path: Path) -> tuple[dict[str, Any], ...]:
    """The objects of a file with one JSON object a line; none where there is no file."""
    if not path.is_file():
        return ()
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError as error:
            raise ResultsError(f"{path}, line {number}, is not valid JSON: {error}") from error
        if not isinstance(event, dict):
            raise ResultsError(f"{path}, line {number}, must be a JSON object, got {event!r}")
        found.append(event)
    return tuple(found)


def samples(path: Path) -> tuple[dict[str, Any], ...]:
    """What the model wrote, in order."""
    found = events(path)
    types = {"step": int, "prompt": str, "text": str}
    for number, one in enumerate(found, start=1):
        if not all(isinstance(one.get(k), t) for k, t in types.items()):
            raise ResultsError(
                f"{path}, sample {number}, must have a whole number step and the texts prompt and text"
            )
    return found


def config(path: Path) -> dict[str, Any]:
    """The resolved settings, flat: the names are unique over the sections."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{path} is missing although the run is complete: run it again.") from None
    except tomllib.TOMLDecodeError as error:
        raise ResultsError(f"{path} is not valid TOML: {error}") from error
    return {key: value for table in tables.values() for key, value in table.items()}
