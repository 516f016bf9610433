"""What the machine does while a run takes its steps, sampled by a thread: device.csv, and means and maxima.

Of the first process and its device. The GPU's figures are the driver's own (engine/nvml.py): its memory is all that
is taken of the GPU, by anybody. Of the process, resident memory and the CPU time of all threads: 100 % is one core.
A figure that cannot be read here is empty, never 0. Nothing is sampled in evaluations and checkpoints.
"""

import contextlib
import csv
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import torch

from engine.ledger import Line
from engine.nvml import Gpu, NvmlError

FILE = "device.csv"
OF_GPU = (
    "device_memory_gib",
    "device_utilization_percent",
    "temperature_celsius",
    "power_watts",
    "sm_clock_mhz",
    "thermal_throttle",
    "power_cap",
)
OF_PROCESS = ("process_memory_gib", "process_cpu_percent")
COLUMNS = ("step", "seconds", *OF_GPU, *OF_PROCESS)
FLAGS = ("thermal_throttle", "power_cap")  # 1: clocks were below what was asked for, for this reason
Reader = Callable[[], dict[str, float | None]]


class Process:
    """Reads this process's memory and CPU time."""

    def __init__(self):
        self._cpu, self._at = time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float | None]:
        """Resident memory now, and CPU use since the last call."""
        cpu, at = time.process_time(), time.perf_counter()
        used, self._cpu, passed, self._at = cpu - self._cpu, cpu, at - self._at, at
        return {
            "process_memory_gib": _resident_gib(),
            "process_cpu_percent": 100 * used / passed if passed > 0 else None,
        }


def _resident_gib(statm: str = "/proc/self/statm") -> float | None:
    """Resident memory; None where the system has no such file."""
    try:
        pages = int(Path(statm).read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def gpu_reader(device: torch.device) -> tuple[Reader | None, str]:
    """How to read the GPU, and if it cannot be, why not; neither on a CPU."""
    if device.type != "cuda":
        return None, ""
    try:
        gpu = Gpu.of(torch.cuda.get_device_properties(device))
        gpu.read()
        return gpu.read, ""
    except (NvmlError, AttributeError) as error:  # a driver that is too old has not all functions
        return None, f"no figures of the GPU: {error}"


class Monitor:
    """A context around a run's steps; afterwards `rows` has what was sampled. One of interval 0 does nothing."""

    def __init__(self, interval: float, device: torch.device, readers: list[Reader] | None = None):
        """interval: seconds; readers: in place of the device's and the process's."""
        self.interval, self.rows = interval, []
        self.step = 0  # the trainer's newest
        self.busy_seconds = 0.0  # that sampling took, of the thread's own time
        self.problem = ""  # why something could not be read
        self._began, self._readers, self._device = 0.0, readers, device
        self._stop, self._lock, self._thread = threading.Event(), threading.Lock(), None
        self._paused, self._process = False, None

    def __enter__(self) -> Self:
        if self.interval:
            if self._readers is None:
                gpu, self.problem = gpu_reader(self._device)
                self._process = Process()
                self._readers = [*([gpu] if gpu else []), self._process.read]
            self._began = time.perf_counter()
            self._thread = threading.Thread(target=self._sample, name="device monitor", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *raised) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is sampled inside."""
        with self._lock:
            self._paused = True
        try:
            yield
        finally:
            with self._lock:
                self._paused = False
                if self._process:
                    self._process.read()  # what it did meanwhile is in no row

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self.sample()

    def sample(self) -> None:
        """Add a row, unless sampling is paused."""
        with self._lock:  # a pause begins after the row, not in it
            if self._paused:
                return
            start = time.perf_counter()
            row: dict[str, float | None] = {"step": self.step, "seconds": start - self._began}
            for read in self._readers or ():
                row |= read()
            self.rows.append(row)
            self.busy_seconds += time.perf_counter() - start

    def write(self, directory: Path, last: int | None = None) -> None:
        """Write the rows, up to step `last`, to the run's file; of a resumed run they are those of its last part."""
        if not self.interval:
            return
        rows = [row for row in self.rows if last is None or row["step"] <= last]
        cells = [["" if row.get(c) is None else row[c] for c in COLUMNS] for row in rows]
        with (directory / FILE).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *cells])

    def figures(self) -> dict[str, float | None]:
        """For metrics.json: mean and maximum of each column, of a flag its share of the samples; None: not read."""
        if not self.interval:
            return {}
        found: dict[str, float | None] = {"monitor_samples": len(self.rows)}
        for name in (*OF_GPU, *OF_PROCESS):
            values = [row[name] for row in self.rows if row.get(name) is not None]
            mean = statistics.fmean(values) if values else None
            if name in FLAGS:
                found[f"{name}_share"] = mean
            else:
                found |= {f"{name}_mean": mean, f"{name}_max": max(values) if values else None}
        return found

    def lines(self) -> list[Line]:
        """The ledger's line: how many samples there are, and what taking them cost."""
        if not self.interval:
            return []
        count = len(self.rows)
        each = f", {1000 * self.busy_seconds / count:.2f} ms each" if count else ""
        unread = [n for n in (*OF_GPU, *OF_PROCESS) if all(row.get(n) is None for row in self.rows)]
        how = f"rows of {FILE}{each}, in a thread of their own"
        how += (
            f"; {self.problem}" if self.problem else f"; not read here: {', '.join(unread)}" if unread else ""
        )
        return [
            Line(
                "monitor_interval",
                f"every {self.interval:g} s",
                f"{count} samples",
                how,
                count > 0 and not self.problem,
            )
        ]
