"""DVC plot templates: `python -m plots.templates` writes them to `.dvc/plots/`.

The marks, axes and dashes are those of the report's charts; here is only what differs. DVC fills the anchors
(`<DVC_METRIC_DATA>` and so on) with its own rows, which carry a `rev` column. Must stay free of any study's
names. The written files are committed; a test compares them with this code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import altair as alt

from plots import charts

DIRECTORY = Path(".dvc/plots")
# DVC's page and Studio draw with vega-lite 5; altair 6 writes v6.
SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
X, Y, X_LABEL, Y_LABEL = (f"<DVC_METRIC_{name}>" for name in ("X", "Y", "X_LABEL", "Y_LABEL"))


def _looks() -> charts.Looks:
    """Colour by run, in the order of the rows, which is the study's; dash, shape and row by revision."""
    run = {"type": "nominal", "sort": None, "scale": alt.Scale(range=list(charts.OKABE_ITO))}
    dashes = alt.Scale(range=[list(dash) for dash in charts.DASHES])
    lines = alt.Legend(title="revision", **charts.LINE_LEGEND)
    dash = alt.StrokeDash("rev", type="nominal", sort=None, scale=dashes, legend=lines)
    return charts.Looks(
        alt.Color("run", legend=alt.Legend(title="run", **charts.LINE_LEGEND), **run),
        alt.Fill("run", legend=None, **run),
        dash,
        every={"detail": alt.Detail("rev", type="nominal")},
        rows={
            "y": alt.Y("run", type="nominal", sort=None, title=None, axis=None),
            "yOffset": alt.YOffset("rev", type="nominal", sort=None),
        },
        point={"shape": alt.Shape("rev", type="nominal", sort=None, title="revision")},
    )


def _base() -> alt.Chart:
    return alt.Chart(alt.UrlData(""))


def _finish(chart: charts.Chart) -> dict[str, Any]:
    spec = charts.look(chart, "").to_dict(validate=False)  # an anchor stands where the schema wants rows
    spec["$schema"] = SCHEMA
    spec["data"] = {"values": "<DVC_METRIC_DATA>"}
    spec["title"] = {"text": "<DVC_METRIC_TITLE>"}
    spec.pop("datasets", None)
    return spec


def curve(log: bool = False, points: bool = False) -> dict[str, Any]:
    """A line and a band over x, from the columns y, y_low and y_high: colour by run, dash by revision."""
    base = _base().transform_filter(f"datum['{Y}_low'] > 0") if log else _base()
    layers = charts.curve_layers(base, Y, Y_LABEL, _looks(), x=X, x_axis=X_LABEL, log=log, points=points)
    return _finish(layers.properties(width=charts.WIDTH, height=charts.HEIGHT))


def log_curve() -> dict[str, Any]:
    """The same on a logarithmic axis, for values that differ by orders of magnitude."""
    return curve(log=True)


def point_curve() -> dict[str, Any]:
    """The same with each measurement marked, for few of them."""
    return curve(points=True)


def intervals() -> dict[str, Any]:
    """A point and its interval (columns low, high) a run and revision; one panel and one axis a metric.

    x is the value's column and y the run's, as DVC's own horizontal templates have it.
    """
    layers = charts.interval_layers(_base(), None, _looks(), x=X)
    rows = alt.Step(charts.ROW_HEIGHT, **{"for": "offset"})
    # Facets ignore sort=None: panels in the order of the rows need the row's number.
    return _panels(layers.properties(width=charts.WIDTH, height=rows), independent="x")


def trade_off() -> dict[str, Any]:
    """Quality (y, with its interval) × speed (x) × memory (area), a circle a run and revision."""
    layers = charts.trade_off_layers(_base(), (X_LABEL, None), _looks(), columns=(X, Y))
    return _panels(layers.properties(width=charts.SQUARE, height=charts.SQUARE), independent="y")


def _panels(layers: alt.LayerChart, independent: str) -> dict[str, Any]:
    """One panel below the other for each `metric`, which names it, with its unit."""
    order = alt.EncodingSortField("row", op="min")
    facet = alt.Facet("metric", type="nominal", sort=order, title=None)
    panels = layers.facet(facet, columns=1).resolve_scale(**{independent: "independent"})
    return _finish(panels.transform_window(row="row_number()"))


TEMPLATES = {
    "plumbline_curve.json": curve,
    "plumbline_log_curve.json": log_curve,
    "plumbline_point_curve.json": point_curve,
    "plumbline_intervals.json": intervals,
    "plumbline_trade_off.json": trade_off,
}


def text(name: str) -> str:
    """The exact content of one template file."""
    return json.dumps(TEMPLATES[name](), indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Write every template, and remove those that are no more."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for old in DIRECTORY.glob("plumbline_*.json"):
        old.unlink()
    for name in TEMPLATES:
        (DIRECTORY / name).write_text(text(name), encoding="utf-8")
        print(DIRECTORY / name, file=sys.stderr)


if __name__ == "__main__":
    main()
