"""What a run's processes print: passed on, and kept as output.log in the run's directory.

The engine makes that directory anew, and DVC removes it before. So lines are written to a file beside it,
.<run>-<seed>.log, of which the engine makes output.log a second name (engine/rundir.py). A run that is started again
with the same settings after an interruption goes on in that file. It goes when the run has ended; output.log stays.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from engine import children
from engine.rundir import OUTPUT, only_mine, output_beside

STARTED = "started"  # event of the line before what each start printed
PATIENCE_SECONDS = 5  # for the last lines of a process that has ended, whose stderr another one still holds


class Kept:
    """A context in which `write` keeps lines of the run in `directory`; threads may share it.

    Nothing is kept where another process keeps this run's output: it is training the run, and the engine refuses.
    """

    def __init__(self, directory: Path, settings: str):
        """settings: their hash, by which a run that was interrupted is known again."""
        self.directory, self.settings, self.path = directory, settings, output_beside(directory)
        self._turn, self._file = threading.Lock(), None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._opened()
        if self._file and not self._goes_on():
            self.path.unlink()  # and not emptied: what a directory has as its output.log is its own
            self._file.close()
            self._file = self._opened()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.write(json.dumps({"event": STARTED, "at": now, "config_sha256": self.settings}))
        return self

    def _opened(self):
        file = self.path.open("ab", buffering=0)
        if only_mine(file):
            return file
        file.close()
        return None

    def _goes_on(self) -> bool:
        """Whether what is there is of an interrupted run with these settings, or nothing is."""
        start = f'{{"event": "{STARTED}"'.encode()
        starts = [line for line in self.path.read_bytes().splitlines() if line.startswith(start)]
        same = not starts or self.settings.encode() in starts[-1]
        return same and not (self.directory / "metrics.json").exists()

    def write(self, line: str) -> None:
        """Add a line, at once. That it cannot be written is said once, and the run goes on without."""
        data = (line.removesuffix("\n") + "\n").encode("utf-8", "backslashreplace")
        with self._turn:
            try:
                if self._file:
                    self._file.write(data)
            except OSError as error:
                self._file.close()
                self._file = None
                print(f"{self.path}: {error.strerror}; the rest is not kept", file=sys.stderr, flush=True)

    def ended(self) -> None:
        """The run is complete, or diverged: the file beside its directory goes, output.log stays."""
        if self._file is None:
            return
        kept = self.directory / OUTPUT
        if not (kept.exists() and kept.samefile(self.path)):  # a file system without links
            shutil.copyfile(self.path, kept)
        self.path.unlink()

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()


def run(command: list[str], kept: Kept, show: Callable[[Iterable[str]], None]) -> int:
    """Run `command` to its end, `show` its stdout line by line, pass on its stderr, keep both; its exit status."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    text = {"text": True, "encoding": "utf-8", "errors": "backslashreplace"}
    at_once = {**os.environ, "PYTHONUNBUFFERED": "1"}  # so that what a killed process has printed is here
    with children.start(command, env=at_once, **pipes, **text) as process:
        errors = threading.Thread(target=_pass_on, args=(process.stderr, kept), daemon=True)
        errors.start()
        try:
            show(kept.write(line) or line for line in process.stdout)
        except BaseException:
            process.terminate()
            process.stdout.close()
            raise
        finally:
            process.wait()
            errors.join(PATIENCE_SECONDS)
    return process.returncode


def _pass_on(errors: Iterable[str], kept: Kept) -> None:
    """To the end, also where nobody reads this process's stderr any more: else the other one would wait."""
    for line in errors:
        kept.write(line)
        with contextlib.suppress(OSError):
            print(line, end="", file=sys.stderr, flush=True)
