"""Charts of scaling: speedup and efficiency against the number of processes, with what would be ideal.

Pure: a frame in, an altair chart out. Whether a run is slower than one process is a place in them: the shaded zone.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

import altair as alt
import polars as pl

from metrics.diagnosis import GOOD
from plots import charts
from plots.charts import CHARACTER, FONT, HAS_INTERVAL, WIDTH, Chart, Domain
from plots.labels import HEIGHT as LINE

HIGH = 300  # pixels
GREY, RED = "#777777", "#D55E00"
STEPS = 40  # of a curve that is drawn from straight pieces
LEFT, GAP = 50, 26  # pixels left of one process, and between the last points and the names
APART, SPREAD = 10, 40  # pixels between runs in as many processes, and of all of them together at most
NAME = 27  # characters of a line of a name


def speedup(frame: pl.DataFrame, title: str, axis: str, runs: Sequence[str]) -> Chart:
    """Speedup over processes, a line a reference; the ideal line, and the zone in which one process is faster.

    Args:
        frame: run, series, label, processes, value, low, high, as `metrics.scaling.scaling_points` makes it.
        axis: the y axis's label.
        runs: all runs of the study in order.
    """
    most = float(frame["processes"].max())
    top = 1.08 * max(most, *frame["value"], *frame["high"].drop_nulls())
    middle = (1 + most) / 2
    guides = [
        _zone([(end, 1.0) for end in _across(frame)]),
        _line([(1, 1.0), (most, most)], "ideal", (middle, middle), dy=-8),
    ]
    return _chart(frame, title, axis, runs, guides, (0.0, top))


def efficiency(frame: pl.DataFrame, title: str, axis: str, runs: Sequence[str]) -> Chart:
    """The same of efficiency in percent: 100 % is ideal, and from where on a run scales well. Arguments as there."""
    most, good = float(frame["processes"].max()), 100 * GOOD
    top = 1.08 * max(100.0, *frame["value"], *frame["high"].drop_nulls())
    left, right = _across(frame)
    places = [left + (right - left) * i / STEPS for i in range(STEPS + 1)]
    guides = [
        _zone([(x, min(100 / x, top)) for x in places]),
        _line([(1, 100.0), (most, 100.0)], "ideal", (1, 100.0)),
        _line([(1, good), (most, good)], f"{good:.0f} %", (1, good)),
    ]
    return _chart(frame, title, axis, runs, guides, (0.0, top))


def _names(frame: pl.DataFrame) -> list[str]:
    """The labels in lines that leave room for the chart."""
    return ["\n".join(wrap(label, NAME, break_long_words=False)) for label in frame["label"]]


def _pixel(frame: pl.DataFrame) -> float:
    """Processes that one pixel across is."""
    longest = max(len(line) for name in _names(frame) for line in name.split("\n") or [""])
    return (float(frame["processes"].max()) - 1) / (WIDTH - LEFT - GAP - CHARACTER * longest)


def _across(frame: pl.DataFrame) -> Domain:
    """The axis of processes, with room beside the first for the guides' names, and beside the last for the runs'."""
    left = 1 - LEFT * _pixel(frame)
    return left, left + WIDTH * _pixel(frame)


def apart(frame: pl.DataFrame, runs: Sequence[str]) -> pl.DataFrame:
    """The frame with the column x: the processes, a little aside where several runs have as many."""
    places = {}
    for (count,), same in frame.filter(pl.col("label") != "").partition_by("processes", as_dict=True).items():
        names = sorted(set(same["run"]), key=list(runs).index)
        step = min(APART, SPREAD / max(len(names) - 1, 1)) * _pixel(frame)
        places |= {(run, count): (i - (len(names) - 1) / 2) * step for i, run in enumerate(names)}
    x = [row["processes"] + places.get((row["run"], row["processes"]), 0.0) for row in frame.to_dicts()]
    return frame.with_columns(pl.Series("x", x, pl.Float64))


def beside(frame: pl.DataFrame, domain: Domain) -> pl.DataFrame:
    """Columns run, label, x, value, name_x, name_value: points, and where the first line of their names is.

    Right of all points; none covers another, and each is as near to its point's height as that leaves room for.
    """
    pixel, high = _pixel(frame), (domain[1] - domain[0]) / HIGH
    named = frame.with_columns(pl.Series("label", _names(frame), pl.String)).filter(pl.col("label") != "")
    named = named.sort("value", "run", descending=[True, False])
    half = [LINE * (1 + label.count("\n")) / 2 for label in named["label"]]
    wanted = [(domain[1] - value) / high for value in named["value"]]
    centres, end = [], 0.0
    for middle, own in zip(wanted, half, strict=True):  # from the top: none above the end of the one before
        centres.append(max(middle, end + own))
        end = centres[-1] + own
    end = float(HIGH)
    for place in reversed(range(len(centres))):  # and from the bottom, where they have come to it
        centres[place] = min(centres[place], end - half[place])
        end = centres[place] - half[place]
    lines = [centre - own + LINE / 2 for centre, own in zip(centres, half, strict=True)]
    name_x = float(frame["processes"].max()) + GAP * pixel
    return named.select("run", "label", "x", "value").with_columns(
        pl.lit(name_x).alias("name_x"),
        pl.Series("name_value", [domain[1] - line * high for line in lines], pl.Float64),
    )


def _chart(  # noqa: PLR0913
    frame: pl.DataFrame,
    title: str,
    axis: str,
    runs: Sequence[str],
    guides: list[alt.LayerChart],
    domain: Domain,
) -> Chart:
    frame = apart(frame, runs)
    counts = sorted({1, *frame["processes"].to_list()})
    x = alt.X(
        "x:Q",
        title="processes",
        scale=alt.Scale(domain=_across(frame), nice=False),
        axis=alt.Axis(values=counts, format="d", grid=False),
    )
    y = {"title": axis, "scale": alt.Scale(domain=domain, nice=False), "type": "quantitative"}
    looks = charts.study_looks(runs)
    base = alt.Chart(frame).encode(x=x)
    line = base.mark_line(strokeWidth=1.6, color=GREY).encode(y=alt.Y("value", **y), detail="series:N")
    rule = base.transform_filter(HAS_INTERVAL).mark_rule(strokeWidth=2)
    whisker = rule.encode(y=alt.Y("low", **y), y2="high", color=looks.colour)
    point = base.mark_point(filled=True, size=80, opacity=1).encode(y=alt.Y("value", **y), color=looks.colour)
    names = alt.Chart(beside(frame, domain))
    leader = names.mark_rule(strokeWidth=1, strokeDash=[2, 2]).encode(
        x=x, x2="name_x", y=alt.Y("value", **y), y2="name_value", color=looks.colour
    )
    texts = charts.texts(
        names.encode(x="name_x:Q", y=alt.Y("name_value", **y)),
        align="left",
        baseline="middle",
        dx=3,
        lineBreak="\n",
    )
    layers = alt.layer(*guides, line, leader, whisker, point, *texts)
    return charts.look(layers.properties(width=WIDTH, height=HIGH), title)


def _zone(edge: list[tuple[float, float]]) -> alt.LayerChart:
    """What is below the edge: slower than one process."""
    rows = pl.DataFrame(edge, schema=["x", "top"], orient="row").with_columns(pl.lit(0.0).alias("bottom"))
    area = alt.Chart(rows).mark_area(color=RED, opacity=0.12).encode(x="x:Q", y="bottom:Q", y2="top:Q")
    # In the corner, where no run is: the zone is highest there in both charts.
    words = rows.head(1).with_columns(pl.lit("slower than one process").alias("text"))
    text = alt.Chart(words).mark_text(align="left", dx=6, dy=-8, fontSize=FONT, color=RED)
    return alt.layer(area, text.encode(x="x:Q", y="bottom:Q", text="text:N"))


def _line(ends: list[Domain], name: str, at: Domain, dy: int = 0) -> alt.LayerChart:
    """A dashed line with its name left of a point of it."""
    line, words = (
        pl.DataFrame(
            [(float(x), float(y), name) for x, y in places], schema=["x", "value", "text"], orient="row"
        )
        for places in (ends, [at])
    )
    drawn = alt.Chart(line).mark_line(strokeDash=[6, 4], strokeWidth=1.3, color=GREY)
    text = alt.Chart(words).mark_text(
        align="right", baseline="middle", dx=-8, dy=dy, fontSize=FONT, color=GREY
    )
    place = {"x": "x:Q", "y": "value:Q"}
    return alt.layer(drawn.encode(**place), text.encode(**place, text="text:N"))
