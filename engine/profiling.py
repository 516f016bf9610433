"""A trace of a few steps (profile_steps) and how their time divides: trace.json.gz and profile.json.

Off, which is the default, `part` is an empty context and nothing is imported. The trace's analysis is in
engine/timeline.py.
"""

import contextlib
import gzip
import json
import os
from pathlib import Path
from typing import Self

from engine import rundir
from engine.config import Runtime
from engine.ledger import Line

PREFIX = "plumbline/"
END_OF_STEP = PREFIX + "end of step"

_NOTHING = contextlib.nullcontext()


class _Trace:
    range = None  # what marks a part while a trace is taken: torch.profiler.record_function


def part(name: str):
    """Context for a part of a step: data, forward, backward or optimizer. Parts must not overlap.

    Not for use inside compiled code.
    """
    return _NOTHING if _Trace.range is None else _Trace.range(PREFIX + name)


class Profiler:
    """Traces profile_steps steps of this process, the first of them `first_step` + 1. A context around the loop."""

    def __init__(self, settings: Runtime, directory: Path, *, first_step: int, active: bool = True):
        """`first_step` runs under the profiler already, unmarked: the first one is slower than those after it.

        active: False where another process takes the trace.
        """
        self.wanted = settings.profile_steps if active else 0
        self.traced = 0
        self._directory, self._first_step = directory, first_step
        self._profile = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, *_) -> None:
        """A run that ends before all steps are traced leaves the trace of those there are."""
        if self._profile is None:
            return
        profile = self._stop()
        if kind is None and self.traced:
            self._write(profile)

    def step(self, step: int) -> bool:
        """Call it at the end of every step. True: it did work of its own, which is no part of the next step."""
        if not self.wanted or self.traced == self.wanted or step < self._first_step - 1:
            return False
        if step == self._first_step - 1:
            self._start()
        elif step == self._first_step:
            self._mark()
        else:
            with part("end of step"):
                pass
            self.traced += 1
            if self.traced < self.wanted:
                return False
            self._write(self._stop())
        return True

    def _start(self) -> None:
        import torch
        from torch.autograd.profiler import profile

        device = "cuda" if torch.cuda.is_initialized() else None  # a CPU run may be beside a GPU
        self._profile = profile(use_cpu=True, use_device=device, use_kineto=True)
        self._profile.__enter__()

    def _mark(self) -> None:
        from torch.autograd.profiler import record_function

        _Trace.range = record_function

    def _stop(self):
        _Trace.range = None
        profile, self._profile = self._profile, None
        profile.__exit__(None, None, None)  # waits for the device
        return profile

    def _write(self, profile) -> None:
        from engine.timeline import split

        plain, partial = (self._directory / f"trace.partial.json{end}" for end in ("", ".gz"))
        profile.export_chrome_trace(str(plain))
        text = plain.read_text(encoding="utf-8")
        plain.unlink()
        with gzip.open(partial, "wt", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, self._directory / "trace.json.gz")
        found = {"first_step": self._first_step + 1, **split(json.loads(text)["traceEvents"])}
        rundir.write_json(self._directory / "profile.json", found)

    def lines(self) -> list[Line]:
        """How many steps were traced; nothing where no trace was asked for."""
        if not self.wanted:
            return []
        found = str(self.traced)
        return [
            Line(
                "profile_steps", str(self.wanted), found, "steps in trace.json.gz", self.traced == self.wanted
            )
        ]
