"""Charts of one study: a frame in, an altair chart out.

Pure: no file is read or written. The `*_layers` are the marks, axes and dashes of each kind of chart, used
here on a study's frames and by `plots.templates` on the rows that DVC brings. Colours are Okabe and Ito's,
safe for colour-blind readers, in the study's run order, so that a run has the same colour in every chart;
dashes tell apart lines that lie on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import polars as pl

from plots.labels import Box, Label, place

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
# Five dashes against seven colours: 35 runs before a look repeats.
DASHES = ((1, 0), (8, 4), (3, 5), (8, 3, 2, 3), (2, 2))
# Pixels. Charts are as wide as a phone nearly is, so that their text is legible there.
WIDTH, HEIGHT, ROW_HEIGHT = 440, 220, 40
CHARACTER = 7.0  # width of an average character at FONT
FONT, TITLE_FONT = 13, 15
SQUARE = 370  # sides of the scatter
NUMBER = ",.7~r"  # of an axis: 690,000, 0.00025, 3.2, even where all values are equal
WHOLE = "datum.value % 1 ? '' : format(datum.value, ',')"  # there is no half step
LARGEST_POINT = 700  # area of the circle of the largest memory, square pixels

Domain = tuple[float, float]
Chart = alt.Chart | alt.LayerChart | alt.FacetChart


@dataclass(frozen=True)
class Looks:
    """How the rows of a chart are told apart: by run, and in DVC's templates also by revision."""

    colour: alt.Color
    fill: alt.Fill
    dash: alt.StrokeDash
    every: dict[str, Any]  # channels of every mark of a curve
    rows: dict[str, Any]  # channels of every mark of a chart with one row a run
    point: dict[str, Any]  # channels of points


