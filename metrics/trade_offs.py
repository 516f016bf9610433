"""Quality, speed and memory of every run side by side, which runs no other run beats in all of them, and which need
the least memory, at what price.

Figures only; must not write files, and must not rank a run that is not comparable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import polars as pl

from metrics.measures import METRICS, speed
from metrics.statistics import Estimate, Ratio, mean_interval
from metrics.summary import RunSummary, Summary, seed_values, summarize
from metrics.words import WORTH_SAYING, number, short

Values = dict[str, dict[int, float]]  # run → seed → value

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


@dataclass(frozen=True)
class Ranked:
    """One run among those of the study by its peak memory. Differences are to the baseline, over paired seeds."""

    rank: int  # 1 has the least; equal peaks share one
    run: str
    peak: float  # GiB, mean over seeds
    saved: float | None  # GiB less than the baseline; None of the baseline itself
    ratio: Ratio | None  # of peaks
    quality: Estimate | None
    difference: Estimate | None
    per_gib_saved: Estimate | None  # the difference for each GiB that it has less, where it has less …
    per_gib_more: Estimate | None  # … and for each that it has more


def natural(summary: Summary) -> str:
    """What its quality is commonly told in: perplexity of text, accuracy of classifiers; else the study's metric."""
    name = "test_accuracy" if summary.labelled else "test_perplexity"
    return name if any(run.estimates[name] for run in summary.comparable) else summary.results.study.metric


def by_memory(summary: Summary) -> tuple[Ranked, ...]:
    """Comparable runs, least peak memory first; none where all peaks are within WORTH_SAYING of each other.

    A run whose peak is so near the baseline's has no difference a GiB: it would be one of next to nothing.
    """
    summary = _over_shared_seeds(summary)
    runs = [run for run in summary.comparable if not run.costs_not_comparable]
    peaks = {run.run: _cost(run, "peak_memory_gib") for run in runs if _known(run, "peak_memory_gib")}
    if not peaks or max(peaks.values()) < (1 + WORTH_SAYING) * min(peaks.values()):
        return ()
    ranks = sorted(peaks.values())
    values = {name: seed_values(summary.results, name) for name in (natural(summary), "peak_memory_gib")}
    return tuple(
        _ranked(summary, summary.of(run), 1 + ranks.index(peaks[run]), *values.values())
        for run in sorted(peaks, key=peaks.__getitem__)
    )


def _ranked(summary: Summary, run: RunSummary, rank: int, quality: Values, memory: Values) -> Ranked:
    name, base = run.run, summary.results.study.baseline
    peak, estimate = _cost(run, "peak_memory_gib"), run.estimates[natural(summary)]
    seeds = sorted(memory[name].keys() & memory[base].keys())
    if name == base or not seeds:
        return Ranked(rank, name, peak, None, None, estimate, None, None, None)
    saved = {seed: memory[base][seed] - memory[name][seed] for seed in seeds}
    changed = {
        seed: quality[name][seed] - quality[base][seed]
        for seed in seeds
        if seed in quality[name] and seed in quality[base]
    }
    mean = sum(saved.values()) / len(seeds)
    far = abs(mean) >= WORTH_SAYING * (peak + mean) and bool(changed)
    each = mean_interval([change / abs(saved[seed]) for seed, change in changed.items()]) if far else None
    return Ranked(
        rank,
        name,
        peak,
        mean,
        run.ratios["peak_memory_gib"],
        estimate,
        mean_interval(list(changed.values())) if changed else None,
        each if mean > 0 else None,
        each if mean < 0 else None,
    )


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
