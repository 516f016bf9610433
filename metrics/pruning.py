"""What runs that prune left of each tensor, and which is best at one sparsity. Must not read or write files."""

from __future__ import annotations

import re
from collections.abc import Iterator

import polars as pl

from metrics import statistics
from metrics.rows import Results
from metrics.summary import Summary, seed_values
from metrics.words import difference, number, paired_seeds, with_interval

EMPTY = 0.99  # of a tensor that is zero: what the rest computes is hardly anything
COLUMNS = ("run", "tensor", "weights", "sparsity", "sparsity_low", "sparsity_high", "target")


def layers(results: Results) -> pl.DataFrame:
    """A row a run and prunable tensor, in the model's order, then one of all of a run's together.

    Columns COLUMNS: mean, lowest and highest seed of the share that is zero; target: the share that was asked for,
    null of a tensor under a threshold for all of them.
    """
    rows = []
    for one in results.runs:
        for place, layer in enumerate(one.metrics.get("sparsity_layers", [])):
            target = None if layer["target"] is None else layer["target"] / layer["weights"]
            share = layer["zeros"] / layer["weights"]
            rows.append((one.run, place, layer["name"], layer["weights"], share, target))
        if "sparsity_layers" in one.metrics:
            total = sum(layer["weights"] for layer in one.metrics["sparsity_layers"])
            own = (one.metrics["sparsity"], one.metrics["sparsity_target"])
            rows.append((one.run, len(one.metrics["sparsity_layers"]), "all", total, *own))
    schema = {"run": pl.String, "place": pl.Int64, "tensor": pl.String, "weights": pl.Int64}
    frame = pl.DataFrame(rows, {**schema, "sparsity": pl.Float64, "target": pl.Float64}, orient="row")
    share = pl.col("sparsity")
    means = frame.group_by("run", "place", "tensor", "weights", maintain_order=True).agg(
        share.mean(),
        share.min().alias("sparsity_low"),
        share.max().alias("sparsity_high"),
        pl.col("target").first(),
    )
    order = {run: i for i, run in enumerate(results.study.runs)}
    by_run = pl.col("run").replace_strict(order, default=0, return_dtype=pl.Int64)
    return means.sort(by_run, "place").select(COLUMNS)


def emptied(results: Results, run: str) -> dict[str, int]:
    """Kind of tensor → how many of them a threshold for all tensors left next to nothing of, in a seed at least.

    Kinds are names with a * for the layer's number. Of a tensor whose seeds differ, the emptiest counts.
    """
    found: dict[str, set[str]] = {}
    for one in results.of(run):
        for layer in one.metrics.get("sparsity_layers", []) if one.state == "complete" else []:
            if layer["zeros"] >= EMPTY * layer["weights"]:
                found.setdefault(re.sub(r"\.\d+\.", ".*.", layer["name"]), set()).add(layer["name"])
    return {kind: len(names) for kind, names in found.items()}


def best_at_each_sparsity(summary: Summary) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Of comparable runs that end equally sparse, the best by the study's metric and the next: sentence and runs.

    The difference is of paired seeds, without a verdict: the pair was chosen by it.
    """
    metric, values = summary.metric, seed_values(summary.results, summary.results.study.metric)
    for share, runs in _equally_sparse(summary).items():
        means = {run: statistics.mean_interval(list(values[run].values())) for run in runs if values[run]}
        order = sorted(means, key=lambda run: means[run].mean, reverse=metric.better == "higher")
        if len(order) < 2:  # noqa: PLR2004
            continue
        best, following = order[:2]
        pair = {run: values[run] for run in (best, following)}
        found = statistics.compare(pair, following, metric.better)[best]
        if found.estimate is None:
            continue
        yield (
            f"Of {len(order)} runs with {number(100 * share, 3)} % of their prunable weights 0, {best} has the "
            f"{'lowest' if metric.better == 'lower' else 'highest'} {metric.label}: "
            f"{with_interval(means[best].times(metric.factor))}, {difference(found.estimate, metric)} "
            f"{metric.difference_unit} against the next, {following}; {paired_seeds(len(found.seeds))}.",
            tuple(order),
        )


def _equally_sparse(summary: Summary) -> dict[float, list[str]]:
    """Target → the comparable runs all of whose seeds ended at it."""
    found: dict[float, list[str]] = {}
    for run in summary.comparable:
        seeds = [one.metrics for one in summary.results.of(run.run) if one.state == "complete"]
        targets = {one.get("sparsity_target") for one in seeds}
        if len(targets) == 1 and None not in targets:
            (target,) = targets
            if all(one["best_val_loss_at_target"] is not None for one in seeds):
                found.setdefault(target, []).append(run.run)
    return found
