"""Charts of the gradient norms of blocks: a line a block, from the first, dark, to the last, light.

Pure: a frame in, an altair chart out.
"""

from __future__ import annotations

import altair as alt
import polars as pl

from plots.charts import FIT, HEIGHT, NUMBER, WHOLE, WIDTH, Chart, Domain, look


def domain(frame: pl.DataFrame) -> Domain:
    """One axis for all runs' charts, so that they can be compared."""
    values = frame.filter(pl.col("gradient_norm") > 0)["gradient_norm"]
    low, high = float(values.min()), float(values.max())  # type: ignore[arg-type]
    return (low / 1.2, high * 1.2)


def blocks(frame: pl.DataFrame, title: str, limits: Domain) -> Chart:
    """One run's gradient norms over steps, a line a block.

    Args:
        frame: step, block, gradient_norm, as `metrics.gradients.block_norms` makes it for one run.
        title: the chart's title.
        limits: of the y axis, which is logarithmic.
    """
    shown = frame.with_columns(
        pl.when(pl.col("gradient_norm") > 0).then("gradient_norm").alias("gradient_norm")
    )
    numbers = sorted(set(shown["block"]))
    colour = alt.Color(
        "block:O",
        scale=alt.Scale(scheme="viridis", domain=numbers),
        legend=alt.Legend(symbolType="stroke", columns=12, title="block", titleOrient="left"),
    )
    y = alt.Y(
        "gradient_norm:Q",
        title="gradient norm of the block",
        scale=alt.Scale(type="log", domain=limits, nice=False),
        axis=alt.Axis(tickCount=6, format=NUMBER),
    )
    x = alt.X("step:Q", title="step", axis=alt.Axis(tickCount=6, labelExpr=WHOLE))
    chart = alt.Chart(shown).mark_line(strokeWidth=1.4).encode(x=x, y=y, color=colour)
    return look(chart.properties(width=WIDTH, height=HEIGHT, autosize=FIT), title)
