"""Charts, DVC templates, the offline page and the report."""

import json
import math
import re
from html import unescape
from pathlib import Path

import polars as pl
import pytest
from dvc_render.vega import VegaRenderer
from fake_results import write_run, write_study

from metrics import rows, summary, words
from plots import charts, offline, report, templates

ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(tmp_path):
    return summary.summarize(rows.read(write_study(tmp_path)))


def _curve(losses):
    columns = {"train_loss": losses, "train_loss_low": losses, "train_loss_high": losses}
    return pl.DataFrame({"run": ["b"] * len(losses), "step": range(1, len(losses) + 1)} | columns)


def test_a_run_keeps_its_colour_when_others_are_not_drawn():
    chart = charts.curve(_curve([2.0, 1.0]), "train_loss", "Training loss", "loss (nats/token)", ["a", "b"])
    drawing = charts.svg(chart, "x")
    assert charts.OKABE_ITO[1] in drawing
    assert charts.OKABE_ITO[0] not in drawing
    assert "loss (nats/token)" in drawing


def test_values_that_are_not_numbers_leave_a_gap():
    losses = [2.0, math.nan, math.inf, 1.0]
    spec = charts.curve(_curve(losses), "train_loss", "t", "y", ["b"]).to_dict()
    [data] = spec["datasets"].values()
    assert [row["train_loss"] for row in data] == [2.0, 1.0]


def test_svg_ids_do_not_clash_between_charts():
    chart = charts.curve(_curve([2.0, 1.0]), "train_loss", "t", "y", ["b"])
    ids = [set(re.findall(r'\bid="([^"]+)"', charts.svg(chart, prefix))) for prefix in ("c1", "c2")]
    assert ids[0].isdisjoint(ids[1])


@pytest.mark.parametrize("name", sorted(templates.TEMPLATES))
def test_committed_templates_are_what_the_code_makes(name):
    assert (ROOT / templates.DIRECTORY / name).read_text(encoding="utf-8") == templates.text(name)


@pytest.mark.parametrize(
    ("name", "x", "y"), [("plumbline_curve", "step", "lr"), ("plumbline_bars", "value", "run")]
)
def test_dvc_fills_the_templates(name, x, y):
    row = {
        "rev": "workspace",
        "run": "a",
        "metric": "m",
        "step": 1,
        "lr": 0.1,
        "value": 1,
        "low": 0,
        "high": 2,
    }
    labels = {"x_label": "the x", "y_label": "the y", "title": "the title"}
    folder = str(ROOT / templates.DIRECTORY)
    filled = VegaRenderer(
        [row], "plot", template=name, template_dir=folder, x=x, y=y, **labels
    ).partial_html()
    assert "<DVC_METRIC" not in filled
    spec = json.loads(filled)
    assert spec["$schema"] == "https://vega.github.io/schema/vega-lite/v5.json"
    assert spec["data"]["values"] == [row]
    assert spec["title"]["text"] == "the title"


def test_offline_page_has_the_library_inside_and_loads_nothing():
    page = offline.page()
    assert "{plot_divs}" in page
    assert "{scripts}" not in page
    assert "window.vegaEmbed=" in page
    around = re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)
    assert "vega" not in around
    assert not re.search(r"https?:|<(script|link|img)\b", around)


def test_report_stands_alone(study):
    page = report.html(study)
    links = set(re.findall(r"https?://[^\"'<> )]+", page))
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<(script|link|img|iframe)\b", page)
    assert len(page.encode()) < 2_000_000
    assert page.count("<svg") == 8
    for sentence in (words.verdict_sentence(study, run) for run in study.runs if run.comparison):
        assert sentence in unescape(page)


def test_report_escapes_what_files_say(tmp_path):
    results = write_study(tmp_path, question="Is <script>alert(1)</script> & $title safe?")
    study = summary.summarize(rows.read(results))
    page = report.html(study)
    assert "<script>" not in page
    assert "Is &lt;script&gt;alert(1)&lt;/script&gt; &amp; $title safe?" in page
    assert "<script>" not in report.markdown(study)


def test_report_names_ledger_differences(tmp_path):
    results = write_study(tmp_path)
    assert "took effect as requested" in report.html(summary.summarize(rows.read(results)))
    write_run(results, "sgd", 2, agrees=False)
    page = report.html(summary.summarize(rows.read(results)))
    assert "dynamo counters: 0 graphs" in page
    assert "took effect as requested" not in page
