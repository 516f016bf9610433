"""What a study can measure and compare: each metric with its unit and its better side, and the axes of comparison.

One place for these facts: the plan checks a study against them, summaries and tables read them. Must import no
library: the plan stage loads this before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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
    factor: float = 1.0  # what is shown is the value times this: 100 of a share in percent

    @property
    def axis(self) -> str:
        """The label with its unit, for an axis or a column head."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def difference_unit(self) -> str:
        """Of a difference of two values: that of two percentages is no percentage."""
        return "percentage points" if self.unit == "%" else self.unit


def _metric(key: str, factor: float = 1.0) -> Callable[[RunSeed], float | None]:
    return lambda one: None if one.metrics.get(key) is None else factor * one.metrics[key]


def _best(key: str, at_target: str) -> Callable[[RunSeed], float | None]:
    """Of a run that prunes the best at its target sparsity: what it was before is another model."""
    return lambda one: _metric(at_target if one.prunes else key)(one)


def _test(key: str) -> Callable[[RunSeed], float | None]:
    return lambda one: None if one.test.get(key) is None else float(one.test[key])


def _latency(key: str, length: int) -> Callable[[RunSeed], float | None]:
    return lambda one: next((row[key] for row in one.latency if row["length"] == length), None)


def distinct_share(one: RunSeed) -> float:
    """Of the samples that all ranks drew in a step the share that were different ones; 1 where none were counted."""
    return one.scaling["samples_distinct"] / one.scaling["samples_drawn"] if one.scaling else 1.0


def _share(label: str, value: Callable, **more: Any) -> Metric:
    return Metric(label, "%", value, better="higher", factor=100.0, **more)


NATS = "nats/token"
METRICS = {
    "test_loss": Metric("test loss", NATS, _test("test_loss")),
    "test_perplexity": Metric("test perplexity", "", _test("test_perplexity")),
    "test_bits_per_byte": Metric("test bits per byte", "bits/byte", _test("test_bits_per_byte")),
    "test_accuracy": _share("test accuracy", _test("test_accuracy"), count=_test("examples")),
    "val_loss": Metric("validation loss", NATS, _metric("val_loss")),
    "best_val_loss": Metric("best validation loss", NATS, _best("best_val_loss", "best_val_loss_at_target")),
    "val_accuracy": _share("validation accuracy", _metric("val_accuracy")),
    "best_val_accuracy": _share(  # a run that prunes does not say it of its target
        "best validation accuracy", _best("best_val_accuracy", "best_val_accuracy_at_target")
    ),
    "best_val_loss_at_target": Metric(
        "best validation loss at the target sparsity", NATS, _metric("best_val_loss_at_target")
    ),
    "sparsity": _share("sparsity of the prunable weights", _metric("sparsity")),
    "train_loss": Metric("training loss", NATS, _metric("train_loss")),
    "samples_per_second": Metric(
        "throughput", "samples/s", _metric("samples_per_second"), better="higher", cost=True
    ),
    "tokens_per_second": Metric(
        "speed", "tokens/s", _metric("tokens_per_second"), better="higher", cost=True
    ),
    "step_milliseconds": Metric("step time", "ms", _metric("step_seconds_median", 1000), cost=True),
    "train_seconds": Metric("training time", "s", _metric("train_seconds"), cost=True),
    "peak_memory_gib": Metric("peak memory", "GiB", _metric("peak_memory_gib"), cost=True),
    "activation_mib": Metric("activations kept", "MiB", _metric("activation_mib"), cost=True),
}
# What optimizers count and hold; those that a run's does not count it has not.
METRICS |= {
    "optimizer_memory_multiple": Metric(
        "optimizer memory", "× weights", _metric("optimizer_memory_multiple")
    ),
    "clipped_fraction": Metric("gradients cut", "%", _metric("clipped_fraction"), factor=100.0),
    "largest_square_ratio": Metric("largest g² / v", "", _metric("largest_square_ratio")),
    "optimizer_resets": Metric("resets", "", _metric("optimizer_resets")),
    "optimizer_spikes": Metric("spikes", "", _metric("optimizer_spikes")),
}
# The parts of the loss of dialogues; other runs have none.
METRICS |= {
    "test_lm_loss": Metric("test loss of replies", "nats/reply token", _test("test_lm_loss")),
    "test_reply_perplexity": Metric("test perplexity of replies", "", _test("test_reply_perplexity")),
    "test_mc_loss": Metric("test loss of choices", "nats/choice", _test("test_mc_loss")),
    "val_lm_loss": Metric("validation loss of replies", "nats/reply token", _metric("val_lm_loss")),
    "val_mc_loss": Metric("validation loss of choices", "nats/choice", _metric("val_mc_loss")),
}
COUNTED = ("clipped_fraction", "largest_square_ratio", "optimizer_resets", "optimizer_spikes")
LATENCIES = {  # of latency.json → in words
    "prefill_p50_ms": "prefill latency p50",
    "prefill_p95_ms": "prefill latency p95",
    "token_p50_ms": "token latency p50",
    "token_p95_ms": "token latency p95",
}
for _length in (512, 1024):  # the lengths at which runs are compared by it; their tables have every length
    METRICS |= {
        f"latency_{key}_at_{_length}": Metric(
            f"{words} at {_length:,}", "ms", _latency(key, _length), cost=True
        )
        for key, words in LATENCIES.items()
    }
