"""What is measured at every step, kept on the device until it is written.

A step's numbers are read from the device only when a progress line is due, so that no step waits for the host.
Step times exclude evaluation and checkpoints; the medians also exclude the first steps, which compile and warm up.
"""

import json
import statistics
import time
from pathlib import Path

import torch

from engine.rundir import Table

WARM_UP_STEPS = 3  # left out of medians, where there are more


class StepClock:
    """Seconds between `start` and `stop`, on device events where there is a GPU: no synchronisation."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def now(self):
        """A moment: an event recorded in the device's stream, or the host's clock."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, stop) -> float:
        """The time between two moments; waits for the later one."""
        if not self.on_gpu:
            return stop - start
        stop.synchronize()
        return start.elapsed_time(stop) / 1000


class Recorder:
    """Collects the steps' measurements and writes steps.csv."""

    def __init__(
        self, directory: Path, device: torch.device, *, batch_tokens: int, norm_layers: tuple[int, ...]
    ):
        self.clock, self.device, self.batch_tokens = StepClock(device), device, batch_tokens
        self.norm_columns = [f"activation_norm_{i}" for i in norm_layers]
        columns = [
            "step",
            "tokens_seen",
            "train_loss",
            "lr",
            "grad_norm",
            "step_seconds",
            "tokens_per_second",
            "peak_memory_gib",
            *self.norm_columns,
        ]
        self.table = Table(directory / "steps.csv", columns)
        self._pending: list[tuple] = []

    def add(self, step: int, measured: dict, start, stop) -> None:
        """Note one step. Its tensors stay on the device."""
        peak = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
        self._pending.append((step, measured, start, stop, peak))

    def flush(self) -> list[dict]:
        """Write what is pending; return it as rows of plain numbers."""
        if not self._pending:
            return []
        scalars = torch.stack(
            [torch.stack([m["train_loss"], m["grad_norm"], m["targets"]]) for _, m, *_ in self._pending]
        )
        norms = torch.stack([m["activation_norms"] for _, m, *_ in self._pending])
        values = torch.cat([scalars, norms], 1).tolist()  # the only transfer from the device
        rows = []
        for (step, measured, start, stop, peak), (loss, grad_norm, targets, *norms) in zip(
            self._pending, values, strict=True
        ):
            seconds = self.clock.seconds(start, stop)
            rows.append(
                {
                    "step": step,
                    "tokens_seen": (step + 1) * self.batch_tokens,
                    "train_loss": loss,
                    "lr": measured["lr"],
                    "grad_norm": grad_norm,
                    "step_seconds": seconds,
                    "tokens_per_second": targets / seconds,
                    "peak_memory_gib": peak,
                    **dict(zip(self.norm_columns, norms, strict=True)),
                }
            )
        self.table.append(rows)
        self._pending = []
        return rows


def steady(values: list[float]) -> float:
    """The median without the warm-up steps."""
    return statistics.median(values[WARM_UP_STEPS:] or values)


def progress_line(**fields) -> None:
    """Print one JSON line, the machine-readable progress of a run."""
    print(json.dumps(fields), flush=True)
