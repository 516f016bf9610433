"""Charts of attention's layers: a line a layer, from the first, dark, to the last, light.

Pure: a frame in, an altair chart out.
"""

from __future__ import annotations

import altair as alt
import polars as pl

from plots.charts import FIT, HEIGHT, NUMBER, WHOLE, WIDTH, Chart, Domain, look

FEW = 12  # evaluations that are marked with points: more points than that hide their lines, and are most of a page


def domain(frame: pl.DataFrame) -> Domain:
    """One axis for all runs' charts, so that they can be compared."""
    low, high = float(frame["value"].min()), float(frame["value"].max())  # type: ignore[arg-type]
    room = 0.05 * (high - low) or 0.05
    return (low - room, high + room)


def layers(frame: pl.DataFrame, title: str, axis: str, limits: Domain) -> Chart:
    """One run's figures over steps; each evaluation is a point too where there are few, as one alone is no line.

    Args:
        frame: step, layer, value, as `metrics.attention.by_layer` makes it for one run.
        title: the chart's title.
        axis: the y axis's label with its unit.
        limits: of the y axis.
    """
    colour = alt.Color(
        "layer:O",
        scale=alt.Scale(scheme="viridis", domain=sorted(set(frame["layer"]))),
        legend=alt.Legend(symbolType="stroke", columns=12, title="layer", titleOrient="left"),
    )
    scale = alt.Scale(domain=limits, nice=False, zero=False)
    y = alt.Y("value:Q", title=axis, scale=scale, axis=alt.Axis(tickCount=6, format=NUMBER))
    x = alt.X("step:Q", title="step", axis=alt.Axis(tickCount=6, labelExpr=WHOLE))
    point = alt.OverlayMarkDef(size=15) if frame["step"].n_unique() <= FEW else alt.Undefined
    line = alt.Chart(frame).mark_line(strokeWidth=1.4, point=point)
    chart = line.encode(x=x, y=y, color=colour)
    return look(chart.properties(width=WIDTH, height=HEIGHT, autosize=FIT), title)
