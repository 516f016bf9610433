"""What a study can measure and compare: each metric with its unit and its better side, and the axes of comparison.

One place for these facts: the plan checks a study against them, summaries and tables read them. Must import no
library: the plan stage loads this before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metrics.rows import RunSeed


@dataclass(frozen=True)
class Metric:
    """How one number of a finished run is called, where it is, and which side is better."""

    label: str
    unit: str
    value: Callable[[RunSeed], float | None]
    better: str = "lower"  # or higher
    cost: bool = False  # shown as a ratio to the baseline
    count: Callable[[RunSeed], float | None] | None = None  # of a proportion: how many it was counted over

    @property
    def axis(self) -> str:
        """The label with its unit, for an axis or a column head."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


def _metric(key: str, factor: float = 1.0) -> Callable[[RunSeed], float | None]:
    return lambda one: None if one.metrics.get(key) is None else factor * one.metrics[key]


def _test(key: str) -> Callable[[RunSeed], float | None]:
    return lambda one: None if one.test.get(key) is None else float(one.test[key])


METRICS = {
    "test_loss": Metric("test loss", "nats/token", _test("test_loss")),
    "test_perplexity": Metric("test perplexity", "", _test("test_perplexity")),
    "test_bits_per_byte": Metric("test bits per byte", "bits/byte", _test("test_bits_per_byte")),
    "test_accuracy": Metric(
        "test accuracy", "", _test("test_accuracy"), better="higher", count=_test("examples")
    ),
    "val_loss": Metric("validation loss", "nats/token", _metric("val_loss")),
    "best_val_loss": Metric("best validation loss", "nats/token", _metric("best_val_loss")),
    "train_loss": Metric("training loss", "nats/token", _metric("train_loss")),
    "tokens_per_second": Metric(
        "speed", "tokens/s", _metric("tokens_per_second"), better="higher", cost=True
    ),
    "step_milliseconds": Metric("step time", "ms", _metric("step_seconds_median", 1000), cost=True),
    "peak_memory_gib": Metric("peak memory", "GiB", _metric("peak_memory_gib"), cost=True),
    "activation_mib": Metric("activations kept", "MiB", _metric("activation_mib"), cost=True),
}
COSTS = tuple(name for name, metric in METRICS.items() if metric.cost)
# What a study may be judged by: what every run of today's objectives measures.
STUDY_METRICS = ("test_loss", "val_loss")


@dataclass(frozen=True)
class Axis:
    """What every run of a study is given equally much of."""

    words: str
    key: str  # in metrics.json
    unit: str
    tolerance: float  # relative; 0: exactly equal


AXES = {
    "tokens": Axis("equal tokens", "tokens", "tokens", 0.0),
    "steps": Axis("equal steps", "steps", "steps", 0.0),
    # Steps are whole, so runs of different models cannot meet exactly.
    "flops": Axis("equal FLOPs", "flops", "FLOPs", 0.02),
    "seconds": Axis("equal training time", "train_seconds", "seconds of training", 0.02),
}
