"""Charts of scaling: speedup and efficiency against the number of processes, with what would be ideal.

Pure: a frame in, an altair chart out. Whether a run is slower than one process is a place in them: the shaded zone.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from plots import charts
from plots.charts import FONT, HAS_INTERVAL, WIDTH, Chart, Domain

HIGH = 300  # pixels
GOOD = 85  # %: an efficiency from which on a run scales well
GREY, RED = "#777777", "#D55E00"
STEPS = 40  # of a curve that is drawn from straight pieces


def speedup(frame: pl.DataFrame, title: str, axis: str, runs: Sequence[str]) -> Chart:
    """Speedup over processes, a line a reference; the ideal line, and the zone in which one process is faster.

    Args:
        frame: run, series, label, processes, value, low, high, as `metrics.scaling.scaling_points` makes it.
        axis: the y axis's label.
        runs: all runs of the study in order.
    """
    most = float(frame["processes"].max())
    top = 1.08 * max(most, *frame["value"], *frame["high"].drop_nulls())
    guides = [
        _zone([(end, 1.0) for end in _across(most)]),
        _line([(1, 1.0), (most, most)], "ideal"),
    ]
    return _chart(frame, title, axis, runs, guides, (0.0, top))


def efficiency(frame: pl.DataFrame, title: str, axis: str, runs: Sequence[str]) -> Chart:
    """The same of efficiency in percent: 100 % is ideal, from 85 % on a run scales well. Arguments as `speedup`'s."""
    most = float(frame["processes"].max())
    top = 1.08 * max(100.0, *frame["value"], *frame["high"].drop_nulls())
    left, right = _across(most)
    places = [left + (right - left) * i / STEPS for i in range(STEPS + 1)]
    guides = [
        _zone([(x, min(100 / x, top)) for x in places]),
        _line([(1, 100.0), (most, 100.0)], "ideal"),
        _line([(1, GOOD), (most, GOOD)], f"{GOOD} %"),
    ]
    return _chart(frame, title, axis, runs, guides, (0.0, top))


def _across(most: float) -> Domain:
    """The axis of processes, with room beside the first, and beside the last for names."""
    return 1 - 0.25 * (most - 1), most + 0.95 * (most - 1)


def _chart(  # noqa: PLR0913
    frame: pl.DataFrame,
    title: str,
    axis: str,
    runs: Sequence[str],
    guides: list[alt.LayerChart],
    domain: Domain,
) -> Chart:
    across = _across(float(frame["processes"].max()))
    counts = sorted({1, *frame["processes"].to_list()})
    x = alt.X(
        "processes:Q",
        title="processes",
        scale=alt.Scale(domain=across, nice=False),
        axis=alt.Axis(values=counts, format="d", grid=False),
    )
    y = {"title": axis, "scale": alt.Scale(domain=domain, nice=False), "type": "quantitative"}
    looks = charts.study_looks(runs)
    base = alt.Chart(frame).encode(x=x)
    line = base.mark_line(strokeWidth=1.6, color=GREY).encode(y=alt.Y("value", **y), detail="series:N")
    rule = base.transform_filter(HAS_INTERVAL).mark_rule(strokeWidth=2)
    whisker = rule.encode(y=alt.Y("low", **y), y2="high", color=looks.colour)
    point = base.mark_point(filled=True, size=110, opacity=1).encode(
        y=alt.Y("value", **y), color=looks.colour
    )
    named = frame.filter(pl.col("label") != "").with_columns(pl.lit(1.0).alias("memory"))
    names = charts.names(named, (across, domain), "processes", (WIDTH, HIGH))
    texts = charts.texts(alt.Chart(names).encode(x=x, y=alt.Y("value", **y)), align="left", baseline="middle")
    layers = alt.layer(*guides, line, whisker, point, *texts)
    return charts.look(layers.properties(width=WIDTH, height=HIGH), title)


def _zone(edge: list[tuple[float, float]]) -> alt.LayerChart:
    """What is below the edge: slower than one process."""
    rows = pl.DataFrame(edge, schema=["processes", "top"], orient="row").with_columns(
        pl.lit(0.0).alias("bottom")
    )
    area = (
        alt.Chart(rows).mark_area(color=RED, opacity=0.12).encode(x="processes:Q", y="bottom:Q", y2="top:Q")
    )
    # In the corner, where no run is: the zone is highest there in both charts.
    words = rows.head(1).with_columns(pl.lit("slower than one process").alias("text"))
    text = alt.Chart(words).mark_text(align="left", dx=6, dy=-8, fontSize=FONT, color=RED)
    return alt.layer(area, text.encode(x="processes:Q", y="bottom:Q", text="text:N"))


def _line(ends: list[tuple[float, float]], name: str) -> alt.LayerChart:
    """A dashed line with its name at its right end."""
    rows = pl.DataFrame([(float(x), float(y)) for x, y in ends], schema=["processes", "value"], orient="row")
    line = alt.Chart(rows).mark_line(strokeDash=[6, 4], strokeWidth=1.3, color=GREY)
    words = rows.tail(1).with_columns(pl.lit(name).alias("text"))
    text = alt.Chart(words).mark_text(align="left", dx=6, fontSize=FONT, color=GREY)
    place = {"x": "processes:Q", "y": "value:Q"}
    return alt.layer(line.encode(**place), text.encode(**place, text="text:N"))
