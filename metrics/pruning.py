"""What runs that prune left of each tensor: a frame of rows. Must not read or write files."""

from __future__ import annotations

import polars as pl

from metrics.rows import Results

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
