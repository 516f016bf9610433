"""A grid of runs as a heat map: a cell a run, the better the darker, diverged ones marked.

Pure: a frame in, an altair chart out.
"""

from __future__ import annotations

import altair as alt
import polars as pl

from plots.charts import FIT, FONT, WIDTH, Chart, look

CELL = 44  # pixels: height of a cell
LOST, PART = "#444444", "#999999"  # fills of cells in which every seed diverged, and in which some did


def heat_map(frame: pl.DataFrame, title: str, axis: str, *, higher: bool = False) -> Chart:
    """One grid.

    Args:
        frame: x_axis, x, y_axis, y, value, seeds, diverged, text, best, as `metrics.grid_results` makes it; one grid.
        title: the chart's title.
        axis: the label of the colours, with the unit.
        higher: the larger value is the better one.
    """
    rows = frame.with_columns(
        pl.when(pl.col("value").is_finite()).then("value").alias("value"),
        pl.col("text").str.replace(" ×", "\n×", literal=True),  # a cell is narrow
    )
    x_axis, y_axis = rows["x_axis"][0], rows["y_axis"][0]
    base = alt.Chart(rows).encode(
        x=alt.X("x:N", title=x_axis, sort=list(dict.fromkeys(rows["x"])), axis=alt.Axis(labelAngle=0)),
        y=alt.Y("y:N", title=y_axis or None, sort=list(dict.fromkeys(rows["y"]))),
    )
    colour = alt.Color(
        "value:Q",
        title=axis,
        # The best cells are dark; nothing is drawn where there is no number.
        scale=alt.Scale(scheme="viridis", reverse=higher, zero=False),
        legend=alt.Legend(orient="bottom", gradientLength=WIDTH // 2, titleLimit=WIDTH),
    )
    # Of a cell in which some seeds diverged the mean of the others is said, and has no colour: it would win.
    found = base.transform_filter("datum.diverged == 0 && isValid(datum.value)").mark_rect()
    lost = base.transform_filter("datum.diverged > 0").mark_rect()
    lost = lost.encode(fill=alt.condition("datum.seeds == 0", alt.value(LOST), alt.value(PART)))
    winner = base.transform_filter("datum.best === 'yes'").mark_rect(
        fillOpacity=0, stroke="#D55E00", strokeWidth=3
    )
    lines = {"fontSize": FONT, "lineBreak": "\n"}
    halo = base.mark_text(stroke="white", strokeWidth=3, strokeJoin="round", **lines).encode(text="text:N")
    words = base.mark_text(color="#222222", **lines).encode(text="text:N")
    layers = alt.layer(found.encode(color=colour), lost, winner, halo, words)
    return look(layers.properties(width=WIDTH, height=alt.Step(CELL), autosize=FIT), title)
