"""Charts, where names go in them, DVC's templates and its offline page."""

import csv
import io
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import altair as alt
import polars as pl
import pytest
import vl_convert
from dvc_render.vega import VegaRenderer
from fake_results import write_study

from metrics import frames, rows, summary, trade_offs
from plots import charts, figures, labels, offline, templates
from plots.svg import PATH, _rounded, svg

ROOT = Path(__file__).parents[2]


def _curve(losses):
    columns = {"train_loss": losses, "train_loss_low": losses, "train_loss_high": losses}
    return pl.DataFrame({"run": ["b"] * len(losses), "step": range(1, len(losses) + 1)} | columns)


def test_a_run_keeps_its_colour_when_others_are_not_drawn():
    chart = charts.curve(_curve([2.0, 1.0]), "train_loss", "Training loss", "loss (nats/token)", ["a", "b"])
    drawing = svg(chart, "x", "d")
    assert charts.OKABE_ITO[1] in drawing
    assert charts.OKABE_ITO[0] not in drawing
    assert "loss (nats/token)" in drawing


@pytest.mark.parametrize(
    ("losses", "log", "drawn"),
    [
        ([2.0, math.nan, math.inf, 1.0], False, [2.0, None, None, 1.0]),
        ([2.0, 0.0, -1.0, 1.0], True, [2.0, None, None, 1.0]),
        ([2.0, 0.0, -1.0, 1.0], False, [2.0, 0.0, -1.0, 1.0]),
    ],
)
def test_values_that_cannot_be_drawn_leave_a_gap(losses, log, drawn):
    chart = charts.curve(_curve(losses), "train_loss", "t", "y", ["b"], log=log)
    [data] = chart.to_dict()["datasets"].values()
    assert [row["train_loss"] for row in data] == drawn
    line = re.search(r'd="(M[^"]*)" stroke="#0072B2" stroke-width="1.6"', svg(chart, "x", "d"))[1]
    assert line.count("M") == (2 if None in drawn else 1)


@pytest.mark.parametrize("losses", [[3.2, 3.2], [3.2, 3.2000000000000006]])
def test_equal_values_have_an_axis_around_them(losses):
    drawing = svg(charts.curve(_curve(losses), "train_loss", "t", "y", ["b"]), "x", "d")
    # 5 % of 3.2 on either side
    assert {"3.1", "3.2", "3.3"} <= set(re.findall(r">([\d.]+)</text>", drawing))


def test_svg_ids_do_not_clash_between_charts():
    # A clip path is what has an id here.
    frame = pl.DataFrame({"x": [1.0, 2.0]})
    chart = charts.look(alt.Chart(frame).mark_line(clip=True).encode(x="x:Q", y="x:Q"), "t")
    drawn = [svg(chart, prefix, "d") for prefix in ("c1", "c2")]
    ids = [set(re.findall(r'\bid="([^"]+)"', drawing)) for drawing in drawn]
    assert ids[0] and ids[0].isdisjoint(ids[1])
    assert [set(re.findall(r"url\(#([^)]+)\)", drawing)) for drawing in drawn] == ids


def test_a_chart_with_a_scale_of_colours_is_the_same_whatever_was_drawn_before():
    frame = pl.DataFrame({"x": ["a", "b"], "value": [1.0, 2.0]})
    chart = charts.look(alt.Chart(frame).mark_rect().encode(x="x:N", color="value:Q"), "t")
    first, second = (svg(chart, "c", "d") for _ in range(2))
    assert first == second and "c-gradient_0" in first


