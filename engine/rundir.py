"""A run's directory: one writer at a time, files that are whole or absent.

    results/<study>/<run>-<seed>/
        config.toml  ledger.json  env.json  events.jsonl  steps.csv  evals.csv  metrics.json  model.safetensors
        and, of a run with profile_steps, trace.json.gz  profile.json

`metrics.json` is written last: a directory without it is an incomplete run.
"""

import contextlib
import csv
import fcntl
import json
import os
from pathlib import Path

import tomli_w

from engine.config import Config, tables
from engine.errors import ConfigError


@contextlib.contextmanager
def only_writer(directory: Path):
    """Hold the lock beside `directory`; raise ConfigError when another process holds it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = directory.parent / f".{directory.name}.lock"
    with lock.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            raise ConfigError(
                f"process {handle.read().strip() or '?'} is writing it; wait for it, or stop it first",
                str(directory),
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def write_json(path: Path, value) -> None:
    """Write `value` whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def append_event(directory: Path, event: str, **details) -> None:
    """Add one line to events.jsonl."""
    with (directory / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, **details}) + "\n")


class Table:
    """An append-only CSV file with fixed columns; floats are written exactly (shortest repr)."""

    def __init__(self, path: Path, columns: list[str]):
        self.path, self.columns = path, columns
        if not path.exists():
            self._write("w", [columns])

    def _write(self, mode: str, rows: list[list]) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    def append(self, rows: list[dict]) -> None:
        """Add `rows`; a missing or None value is an empty cell."""
        cells = [["" if row.get(c) is None else row[c] for c in self.columns] for row in rows]
        self._write("a", cells)

    def read(self) -> list[dict]:
        """All rows, as text."""
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def toml(config: Config, only: tuple[str, ...] = ()) -> str:
    """The resolved settings as TOML text, without those that have no effect; `only`: just these sections."""
    kept = {
        section: values
        for section, values in tables(config).items()
        if values and (not only or section in only)
    }
    return tomli_w.dumps(kept)
