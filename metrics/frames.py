"""A summary as frames and flat dictionaries: what tables, charts and DVC read. Must not write files."""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from metrics.measures import COSTS, METRICS, speed
from metrics.rows import Results
from metrics.scaling import scaling_points
from metrics.summary import RunSummary, Summary
from metrics.words import short, with_interval

LEAST = {"test_perplexity": 1.0}  # values that none can be below
# The columns of `dvc metrics show` besides the study's own metric, and their decimals: few and short enough
# to be read side by side. Step time says the same as tokens/s, and validation loss and bits per byte nearly
# the same as test loss; the report has them all.
DVC_DECIMALS = {
    "test_loss": 4,
    "test_perplexity": 3,
    "test_accuracy": 4,
    "tokens_per_second": 0,
    "samples_per_second": 0,
    "peak_memory_gib": 3,
    "activation_mib": 2,
}


def dvc_metrics(run: RunSummary, metric: str, labelled: bool = False) -> dict[str, Any]:
    """The flat dictionary of one run for DVC: means over seeds, the verdict, and whether all took effect.

    `metric` is the study's, which is among them whatever it is; of speeds the one that its tables show, which
    is another for classifiers (`labelled`).
    """
    row: dict[str, Any] = {}
    other_speed = speed(not labelled)
    for name, decimals in ({metric: 4} | DVC_DECIMALS).items():
        estimate = None if name == other_speed else run.estimates[name]
        if estimate is not None:  # JSON has no infinity: words
            finite = math.isfinite(estimate.mean)
            row[name] = round(estimate.mean, decimals or None) if finite else "not finite"
    in_effect = "; ".join(run.ledger) or "as requested"
    return {
        **row,
        "seeds": len(run.complete_seeds),
        "verdict": run.status,
        "in_effect": in_effect if run.complete_seeds else "-",
    }


def table_frame(summary: Summary) -> pl.DataFrame:
    """One row a run, unrounded: mean, half-width and (for costs) ratio of every metric; the comparison.

    A metric that no run has gets no column; shares are from 0 to 1.
    """
    rows = []
    measured = [name for name in METRICS if any(run.estimates[name] for run in summary.runs)]
    for run in summary.runs:
        row: dict[str, Any] = {"run": run.run, "seeds": len(run.complete_seeds), "verdict": run.status}
        comparison = run.comparison
        estimate = comparison.estimate if comparison else None
        row |= {
            "difference": estimate and estimate.mean,
            "difference_half_width": estimate and estimate.half_width,
            "p": comparison and comparison.p,
            "p_holm": comparison and comparison.p_holm,
            **(
                {"p_equivalent": comparison and comparison.p_equivalent}
                if summary.results.study.margin
                else {}
            ),
            "smallest_detectable": comparison and comparison.smallest_detectable,
        }
        for name in measured:
            one, ratio = run.estimates[name], run.ratios.get(name)
            row |= {name: one and one.mean, f"{name}_half_width": one and one.half_width}
            if name in COSTS:
                row |= {
                    f"{name}_ratio": ratio and ratio.mean,
                    f"{name}_ratio_low": ratio and ratio.low,
                    f"{name}_ratio_high": ratio and ratio.high,
                }
        said = {
            "invalid": run.invalid,
            "not_comparable": run.not_comparable,
            **({"own_budget": run.own_budget} if summary.results.study.own_budget else {}),
            "costs_not_comparable": run.costs_not_comparable,
            "not_as_requested": run.ledger,
            "happened": [f"{count} {what}" for what, count in run.counts.items()],
            "notes": run.notes,
        }
        rows.append(row | {name: "; ".join(words) for name, words in said.items()})
    types = {name: pl.String if isinstance(value, str) else pl.Float64 for name, value in rows[0].items()} | {
        "seeds": pl.Int64
    }
    return pl.DataFrame(rows, schema=types)


def bars(summary: Summary, names: tuple[str, ...]) -> pl.DataFrame:
    """Columns run, label (run and value in words), metric (label and unit), value, low, high.

    low and high are the 95 % interval, null for one seed; of a cost never below 0, of a perplexity never below 1.
    Comparable runs only, and of costs those whose costs are: a chart on one scale ranks what it shows.
    """
    rows = []
    for name in names:
        metric = summary.measure(name)
        for run in summary.comparable:
            estimate = run.estimates[name]
            if estimate is None or not math.isfinite(estimate.mean):
                continue
            if metric.cost and run.costs_not_comparable:
                continue
            estimate = estimate.times(metric.factor)
            low, high = estimate.ends(least=LEAST.get(name, 0.0 if metric.cost else -math.inf))
            label = f"{short(run.run)}: {with_interval(estimate)}"
            rows.append((run.run, label, metric.axis, estimate.mean, low, high))
    words = dict.fromkeys(("run", "label", "metric"), pl.String)
    return pl.DataFrame(
        rows, schema=words | dict.fromkeys(("value", "low", "high"), pl.Float64), orient="row"
    )


def dvc_bars(summary: Summary) -> pl.DataFrame:
    """What `dvc plots` compares: the study's metric, perplexity, accuracy, costs, speedup, efficiency: those it has.

    One panel a metric, so that a study without scaling has no empty chart of it. Columns as of `bars`.
    """
    pace = speed(summary.labelled)
    names = dict.fromkeys(
        (
            summary.results.study.metric,
            "test_perplexity",
            "test_accuracy",
            pace,
            "peak_memory_gib",
            "activation_mib",
        )
    )
    parts = [bars(summary, tuple(names))]
    for axis, efficiency in (("speedup (×)", False), ("efficiency (%)", True)):
        points = scaling_points(summary, efficiency).filter(pl.col("label") != "")
        parts.append(points.with_columns(pl.lit(axis).alias("metric")).select(parts[0].columns))
    return pl.concat(parts)


def curves(
    results: Results, frame: pl.DataFrame, columns: tuple[str, ...], points: int = 200
) -> pl.DataFrame:
    """Mean, lowest and highest seed of `columns` at each step, thinned to `points` even steps a run.

    Thinned by leaving steps out, never by averaging neighbours: what is drawn was measured. A step counts
    only when every complete seed of the run has it. Columns: run, step, tokens_seen, then c, c_low, c_high.
    """
    parts = []
    for run in results.study.runs:
        rows = frame.filter(pl.col("run") == run)
        means = [pl.col(c).mean() for c in columns]
        lows = [pl.col(c).min().alias(f"{c}_low") for c in columns]
        highs = [pl.col(c).max().alias(f"{c}_high") for c in columns]
        count, tokens = pl.len().alias("seeds"), pl.col("tokens_seen").first()
        # In order: parts that threads add up in any other would differ in the last digit from one time to the next.
        ordered = rows.sort("step", "seed").group_by("step", maintain_order=True)
        mean = ordered.agg(count, tokens, *means, *lows, *highs)
        mean = mean.filter(pl.col("seeds") == rows["seed"].n_unique()).drop("seeds")
        parts.append(thinned(mean, points).select(pl.lit(run).alias("run"), pl.all()))
    return pl.concat(parts)


def thinned(rows: pl.DataFrame, points: int) -> pl.DataFrame:
    """At most `points` of the rows, evenly chosen, with the first and the last."""
    if rows.height <= points:
        return rows
    return rows[[round(i * (rows.height - 1) / (points - 1)) for i in range(points)]]