def test_svg_says_what_it_is_and_keeps_paths_short():
    chart = charts.curve(_curve([2.0, 1.5, 1.1]), "train_loss", "t", "y", ["b"])
    drawing = svg(chart, "x", 'a "b" < c')
    words = "a &quot;b&quot; &lt; c"
    assert (
        drawing.startswith(f'<svg role="img" aria-label="{words}"') and f"<title>{words}</title>" in drawing
    )
    assert drawing.count("<title>") == drawing.count('role="img"') == 1
    paths = re.findall(r'\bd="([^"]*)"', drawing)
    assert paths and not any(re.search(r"\.\d\d", path) for path in paths)


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("M0,78.76L1.93,103.04L3.8,138.79L3.8,138L2,138.5Z", "M0,78.7L1.9,103l1.9,35.7 0,-.7 -1.8,.5Z"),
        ("M1,2L3,4M5,6L7,8L9,8", "M1,2L3,4M5,6L7,8l2,0"),  # a gap
        ("M2.5,0A2.5,2.5,0,1,1,-2.5,0", "M2.5,0A2.5,2.5,0,1,1,-2.5,0"),
        ("M0,0L1,6.123e-15L2,2L3,1", "M0,0L1,6.1e-15L2,2l1,-1"),
    ],
)
def test_a_line_is_written_from_point_to_point(path, short):
    assert PATH.sub(_rounded, f'd="{path}"') == f'd="{short}"'


def test_a_chart_has_fewer_points_of_each_run_the_more_runs_it_has(tmp_path):
    runs = {f"run_{i}": {} for i in range(20)}
    results = write_study(tmp_path, seeds=(1,), runs=runs, baseline="run_0")
    [drawn] = [
        one for one in figures.every(summary.summarize(rows.read(results))).values() if one.name == "lr"
    ]
    points = next(iter(drawn.chart.to_dict()["datasets"].values()))
    steps = [row["step"] for row in points if row["run"] == "run_3"]
    assert len(steps) == figures.POINTS_OF_ALL // 20 == 75
    assert steps[0] == 1 and steps[-1] == 300 and {b - a for a, b in pairwise(steps)} == {4, 5}


def _labels(*places):
    return [labels.Label("name", x, y, radius=8, width=60) for x, y in places]


def _boxes(placed, width=60):
    half = labels.HEIGHT / 2
    return [labels.Box(x, y - half, x + width, y + half) for x, y in placed]


def test_a_name_stands_right_of_its_circle_where_there_is_room():
    assert labels.place(_labels((100, 100)), [], 300, 300) == [(111, 100)]  # radius 8, gap 3


def test_a_name_stays_inside_and_off_everything_else():
    assert labels.place(_labels((280, 100)), [], 300, 300) == [(280 - 11 - 60, 100)]  # left
    interval = labels.Box(112, 90, 116, 110)
    [box] = _boxes(labels.place(_labels((100, 100)), [interval], 300, 300))
    assert box.overlap(interval) == 0


def test_names_of_neighbours_do_not_cover_each_other():
    marks = _labels((150, 150), (155, 152), (160, 148), (152, 160), (158, 160))
    boxes = _boxes(labels.place(marks, [], 300, 300))
    circles = [labels.Box(m.x - 8, m.y - 8, m.x + 8, m.y + 8) for m in marks]
    for place, box in enumerate(boxes):
        assert all(box.overlap(other) == 0 for other in [*boxes[:place], *circles])
        assert box.left >= 0 and box.right <= 300 and box.top >= 0 and box.bottom <= 300


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return summary.summarize(rows.read(write_study(tmp_path_factory.mktemp("study"))))


def test_the_scatter_names_every_run_and_fills_those_that_no_other_beats(study):
    frame = trade_offs.trade_offs(study)
    assert dict(frame.select("run", "frontier").iter_rows()) == {
        "adamw": "yes",  # faster than checkpointing, better than sgd
        "adamw-checkpointing": "yes",  # least memory
        "sgd": "yes",  # fastest
    }
    drawing = svg(charts.trade_off(frame, "t", ("speed", "loss"), list(study.results.study.runs)), "x", "d")
    for name, memory in (("adamw", "0.469"), ("adamw-checkpointing", "0.422"), ("sgd", "0.469")):
        assert f">{name}, {memory} GiB<" in drawing


@pytest.mark.parametrize("name", sorted(templates.TEMPLATES))
def test_committed_templates_are_what_the_code_makes(name):
    assert (ROOT / templates.DIRECTORY / name).read_text(encoding="utf-8") == templates.text(name)
    committed = {path.name for path in (ROOT / templates.DIRECTORY).glob("*.json")}
    assert committed == set(templates.TEMPLATES)


