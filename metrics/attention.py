"""What runs' attention looked like over their training, where they measured it. Must not read or write files."""

from __future__ import annotations

import polars as pl

from metrics.frames import curves
from metrics.rows import Results

# Settings that make another form of attention, and not another kernel or size of the same.
FORM = ("attention_form", "latent_query", "latent_value", "reciprocal_alpha")
WHAT = ("entropy", "reciprocity")  # columns of attention.csv, each with the number of its layer


def layers(results: Results, what: str) -> list[str]:
    """The columns of `what`, from the first layer to the last that any run has."""
    names = [name for name in results.attention.columns if name.removeprefix(f"{what}_").isdecimal()]
    return sorted(names, key=lambda name: int(name.removeprefix(f"{what}_")))


def of_each_form(results: Results, runs: list[str], most: int) -> list[str]:
    """`most` of the runs, in their order: the first of each form of attention, and then whichever comes first."""
    firsts: dict[tuple, str] = {}
    for run in runs:
        config = next((one.config for one in results.of(run) if one.state == "complete"), {})
        firsts.setdefault(tuple(config.get(name) for name in FORM), run)
    others = [run for run in runs if run not in firsts.values()]
    kept = [*firsts.values(), *others][:most]
    return [run for run in runs if run in kept]


def over_layers(results: Results, points: int = 200) -> pl.DataFrame:
    """Means over layers, as `frames.curves` lays them out; empty where no run measured any."""
    means = [pl.mean_horizontal(layers(results, what)).alias(what) for what in WHAT if layers(results, what)]
    return curves(results, results.attention.with_columns(means), WHAT, points) if means else pl.DataFrame()


def by_layer(results: Results, what: str, points: int = 200) -> pl.DataFrame:
    """Columns run, step, layer, value: means over seeds; what is there."""
    names = layers(results, what)
    if not names:
        return pl.DataFrame(
            schema={"run": pl.String, "step": pl.Int64, "layer": pl.Int64, "value": pl.Float64}
        )
    frame = curves(results, results.attention, tuple(names), points).select("run", "step", *names)
    long = frame.unpivot(names, index=["run", "step"], variable_name="layer", value_name="value")
    layer = pl.col("layer").str.strip_prefix(f"{what}_").cast(pl.Int64)
    return long.with_columns(layer).filter(pl.col("value").is_finite())
