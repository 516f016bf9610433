"""DVC plot templates made from altair charts: `python -m plots.templates` writes them to `.dvc/plots/`.

DVC fills the anchors (`<DVC_METRIC_DATA>` and so on) with its own rows, which carry a `rev` column. Must stay
free of any study's names. The written files are committed; a test compares them with this code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import altair as alt

from plots.charts import DASHES, OKABE_ITO

DIRECTORY = Path(".dvc/plots")
# DVC's page and Studio draw with vega-lite 5; altair 6 writes v6.
SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
X, Y, X_LABEL, Y_LABEL = (f"<DVC_METRIC_{name}>" for name in ("X", "Y", "X_LABEL", "Y_LABEL"))


def _colour() -> alt.Color:
    # sort=None: runs in the order of the rows, which is the study's
    return alt.Color("run", type="nominal", sort=None, scale=alt.Scale(range=list(OKABE_ITO)), title="run")


def _finish(chart: alt.Chart | alt.LayerChart | alt.FacetChart) -> dict[str, Any]:
    spec = chart.to_dict(validate=False)  # an anchor stands where the schema wants a list of rows
    spec["$schema"] = SCHEMA
    spec["data"] = {"values": "<DVC_METRIC_DATA>"}
    spec["title"] = {"text": "<DVC_METRIC_TITLE>", "anchor": "start"}
    spec.pop("datasets", None)
    spec.pop("config", None)
    return spec


def curve() -> dict[str, Any]:
    """A line over x: colour by run, dash by revision."""
    chart = (
        alt.Chart(alt.UrlData(""))
        .mark_line(strokeWidth=1.6, tooltip=alt.TooltipContent("data"))
        .encode(
            x=alt.X(X, type="quantitative", title=X_LABEL),
            y=alt.Y(Y, type="quantitative", title=Y_LABEL, scale=alt.Scale(zero=False)),
            color=_colour(),
            strokeDash=alt.StrokeDash(
                "rev",
                type="nominal",
                sort=None,
                title="revision",
                scale=alt.Scale(range=[list(dash) for dash in DASHES]),
            ),
        )
    )
    return _finish(chart.properties(width=560, height=300))


def bars() -> dict[str, Any]:
    """A point and its interval (columns low, high) a run and revision; one panel and one axis a metric.

    x is the value's column and y the run's, as DVC's own horizontal templates have it.
    """
    position = {"type": "quantitative", "title": None, "scale": alt.Scale(zero=False)}
    position |= {"axis": alt.Axis(tickCount=6)}
    base = alt.Chart(alt.UrlData("")).encode(
        y=alt.Y(Y, type="nominal", sort=None, title=None, axis=alt.Axis(labelLimit=220)),
        yOffset=alt.YOffset("rev", type="nominal", sort=None),
        color=_colour().legend(None),
    )
    whisker = (
        base.transform_filter("datum.low != null && datum.low != ''")
        .mark_rule(strokeWidth=2.5)
        .encode(x=alt.X("low", **position), x2="high")
    )
    point = base.mark_point(filled=True, size=90, opacity=1, tooltip=alt.TooltipContent("data")).encode(
        x=alt.X(X, **position),
        shape=alt.Shape("rev", type="nominal", sort=None, title="revision"),
    )
    layers = alt.layer(whisker, point).properties(width=420, height=alt.Step(18))
    # Facets ignore sort=None: panels in the order of the rows need the row's number.
    order, header = alt.EncodingSortField("row", op="min"), alt.Header(labelFontSize=12)
    facet = alt.Facet("metric", type="nominal", sort=order, title=None, header=header)
    panels = layers.facet(facet, columns=1).resolve_scale(x="independent")
    return _finish(panels.transform_window(row="row_number()"))


TEMPLATES = {"plumbline_curve.json": curve, "plumbline_bars.json": bars}


def text(name: str) -> str:
    """The exact content of one template file."""
    return json.dumps(TEMPLATES[name](), indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Write both templates."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name in TEMPLATES:
        (DIRECTORY / name).write_text(text(name), encoding="utf-8")
        print(DIRECTORY / name, file=sys.stderr)


if __name__ == "__main__":
    main()