def study_looks(runs: Sequence[str], drawn: Sequence[str] | None = None) -> Looks:
    """By the run's place in the study; `drawn` are those that the legend names (None: no legend)."""
    colours = alt.Scale(domain=list(runs), range=[OKABE_ITO[i % len(OKABE_ITO)] for i in range(len(runs))])
    dashes = alt.Scale(domain=list(runs), range=[list(DASHES[i % len(DASHES)]) for i in range(len(runs))])
    legend = None
    if drawn is not None:
        longest = max(map(len, drawn), default=0)
        columns = max(1, int(WIDTH // (50 + CHARACTER * longest)))
        legend = alt.Legend(values=list(drawn), columns=columns, **LINE_LEGEND)
    return Looks(
        alt.Color("run:N", scale=colours, legend=legend),
        alt.Fill("run:N", scale=colours, legend=None),
        alt.StrokeDash("run:N", scale=dashes, legend=legend),
        every={},
        rows={"y": alt.Y("run:N", sort=list(runs), title=None, axis=None)},
        point={},
    )


LINE_LEGEND = {"symbolType": "stroke", "symbolOpacity": 1, "symbolStrokeWidth": 2}


LOOK = alt.Config(
    aria=False,  # the page names the whole picture; thousands of labelled marks help nobody
    axis=alt.AxisConfig(
        labelFontSize=FONT,
        titleFontSize=FONT,
        titleFontWeight="normal",
        gridColor="#e6e6e6",
        labelOverlap="greedy",
        labelSeparation=6,
    ),
    legend=alt.LegendConfig(
        orient="bottom",
        title=None,
        labelFontSize=FONT,
        labelLimit=WIDTH - 130,
        symbolSize=300,
        columns=4,
        aria=False,
    ),
    header=alt.HeaderConfig(labelFontSize=FONT, labelAnchor="start"),
    title=alt.TitleConfig(fontSize=TITLE_FONT, anchor="start", limit=WIDTH, offset=12),
    view=alt.ViewConfig(stroke=None),
)


def look(chart: Chart, title: str) -> Chart:
    """The chart with its title, fonts and grid: the same for every chart, on a page and in DVC."""
    return chart.properties(title=title, background="white", config=LOOK)


def curve_layers(  # noqa: PLR0913
    base: alt.Chart,
    y: str,
    axis: str,
    looks: Looks,
    *,
    x: str = "step",
    x_axis: str = "step",
    log: bool = False,
    points: bool = False,
    domain: Domain | None = None,
) -> alt.LayerChart:
    """A line a run and a band from column `y`_low to column `y`_high; the y axis logarithmic on demand."""
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    if domain:
        scale.domain = domain
    position = {
        "type": "quantitative",
        "title": axis,
        "scale": scale,
        "axis": alt.Axis(tickCount=6, format=NUMBER),
    }
    ticks = alt.Axis(tickCount=6) if x == "epoch" else alt.Axis(tickCount=6, labelExpr=WHOLE)
    base = base.encode(
        x=alt.X(x, type="quantitative", title=x_axis, axis=ticks),
        color=looks.colour,
        **looks.every,
    )
    band = base.mark_area(opacity=0.2).encode(y=alt.Y(f"{y}_low", **position), y2=f"{y}_high")
    line = base.mark_line(strokeWidth=1.6, tooltip=alt.TooltipContent("data"))
    line = line.encode(y=alt.Y(y, **position), strokeDash=looks.dash)
    dots = [base.mark_circle(size=25, opacity=1).encode(y=alt.Y(y, **position))] if points else []
    return alt.layer(band, *dots, line)


def curve(  # noqa: PLR0913
    frame: pl.DataFrame,
    column: str,
    title: str,
    axis: str,
    runs: Sequence[str],
    *,
    x: str = "step",
    log: bool = False,
    points: bool = False,
) -> Chart:
    """A line a run over steps or epochs, with a band from the lowest to the highest seed.

    Args:
        frame: run, `x`, `column`, `column`_low, `column`_high, as `metrics.frames.curves` makes it.
        column: what to draw.
        title: the chart's title.
        axis: the y axis's label with its unit.
        runs: all runs of the study in order, drawn or not.
        x: the column, and the axis's label.
        log: logarithmic y axis; a value that is not positive leaves a gap, as one that is not a number does.
        points: mark the measured points, for few of them.
    """
    values = [column, f"{column}_low", f"{column}_high"]
    good = pl.all_horizontal(pl.col(name).is_finite() for name in values)
    if log:
        good &= pl.col(f"{column}_low") > 0
    shown = frame.select("run", x, *(pl.when(good).then(pl.col(c)).alias(c) for c in values))
    measured = set(shown.filter(pl.col(column).is_not_null())["run"])
    looks = study_looks(runs, [run for run in runs if run in measured])
    domain = _single([value for c in values for value in shown[c].drop_nulls()])
    layers = curve_layers(
        alt.Chart(shown), column, axis, looks, x=x, x_axis=x, log=log, points=points, domain=domain
    )
    return look(layers.properties(width=WIDTH, height=HEIGHT, autosize=FIT), title)


FIT = alt.AutoSizeParams(type="fit-x", contains="padding")
HAS_INTERVAL = "isValid(datum.low) && datum.low !== ''"  # '' is what an empty cell of a CSV file becomes


def interval_layers(
    base: alt.Chart, axis: str | None, looks: Looks, *, x: str = "value", domain: Domain | None = None
) -> alt.LayerChart:
    """One row a run: its `label` above its point and its interval (columns low, high)."""
    position = {
        "type": "quantitative",
        "title": axis,
        "scale": alt.Scale(domain=domain) if domain else alt.Scale(zero=False, padding=12),
        "axis": alt.Axis(tickCount=5, format=NUMBER),
    }
    base = base.encode(**looks.rows)
    rule = base.transform_filter(HAS_INTERVAL).mark_rule(strokeWidth=2.5)
    whisker = rule.encode(x=alt.X("low", **position), x2="high", color=looks.colour)
    point = base.mark_point(filled=True, size=110, opacity=1, tooltip=alt.TooltipContent("data"))
    point = point.encode(x=alt.X(x, **position), color=looks.colour, **looks.point)
    return alt.layer(*_row_labels(base), whisker, point)


def cost_layers(base: alt.Chart, axis: str, looks: Looks) -> alt.LayerChart:
    """One row a run: its `label` above a bar from zero and its interval, for speed or memory."""
    position = {"type": "quantitative", "title": axis, "axis": alt.Axis(tickCount=5, format=NUMBER)}
    base = base.encode(**looks.rows)
    bar = base.mark_bar(opacity=0.85, height=12).encode(x=alt.X("value", **position), color=looks.colour)
    rule = base.transform_filter(HAS_INTERVAL).mark_rule(strokeWidth=2, color="#222222")
    whisker = rule.encode(x=alt.X("low", **position), x2="high")
    return alt.layer(*_row_labels(base), bar, whisker)


def _row_labels(base: alt.Chart) -> list[alt.Chart]:
    return texts(base.encode(x=alt.value(0)), align="left", dy=-14, limit=WIDTH - 20)


def texts(base: alt.Chart, **how: Any) -> list[alt.Chart]:
    """The column `label`, on white where it crosses a line."""
    base = base.encode(text=alt.Text("label", type="nominal"))
    halo = base.mark_text(fontSize=FONT, stroke="white", strokeWidth=3, strokeJoin="round", **how)
    return [halo, base.mark_text(fontSize=FONT, color="#222222", **how)]


def intervals(frame: pl.DataFrame, title: str, axis: str, runs: Sequence[str]) -> Chart:
    """A point and its 95 % interval a run. Not bars: their axis must start at zero, which hides differences.

    Args:
        frame: run, label, value, low, high (null: no interval), as `metrics.frames.bars` makes it for one
            metric.
    """
    domain = _single([value for c in ("value", "low", "high") for value in frame[c].drop_nulls()])
    return _rows(interval_layers(alt.Chart(frame), axis, study_looks(runs), domain=domain), title)


def costs(frame: pl.DataFrame, title: str, axis: str, runs: Sequence[str]) -> Chart:
    """A bar from zero and its 95 % interval a run, for speed or memory. Frame as for `intervals`."""
    return _rows(cost_layers(alt.Chart(frame), axis, study_looks(runs)), title)


def _rows(layers: alt.LayerChart, title: str) -> Chart:
    return look(layers.properties(width=WIDTH, height=alt.Step(ROW_HEIGHT), autosize=FIT), title)


def trade_off_layers(
    base: alt.Chart,
    axes: tuple[str | None, str | None],
    looks: Looks,
    *,
    columns: tuple[str, str] = ("speed", "value"),
    domains: tuple[Domain, Domain] | None = None,
) -> alt.LayerChart:
    """A circle a run: x speed, y quality with its interval, area memory; filled where `frontier` is yes."""
    (x_axis, y_axis), (x, y) = axes, columns
    loose = alt.Scale(zero=False, padding=30)
    x_scale, y_scale = [alt.Scale(domain=d, nice=False) for d in domains] if domains else (loose, loose)
    across = alt.X(
        x, type="quantitative", title=x_axis, scale=x_scale, axis=alt.Axis(tickCount=5, format=NUMBER)
    )
    up = {
        "type": "quantitative",
        "title": y_axis,
        "scale": y_scale,
        "axis": alt.Axis(tickCount=5, format=NUMBER),
    }
    area = alt.Size("memory", type="quantitative", legend=None).scale(zero=True, range=[0, LARGEST_POINT])
    filled = alt.condition("datum.frontier === 'yes'", alt.value(0.75), alt.value(0))
    base = base.encode(x=across, color=looks.colour)
    rule = base.transform_filter(HAS_INTERVAL).mark_rule(strokeWidth=1.6)
    whisker = rule.encode(y=alt.Y("low", **up), y2="high", **looks.every)
    point = base.mark_point(strokeWidth=2, opacity=1, filled=False, tooltip=alt.TooltipContent("data"))
    point = point.encode(y=alt.Y(y, **up), size=area, fill=looks.fill, fillOpacity=filled, **looks.point)
    return alt.layer(whisker, point)


def trade_off(frame: pl.DataFrame, title: str, axes: tuple[str, str], runs: Sequence[str]) -> Chart:
    """Quality × speed × memory, each run named beside its circle.

    Args:
        frame: run, label, speed, value, low, high, memory, frontier, as `metrics.trade_offs` makes it.
        axes: the labels of x and y, with units and the direction that is better.
    """
    ends = [
        row[name] for row in frame.to_dicts() for name in ("low", "high", "value") if row[name] is not None
    ]
    domains = (_padded(frame["speed"].to_list()), _padded(ends))
    shown = frame.with_columns(pl.col("memory").fill_null(1.0))  # not measured: circles of one size
    layers = trade_off_layers(alt.Chart(shown), axes, study_looks(runs), domains=domains)
    places = alt.Chart(names(shown, domains)).encode(x="speed:Q", y="value:Q")
    named = texts(places, align="left", baseline="middle")
    return look(alt.layer(layers, *named).properties(width=SQUARE, height=SQUARE), title)


def names(frame: pl.DataFrame, domains: tuple[Domain, Domain]) -> pl.DataFrame:
    """label, speed, value: where each run's name starts, in the axes' units.

    Frame: also low, high and memory, which is as the area of a circle.
    """
    (left, right), (bottom, top) = domains
    wide, high = (right - left) / SQUARE, (top - bottom) / SQUARE  # of a pixel
    heaviest = frame["memory"].max() or 1.0
    labels, taken = [], []
    for row in frame.to_dicts():
        radius = math.sqrt(LARGEST_POINT * row["memory"] / heaviest / math.pi) + 2
        across, down = (row["speed"] - left) / wide, (top - row["value"]) / high
        labels.append(Label(row["label"], across, down, radius, CHARACTER * len(row["label"])))
        if row["low"] is not None:
            taken.append(Box(across - 2, (top - row["high"]) / high, across + 2, (top - row["low"]) / high))
    ends = place(labels, taken, SQUARE, SQUARE)
    rows = [(label.text, left + a * wide, top - b * high) for label, (a, b) in zip(labels, ends, strict=True)]
    return pl.DataFrame(rows, schema=["label", "speed", "value"], orient="row")


def _padded(values: Sequence[float]) -> Domain:
    """An axis with room for circles and labels at both ends."""
    low, high = min(values), max(values)
    room = 0.2 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _single(values: Sequence[float]) -> Domain | None:
    """An axis around the only value there is, where the drawing library would make one without length.

    Means of equal values differ in their last digits.
    """
    if not values or max(values) - min(values) > 1e-6 * abs(max(values)):
        return None
    return _padded([max(values)])