def _dvc(study, name):
    """The template filled as DVC fills it: its rows are a CSV file's, all text, of two revisions."""
    curve = frames.curves(study.results, study.results.steps, ("lr",), 20)
    frame, x, y = {
        "plumbline_curve": (curve, "step", "lr"),
        "plumbline_log_curve": (curve, "step", "lr"),
        "plumbline_point_curve": (curve, "step", "lr"),
        "plumbline_intervals": (frames.bars(study, ("test_loss", "peak_memory_gib")), "value", "run"),
        "plumbline_trade_off": (trade_offs.trade_offs(study), "speed", "value"),
    }[name]
    written = list(csv.DictReader(io.StringIO(frame.write_csv())))
    data = [row | {"rev": rev} for rev in ("workspace", "HEAD") for row in written]
    words = {"x_label": "the x", "y_label": "the y", "title": "the title"}
    folder = str(ROOT / templates.DIRECTORY)
    return VegaRenderer(data, name, template=name, template_dir=folder, x=x, y=y, **words), data


def dvc_page(folder):
    """What `dvc plots show` writes for a small study: every template on the offline page."""
    study = summary.summarize(rows.read(write_study(folder)))
    drawn = "".join(
        _dvc(study, name.removesuffix(".json"))[0].generate_html() for name in templates.TEMPLATES
    )
    return offline.page().replace("{plot_divs}", drawn).replace("{refresh_tag}", "")


@pytest.mark.parametrize(
    ("name", "texts", "lines"),
    [
        ("plumbline_curve", ["the title", "the x", "the y", "sgd", "HEAD"], 6),
        ("plumbline_log_curve", ["the title", "the x", "the y", "sgd", "HEAD"], 6),
        ("plumbline_point_curve", ["the title", "the x", "the y", "sgd", "HEAD"], 6),
        ("plumbline_intervals", ["the title", "test loss (nats/token)", "sgd: 2.619 ± 0.043", "HEAD"], 0),
        ("plumbline_trade_off", ["the title", "the x", "test loss (nats/token)", "sgd", "HEAD"], 0),
    ],
)
def test_dvc_fills_the_templates_and_they_draw(study, name, texts, lines):
    renderer, data = _dvc(study, name)
    filled = renderer.partial_html()
    assert "<DVC_METRIC" not in filled
    spec = json.loads(filled)
    assert spec["$schema"] == "https://vega.github.io/schema/vega-lite/v5.json"
    assert spec["data"]["values"] == data
    drawing = vl_convert.vegalite_to_svg(spec, vl_version=offline.VEGA_LITE)
    assert [text for text in texts if f">{text}<" not in drawing] == []
    assert "NaN" not in drawing and "undefined" not in drawing
    assert len(re.findall(r'd="M[^"]{200,}" stroke="#', drawing)) == lines  # a line a run and revision


@pytest.mark.parametrize(
    ("template", "layers"),
    [
        (templates.curve, lambda c: c.curve_layers),
        (templates.log_curve, lambda c: c.curve_layers),
        (templates.point_curve, lambda c: c.curve_layers),
        (templates.intervals, lambda c: c.interval_layers),
        (templates.trade_off, lambda c: c.trade_off_layers),
    ],
)
def test_templates_draw_with_the_marks_of_the_report(template, layers, monkeypatch):
    """There is one place for marks and axes: whatever becomes of it shows in a template too."""
    made = layers(charts)

    def changed(*arguments, **options):
        chart = made(*arguments, **options)
        chart.layer[-1].mark.strokeCap = "square"
        return chart

    before = json.dumps(template())
    monkeypatch.setattr(charts, made.__name__, changed)
    assert "strokeCap" not in before and "strokeCap" in json.dumps(template())


def test_offline_page_has_the_library_inside_and_loads_nothing():
    page = offline.page()
    assert "{plot_divs}" in page
    assert "{scripts}" not in page
    assert "window.vegaEmbed=" in page
    around = re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)
    assert "vega" not in around
    assert not re.search(r"https?:|<(script|link|img)\b", around)
