"""Charts of one study: a frame in, an altair chart out.

Pure: no file is read or written. Colours are Okabe and Ito's, safe for colour-blind readers, in the study's
run order, so that a run has the same colour in every chart; dashes tell apart lines that lie on each other.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import altair as alt
import polars as pl

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
# Five dashes against seven colours: 35 runs before a look repeats.
DASHES = ((1, 0), (8, 4), (3, 5), (8, 3, 2, 3), (2, 2))
WIDTH, HEIGHT, ROW_HEIGHT = 560, 280, 34


def _look(chart: alt.Chart | alt.LayerChart, title: str) -> alt.LayerChart:
    return (
        chart.properties(title=title, background="white")
        .configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight="normal", gridColor="#e6e6e6")
        .configure_legend(
            orient="bottom", title=None, labelFontSize=12, labelLimit=300, symbolSize=300, columns=4
        )
        .configure_title(fontSize=14, anchor="start")
        .configure_view(stroke=None)
    )


def _colours(runs: Sequence[str]) -> alt.Scale:
    """The colour of every run, by its place in the study."""
    return alt.Scale(domain=list(runs), range=[OKABE_ITO[i % len(OKABE_ITO)] for i in range(len(runs))])


def _dashes(runs: Sequence[str]) -> alt.Scale:
    return alt.Scale(domain=list(runs), range=[list(DASHES[i % len(DASHES)]) for i in range(len(runs))])


def curve(  # noqa: PLR0913
    frame: pl.DataFrame,
    column: str,
    title: str,
    axis: str,
    runs: Sequence[str],
    *,
    log: bool = False,
    points: bool = False,
) -> alt.LayerChart:
    """A line a run over steps, with a band from the lowest to the highest seed.

    Args:
        frame: run, step, `column`, `column`_low, `column`_high, as `metrics.frames.curves` makes it.
        column: what to draw.
        title: the chart's title.
        axis: the y axis's label with its unit.
        runs: all runs of the study in order, drawn or not.
        log: logarithmic y axis; values that are not positive are left out.
        points: mark the measured points, for few of them.
    """
    names = ["run", "step", column, f"{column}_low", f"{column}_high"]
    shown = frame.select(names).filter(pl.col(column).is_finite())  # JSON has no nan; a gap says it
    if log:
        shown = shown.filter(pl.col(f"{column}_low") > 0)
    drawn = [run for run in runs if run in set(shown["run"])]
    legend = alt.Legend(values=drawn, symbolType="stroke", symbolOpacity=1, symbolStrokeWidth=2)
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    base = alt.Chart(shown).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=8)),
        color=alt.Color("run:N", scale=_colours(runs), legend=legend),
    )
    band = base.mark_area(opacity=0.2).encode(
        y=alt.Y(f"{column}_low:Q", scale=scale, title=axis), y2=f"{column}_high:Q"
    )
    line = base.mark_line(strokeWidth=1.6, point=alt.OverlayMarkDef(size=25) if points else False).encode(
        y=alt.Y(f"{column}:Q", scale=scale, title=axis),
        strokeDash=alt.StrokeDash("run:N", scale=_dashes(runs), legend=legend),
    )
    return _look(alt.layer(band, line).properties(width=WIDTH, height=HEIGHT), title)


def _rows(frame: pl.DataFrame, runs: Sequence[str]) -> alt.Chart:
    """One row a run, from the top in the study's order."""
    axis = alt.Axis(labelLimit=220)
    return alt.Chart(frame).encode(y=alt.Y("run:N", sort=list(runs), title=None, axis=axis))


def intervals(frame: pl.DataFrame, title: str, axis: str, runs: Sequence[str]) -> alt.LayerChart:
    """A point and its 95 % interval a run. Not bars: their axis must start at zero, which hides differences.

    Args:
        frame: run, value, low, high (null: no interval), as `metrics.frames.bars` makes it for one metric.
    """
    position = {"title": axis, "scale": alt.Scale(zero=False, padding=12), "axis": alt.Axis(tickCount=6)}
    base = _rows(frame, runs).encode(color=alt.Color("run:N", scale=_colours(runs), legend=None))
    rule = base.transform_filter("datum.low != null").mark_rule(strokeWidth=2.5)
    whisker = rule.encode(x=alt.X("low:Q", **position), x2="high:Q")
    point = base.mark_point(filled=True, size=110, opacity=1).encode(x=alt.X("value:Q", **position))
    return _look(alt.layer(whisker, point).properties(width=WIDTH - 100, height=alt.Step(ROW_HEIGHT)), title)


def costs(frame: pl.DataFrame, title: str, axis: str, runs: Sequence[str]) -> alt.LayerChart:
    """A bar from zero and its 95 % interval a run, for speed or memory. Frame as for `intervals`."""
    position = {"title": axis, "axis": alt.Axis(tickCount=6)}
    base = _rows(frame, runs)
    colour = alt.Color("run:N", scale=_colours(runs), legend=None)
    bar = base.mark_bar(opacity=0.85).encode(x=alt.X("value:Q", **position), color=colour)
    rule = base.transform_filter("datum.low != null").mark_rule(strokeWidth=2, color="#333333")
    whisker = rule.encode(x=alt.X("low:Q", **position), x2="high:Q")
    return _look(alt.layer(bar, whisker).properties(width=WIDTH - 100, height=alt.Step(ROW_HEIGHT)), title)


def svg(chart: alt.LayerChart, prefix: str) -> str:
    """The chart as an SVG element. `prefix` keeps its ids apart from those of other charts on a page."""
    buffer = io.StringIO()
    chart.save(buffer, format="svg")
    text = re.sub(r"^<\?xml[^>]*>\s*", "", buffer.getvalue())
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