COSTS = tuple(name for name, metric in METRICS.items() if metric.cost)
# What a study may be judged by: what every run of the objective measures.
STUDY_METRICS = ("test_loss", "val_loss")
LABELLED_METRICS = (*STUDY_METRICS, "test_accuracy", "val_accuracy")  # of a study of labelled data
# What only runs on labelled data have, and what only runs on text have.
ONLY_LABELLED = ("test_accuracy", "val_accuracy", "best_val_accuracy")
ONLY_TEXT = ("test_perplexity", "test_bits_per_byte")


def measure(name: str, labelled: bool) -> Metric:
    """The metric as a study measures it: the loss of a classifier is one of a row, not of a token."""
    metric = METRICS[name]
    return replace(metric, unit="nats/row") if labelled and metric.unit == NATS else metric


def measured(labelled: bool) -> tuple[str, ...]:
    """The names of the metrics that the runs of a study can have."""
    return tuple(name for name in METRICS if name not in (ONLY_TEXT if labelled else ONLY_LABELLED))


def speed(labelled: bool) -> str:
    """The name of the metric that says how much a run gets through in a second."""
    return "samples_per_second" if labelled else "tokens_per_second"


def shown_costs(labelled: bool) -> tuple[str, ...]:
    """The costs that tables show, in their order."""
    time = ("step_milliseconds", "train_seconds") if labelled else ("step_milliseconds",)
    return (speed(labelled), *time, "peak_memory_gib", "activation_mib")


# How a run is computed, never what it learns: what such runs cost may be set side by side.
RECOMPUTING = {"activation_checkpointing", "checkpoint_every", "memory_budget", "loss_kernel"}
RECOMPUTING |= {"loss_chunk_tokens", "optimizer_offload", "gradient_sums"}
# Settings that may differ between a run and the one its scaling is measured against: how it is spread, …
SPREADING = {"processes", "data_parallel", "tensor_parallel", "shard_size", "shard_unit"}
SPREADING |= {"reshard_after_forward", "batch_size", "micro_batch_size", "steps"}
# … and, where a study declares the pair, what goes with another batch size or is counted in steps.
SCALED = SPREADING - {"tensor_parallel"} | {"shard_samples", "on_shared_samples", "preflight_seconds"}
LEARNING_RATE = {"lr", "lr_rule", "lr_batch_size"}
SCALED |= {*LEARNING_RATE, "warmup_steps", "eval_batch_size"}
SCALED |= {"eval_interval", "log_interval", "checkpoint_interval"}
KINDS = {  # of scaling: what stays the same with more processes
    "strong": "the same batch_size",
    "weak": "the same batch_size for each process",
}
# Of a condition that would falsify a study's hypothesis, and the verdicts that it may name.
CONDITION_KEYS = ("run", "verdict", "measure", "against", "at_least", "at_most")
DECIDED = ("better", "worse", "identical", "equivalent", "inconclusive", "diverged")
TO_TARGET = (
    "seconds_to_target"  # of a criterion, with its target: seconds of training until a validation loss
)
STEADY = (
    "steady_train_seconds"  # of a criterion: seconds of training, steps that compile as long as the others
)
SCALING_MEASURES = ("speedup", "efficiency")  # of a run against the reference that its study declares


def amount(count: int, one: str) -> str:
    """`1 run`, `3 runs`."""
    return f"{count:,} {one if count == 1 else f'{one}s'}"


@dataclass(frozen=True)
class Axis:
    """What every run of a study is given equally much of."""

    words: str
    key: str  # in metrics.json
    unit: str
    tolerance: float  # relative; 0: exactly equal


AXES = {
    "tokens": Axis("equal tokens", "tokens", "tokens", 0.0),
    "samples": Axis("equal samples", "samples", "samples", 0.0),
    "steps": Axis("equal steps", "steps", "steps", 0.0),
    # Steps are whole, so runs of different models cannot meet exactly.
    "flops": Axis("equal FLOPs", "flops", "FLOPs", 0.02),
    "seconds": Axis("equal training time", "train_seconds", "seconds of training", 0.02),
}
