"""Quality, speed and memory of every run side by side, and which runs no other run beats in all of them.

A frame only; must not write files, and must not rank a run that is not comparable.
"""

from __future__ import annotations

import math
from dataclasses import replace

import polars as pl

from metrics.measures import METRICS, speed
from metrics.summary import RunSummary, Summary, summarize
from metrics.words import number, short

SCHEMA = {
    "run": pl.String,
    "label": pl.String,
    "metric": pl.String,
    "speed": pl.Float64,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "memory": pl.Float64,
    "frontier": pl.String,
}


def trade_offs(summary: Summary, quality: str = "", pace: str = "") -> pl.DataFrame:
    """One row a comparable run that has both: means over the seeds that all of them have, in the study's order.

    quality, pace: names of METRICS; empty: the study's metric, and tokens/s, of classifiers samples/s.

    Columns: run; label (the run and its memory); metric (`quality`, with its unit); speed (`pace`); value, low, high
    (`quality` and its 95 % interval; null for one seed); memory (peak, GiB; null where any run lacks it); frontier
    ("yes" where no other run is at least as good in all three means and better in one).
    """
    summary = _over_shared_seeds(summary)
    runs = [run for run in summary.comparable if not run.costs_not_comparable]
    quality, pace = quality or summary.results.study.metric, pace or speed(summary.labelled)
    metric = summary.measure(quality)
    runs = [run for run in runs if _known(run, quality, pace)]
    weighed = all(_known(run, "peak_memory_gib") for run in runs)
    names = [quality, pace, *(["peak_memory_gib"] if weighed else [])]
    points = {run.run: tuple(_cost(run, name) for name in names) for run in runs}
    rows = []
    for run in runs:
        estimate, moved = run.estimates[quality], run.estimates[pace]
        memory = run.estimates["peak_memory_gib"] if weighed else None
        assert estimate is not None and moved is not None
        estimate = estimate.times(metric.factor)
        name = short(run.run)
        label = f"{name}, {number(memory.mean, 3)} GiB" if memory else name
        beaten = any(_beats(points[other], points[run.run]) for other in points)
        rows.append(
            (
                run.run,
                label,
                metric.axis,
                moved.mean,
                estimate.mean,
                *estimate.ends(),
                memory.mean if memory else None,
                "no" if beaten else "yes",
            )
        )
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _over_shared_seeds(summary: Summary) -> Summary:
    """The same with means over the seeds that every comparable run has: others would not stand side by side."""
    sets = [set(run.complete_seeds) for run in summary.comparable]
    shared = set.intersection(*sets) if sets else set()
    if all(found == shared for found in sets):
        return summary
    results = summary.results
    kept = tuple(one for one in results.runs if one.seed in shared)
    return summarize(replace(results, runs=kept))


def _known(run: RunSummary, *names: str) -> bool:
    """All of these were measured, and are numbers."""
    found = [run.estimates[name] for name in names]
    return all(estimate is not None and math.isfinite(estimate.mean) for estimate in found)


def _cost(run: RunSummary, name: str) -> float:
    """The mean, so turned that less is better."""
    estimate = run.estimates[name]
    assert estimate is not None
    return estimate.mean if METRICS[name].better == "lower" else -estimate.mean


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
