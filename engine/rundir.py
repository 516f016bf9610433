"""A run's directory: one writer at a time, files that are whole or absent.

    results/<study>/<run>-<seed>/
        config.toml  ledger.json  env.json  events.jsonl  steps.csv  evals.csv  metrics.json  model.safetensors
        tokenizer.json
        and, of a run with sample_tokens, samples.jsonl; with profile_steps, trace.json.gz  profile.json; with
        scaling_probe_steps, scaling.json; with noise_scale_interval, noise_scale.csv; with attention_sequences,
        attention.csv; with latency_lengths, latency.json; with monitor_interval, device.csv; with pruning,
        sparsity.csv; with keep_best, best.safetensors; where stages/train.py started it, output.log

`metrics.json` is written last and removed first: a directory without it is an incomplete run. It says whose it is;
of a run that a guard stopped it says that and no more, and there is no model.
"""

import contextlib
import csv
import difflib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import tomli_w

from engine.config import Config, tables
from engine.errors import ConfigError

OUTPUT = "output.log"
MOST_NAMED = 8  # runs of a study, where one of them is asked for


def only_mine(file) -> bool:
    """Lock an open file until it is closed; False where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def only_writer(directory: Path):
    """Hold the lock beside `directory`; raise ConfigError when another process holds it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = directory.parent / f".{directory.name}.lock"
    with lock.open("a+") as handle:
        if not only_mine(handle):
            handle.seek(0)
            raise ConfigError(
                f"process {handle.read().strip() or '?'} is writing it; wait for it, or stop it first",
                str(directory),
            )
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def identity(config: Config) -> dict:
    """Whose figures a file holds: study, run, seed, and a hash of the settings that were asked for."""
    r = config.run
    settings = hashlib.sha256(toml(config).encode()).hexdigest()
    return {"study": r.study, "run": r.run, "seed": r.seed, "config_sha256": settings}


def read_outcome(directory: Path) -> dict:
    """metrics.json of a run that ended, complete or diverged.

    Raises ConfigError if it did not, or the directory is not there or no run's; it says what may have been meant.
    """
    try:
        return json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(_why_no_outcome(directory), str(directory)) from None


def _why_no_outcome(directory: Path) -> str:
    if not directory.exists():
        return "no such directory" + _nearest(directory)
    if not directory.is_dir():
        return "is a file; a run's directory is wanted"
    if _is_run(directory):
        return "no metrics.json: the run is not complete, so there is no final model"
    if said := _runs_of(directory):
        return f"is a study's directory; {said}"
    if (directory / "configs").is_dir():
        return "is a study's directory, of which no run was started; `dvc exp run` trains them"
    return "is no run's directory: it has neither metrics.json nor config.toml"


def _is_run(directory: Path) -> bool:
    """What `make_anew` makes first, and what a run's directory has from its first step on."""
    return any((directory / name).is_file() for name in ("events.jsonl", "config.toml", "metrics.json"))


def _runs_of(study: Path) -> str:
    """Which runs a study's directory has, in words; nothing if it has none."""
    runs = [one for one in sorted(study.iterdir()) if one.is_dir() and _is_run(one)]
    ended = [one for one in runs if (one / "metrics.json").is_file()]
    names = [one.name for one in ended or runs]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    listed = ", ".join(names[:MOST_NAMED]) + more
    if ended:
        return f"its runs are {listed}: name one of them, as in {ended[0]}"
    return f"none of its runs is complete: {listed}" if runs else ""


def _nearest(directory: Path) -> str:
    """Behind 'no such directory': the one with the nearest name, or what there is where it should have been."""
    missing = directory
    while not missing.parent.is_dir():
        missing = missing.parent
    there = {one.name: one for one in missing.parent.iterdir() if one.is_dir()}
    if near := difflib.get_close_matches(missing.name, there, n=1):
        meant = there[near[0]] / directory.relative_to(missing)
        return f" (nearest: {meant if meant.is_dir() else there[near[0]]})"
    said = _runs_of(missing.parent) if missing == directory else ""
    return f"; {missing.parent} is a study's directory: {said}" if said else ""


def make_anew(directory: Path) -> None:
    """Make the directory with nothing in it but an empty events.jsonl, and OUTPUT where that is being kept.

    What looks complete goes first.
    """
    if directory.exists():
        (directory / "metrics.json").unlink(missing_ok=True)
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    (directory / "events.jsonl").touch()
    _link_output(directory)


def output_beside(directory: Path) -> Path:
    """Where what the run prints is kept while it has not ended; this and OUTPUT are then one file."""
    return directory.parent / f".{directory.name}.log"


def _link_output(directory: Path) -> None:
    path = output_beside(directory)
    with contextlib.suppress(OSError):  # there is none, or no links on this file system
        with path.open("rb") as file:
            if only_mine(file):
                return  # left by a process that is gone
        os.link(path, directory / OUTPUT)


def write_json(path: Path, value) -> None:
    """Write `value` whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def append_event(directory: Path, event: str, **details) -> None:
    """Add one line to events.jsonl."""
    with (directory / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, **details}) + "\n")


def append_sample(directory: Path, step: int, sample: dict[str, str]) -> None:
    """Add one line to samples.jsonl."""
    with (directory / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n")


def cut_samples(directory: Path, step: int) -> None:
    """Leave the samples up to `step`."""
    path = directory / "samples.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(x for x in lines if json.loads(x)["step"] <= step), encoding="utf-8")


class Table:
    """An append-only CSV file with fixed columns, `step` among them; floats are written exactly (shortest repr).

    Steps only go up; with `every_step` from 0 by 1.
    """

    def __init__(self, path: Path, columns: list[str], *, every_step: bool = False):
        self.path, self.columns, self.every_step = path, columns, every_step
        if not path.exists():
            self._write("w", [columns])
        rows = self.read()
        self._last, self._size = int(rows[-1]["step"]) if rows else -1, path.stat().st_size

    def _write(self, mode: str, rows: list[list]) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        self._size = self.path.stat().st_size

    def append(self, rows: list[dict]) -> None:
        """Add `rows`; a missing or None value is an empty cell.

        Raises RuntimeError, and adds nothing, for a step that does not follow and for a file that another writes too.
        """
        size, last = self.path.stat().st_size, self._last
        if size != self._size:
            raise RuntimeError(
                f"{self.path}: another process writes it: {size} bytes, {self._size} are this one's"
            )
        for row in rows:
            if row["step"] <= last or (self.every_step and row["step"] != last + 1):
                raise RuntimeError(f"{self.path}: step {row['step']} does not follow step {last}")
            last = row["step"]
        self._write("a", [["" if row.get(c) is None else row[c] for c in self.columns] for row in rows])
        self._last = last

    def cut(self, last: int) -> None:
        """Remove the rows after step `last`."""
        rows = [row for row in self.read() if int(row["step"]) <= last]
        self._write("w", [self.columns, *([row[c] for c in self.columns] for row in rows)])
        self._last = int(rows[-1]["step"]) if rows else -1

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
