"""Runs side by side by batch, learning rate and recomputing: what each was given, and the best that it reached.

Frames only. Must not read or write files.
"""

from __future__ import annotations

import polars as pl

from metrics import statistics
from metrics.epochs import epoch_seconds
from metrics.rows import RunSeed
from metrics.summary import Summary

SCHEMA = {
    "run": pl.String,
    "batch_size": pl.Int64,  # samples of a step of all replicas
    "micro_batch": pl.Int64,  # samples that a replica has at a time
    "accumulation": pl.Int64,  # micro-batches of a step
    "replicas": pl.Int64,
    "peak_lr": pl.Float64,  # as the run's rule makes it of the batch
    "activation_checkpointing": pl.String,
    "best_val_loss": pl.Float64,  # mean over seeds, as what follows
    "best_val_accuracy": pl.Float64,  # share
    "epoch_seconds": pl.Float64,  # of training; null of a run whose costs do not compare
}


def batches(summary: Summary) -> pl.DataFrame:
    """SCHEMA, a row a complete run; empty unless runs differ in both batch and checkpointing."""
    runs = [(run, _first(summary, run.run)) for run in summary.complete]
    runs = [(run, one) for run, one in runs if micro_batch(one) and peak_lr(one)]
    differ = [
        {(one.config["batch_size"], micro_batch(one)) for _, one in runs},
        {_checkpointing(one) for _, one in runs},
    ]
    if any(len(values) < 2 for values in differ):  # noqa: PLR2004
        return pl.DataFrame(schema=SCHEMA)
    seconds = epoch_seconds(summary.results)
    rows = []
    for run, one in runs:
        best = [run.estimates[name] for name in ("best_val_loss", "best_val_accuracy")]
        spent = list(seconds[run.run].values())
        known = bool(spent) and not run.costs_not_comparable
        batch, micro, together = one.config["batch_size"], micro_batch(one), replicas(one)
        assert micro
        rows.append(
            {
                "run": run.run,
                "batch_size": batch,
                "micro_batch": micro,
                "accumulation": batch // (micro * together),
                "replicas": together,
                "peak_lr": peak_lr(one),
                "activation_checkpointing": _checkpointing(one),
                "best_val_loss": best[0] and best[0].mean,
                "best_val_accuracy": best[1] and best[1].mean,
                "epoch_seconds": statistics.mean_interval(spent).mean if known else None,
            }
        )
    return pl.DataFrame(rows, schema=SCHEMA)


def replicas(one: RunSeed) -> int:
    """How many parts of a batch are computed side by side: processes, those of tensor parallelism as one."""
    return int(one.env.get("processes") or 1) // (one.config.get("tensor_parallel") or 1)


def micro_batch(one: RunSeed) -> int | None:
    """The samples that a replica has at a time; None where the run does not say its batch."""
    batch = one.config.get("batch_size")
    return one.config.get("micro_batch_size") or (batch and batch // replicas(one))


def peak_lr(one: RunSeed) -> float | None:
    """lr as the run's lr_rule makes it of the batch size."""
    lr, batch, base = (one.config.get(name) for name in ("lr", "batch_size", "lr_batch_size"))
    power = {"linear": 1.0, "sqrt": 0.5}.get(one.config.get("lr_rule"), 0.0)
    return lr * (batch / base) ** power if lr and power else lr


def _checkpointing(one: RunSeed) -> str:
    return one.config.get("activation_checkpointing", "none")


def _first(summary: Summary, run: str) -> RunSeed:
    """A complete seed of the run: the settings are those of all."""
    return next(one for one in summary.results.of(run) if one.state == "complete")
