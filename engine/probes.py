"""What is measured at every step, kept on the device until it is written.

A step's numbers are copied to the host behind its back and read when they have arrived, so that neither waits for the
other. The medians leave out the first steps, which compile and warm up.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.rundir import Table

WARM_UP_STEPS = 3  # left out of medians, where there are more


def training_flops(parameters: int, model, tokens: int, length: int = 0) -> int:
    """Floating-point operations that training on `tokens` tokens needs: 6 N + 12 L C T a token.

    Of the model, not of how it was computed: what activation checkpointing repeats is not counted. `model`:
    engine.config.Model; N counts all `parameters`; T is `length`, where sequences were shorter than its context; C is
    what a query has in all heads, in latent attention heads × latent_width.
    Source: appendix B of PaLM (Chowdhery et al., 2022).
    """
    width = model.width
    if model.attention_form == "latent":
        width = model.latent_width * (model.heads if model.latent_query == "per_head" else 1)
    attention = 12 * model.layers * width * (length or model.context)
    return (6 * parameters + attention) * tokens


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

    def is_past(self, moment) -> bool:
        """Whether the device has reached `moment`."""
        return not self.on_gpu or moment.query()

    def seconds(self, start, stop) -> float:
        """The time between two moments; waits for the later one."""
        if not self.on_gpu:
            return stop - start
        stop.synchronize()
        return start.elapsed_time(stop) / 1000


class Recorder:
    """Collects the steps' measurements and writes steps.csv.

    A step's time runs from the end of the step before to its own end, so it holds everything that a step
    costs: waiting for data, launching, computing, recording. Evaluations and checkpoints are left out: call
    `interrupted` after one.
    """

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        *,
        batch_tokens: int,
        targets_per_sample: int,
        context: int,
        norm_layers: tuple[int, ...],
        gradient_layers: tuple[int, ...] = (),
        counters: tuple[str, ...] = (),
        parts: tuple[str, ...] = (),
        sees_memory: bool = True,
        recorded_bytes: Callable[[], int] = int,
    ):
        """targets_per_sample, context: targets and tokens of one sample; a step's targets are what is counted.

        counters: what the optimizer counts in an update. parts: names of the parts of the loss, if it has several.
        sees_memory: False where CUDA graphs hold tensors that the allocator does not count. recorded_bytes: where
        the peak of such a graph is known, its bytes."""
        self.clock, self.device, self.batch_tokens = StepClock(device), device, batch_tokens
        self.targets_per_sample, self.context = targets_per_sample, context
        self.distinct_share = 1.0  # of the samples that all ranks drew
        self._sees_memory = sees_memory and device.type == "cuda"
        self._recorded_bytes = recorded_bytes
        self.more_columns = [f"activation_norm_{i}" for i in norm_layers]
        self.more_columns += [f"gradient_norm_{i}" for i in gradient_layers]
        self.more_columns += counters
        self.parts = parts
        self.more_columns += [f"train_{part}" for part in parts]
        columns = [
            "step",
            "tokens_seen",
            "train_loss",
            "lr",
            "grad_norm",
            "step_seconds",
            "tokens_per_second",
            "samples_per_second",
            "data_wait_seconds",
            "peak_memory_gib",
            *self.more_columns,
        ]
        self.table = Table(directory / "steps.csv", columns, every_step=True)
        self._pending: list[tuple] = []
        self._start = None

    def count(self, batch_tokens: int, distinct_share: float) -> None:
        """What counts of a step, now that it is known what the ranks drew."""
        self.batch_tokens, self.distinct_share = batch_tokens, distinct_share

    def interrupted(self) -> None:
        """The next step's time starts now, and its peak memory is its own."""
        self._start = self.clock.now()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def add(self, step: int, measured: dict, *, data_wait_seconds: float) -> None:
        """Note the step that ends now. Its numbers are on their way to the host; nothing waits for them."""
        peak = None
        if self._sees_memory:
            peak = max(torch.cuda.max_memory_allocated(self.device), self._recorded_bytes()) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
        names = ("train_loss", "grad_norm", "targets")
        more = [measured[n] for n in ("activation_norms", "gradient_norms", "counters")]
        more += [measured["parts"]] if self.parts else []
        values = torch.cat([torch.stack([measured[n] for n in names]), *more])
        if self.device.type == "cuda":
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        stop = self.clock.now()
        fields = {"step": step, "lr": measured["lr"], "data_wait_seconds": data_wait_seconds}
        self._pending.append((fields | {"peak_memory_gib": peak}, values, self._start, stop))
        self._start = stop

    def flush(self, *, wait: bool = True) -> list[dict]:
        """Write the pending steps and return them as rows of plain numbers.

        wait=False: only those that the device has finished, so that the host need not wait for it.
        """
        # In order, to the first that is not there: one after it may have ended since the device was asked.
        ready = list(itertools.takewhile(lambda p: wait or self.clock.is_past(p[-1]), self._pending))
        rows = [self._row(*pending) for pending in ready]
        if rows:
            self.table.append(rows)
            self._pending = self._pending[len(rows) :]
        return rows

    def _row(self, fields: dict, values: torch.Tensor, start, stop) -> dict:
        seconds = self.clock.seconds(start, stop)  # waits for `stop`, and so for the copy of `values`
        loss, grad_norm, targets, *more = values.tolist()
        samples = targets / self.targets_per_sample * self.distinct_share
        return {
            **fields,
            "tokens_seen": (fields["step"] + 1) * self.batch_tokens,
            "train_loss": loss,
            "grad_norm": grad_norm,
            "step_seconds": seconds,
            "tokens_per_second": samples * self.context / seconds,
            "samples_per_second": samples / seconds,
            **dict(zip(self.more_columns, more, strict=True)),
        }


def steady(values: list[float]) -> float:
    """The median without the warm-up steps."""
    return statistics.median(values[WARM_UP_STEPS:] or values)


def progress_line(**fields) -> None:
    """Print one JSON line, the machine-readable progress of a run."""
    print(json.dumps(fields), flush=True)
