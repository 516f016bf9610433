"""A study's figures over the revisions of a repository, as a table and a chart. Must not compute a result."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from metrics.history import Change, signed
from metrics.measures import METRICS
from metrics.words import number
from plots.charts import FIT, HEIGHT, NUMBER, WIDTH, Chart, look, study_looks
from plots.outcome_tables import Table


def table(found: Sequence[Change], metric: str) -> Table:
    """A row a change."""
    of = METRICS[metric]
    heads = ["revision", "date", "run", of.axis, "change", "speed (1/s)", "verdict"]
    rows = [
        [
            one.revision.name,
            one.revision.date,
            one.run,
            number(None if one.value is None else one.value * of.factor),
            signed(one.difference, metric),
            number(one.speed),
            one.verdict,
        ]
        for one in found
    ]
    return heads, rows


def timeline(frame: pl.DataFrame, title: str, axis: str) -> Chart:
    """A line a run through the revisions in which its figures changed; experiments are points beside it.

    Args:
        frame: place, revision, aside, run, value, as `metrics.history` makes it.
        title: the chart's title.
        axis: the y axis's label, with the unit.
    """
    runs = list(dict.fromkeys(frame["run"]))
    looks = study_looks(runs, runs)
    order = list(dict.fromkeys(frame.sort("place")["revision"]))
    base = alt.Chart(frame).encode(
        # Places, not dates: commits of one day would lie on each other, and months without any would be the chart.
        x=alt.X("revision:N", title="revision", sort=order, axis=alt.Axis(labelAngle=-45)),
        y=alt.Y(
            "value:Q", title=axis, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=6, format=NUMBER)
        ),
        color=looks.colour,
    )
    line = base.transform_filter("!datum.aside").mark_line(strokeWidth=1.6)
    line = line.encode(strokeDash=looks.dash, order="place:Q")
    kept = base.transform_filter("!datum.aside").mark_circle(size=40, opacity=1)
    tried = base.transform_filter("datum.aside").mark_point(size=60, opacity=1, filled=False)
    return look(alt.layer(line, kept, tried).properties(width=WIDTH, height=HEIGHT, autosize=FIT), title)
