"""The report as Chromium draws it without a network: on a phone, on a desk, on paper; and DVC's plots page."""

import re

import pytest
from fake_results import awkward_study
from test_plots import dvc_page

from metrics import rows, summary
from plots import browser, picture, report

needs_chromium = pytest.mark.skipif(browser.find() is None, reason="no Chromium here")

# What a reader would see, and whether any of it is missing or does not fit. CSS pixels.
LOOK = """(() => {
  const boxes = [...page.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect());
  const main = [...page.querySelectorAll("h1, h2, h3, p, li, figure, blockquote, caption")];
  const sizes = [...page.querySelectorAll("svg text")].map((text) =>
    parseFloat(view.getComputedStyle(text).fontSize) * text.getScreenCTM().a);
  return {
    text: page.body.innerText + [...page.querySelectorAll("svg text")].map((t) => t.textContent).join(" "),
    width: page.documentElement.scrollWidth,
    svgs: boxes.map((box) => [box.left, box.right, box.height]),
    outside: main.filter((one) => one.getBoundingClientRect().right > view.innerWidth + 1).map((o) => o.outerHTML),
    smallest: Math.min(...sizes.filter((size) => size > 0)),
    loaded: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    background: view.getComputedStyle(page.body).backgroundColor,
  };
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    results = awkward_study(tmp_path_factory.mktemp("browser"))
    return report.html(summary.summarize(rows.read(results)))


@needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
def test_the_report_is_whole_and_fits(page, width):
    seen = browser.ask(page, LOOK, width)
    assert seen["width"] <= width  # tables scroll inside; the page does not
    assert seen["outside"] == []
    assert len(seen["svgs"]) == page.count("<svg") == 11
    for left, right, height in seen["svgs"]:
        assert left >= 0 and right <= width and right - left > 250 and height > 60
    assert seen["smallest"] >= 9
    assert seen["loaded"] == []
    assert seen["background"] == "rgb(255, 255, 255)"
    text = seen["text"]
    assert 'Is <b>bold</b> & "quoted" \N{ROCKET} text $safe?' in text
    assert 'post<norm> & "co"' in text
    assert not re.search(r"\b(error|NaN|undefined|None|null|nan)\b|\d\.\d{9}", text)


@needs_chromium
def test_what_is_looked_for_can_be_found():
    """The measurements above see a page that is too wide, text too small, and something from outside."""
    bad = """<body><h1>undefined</h1><p style="width:900px">wide</p><img src="http://other.example/x.png">
    <svg width="100" height="50" viewBox="0 0 400 200"><text y="20" font-size="13px">small</text></svg>"""
    seen = browser.ask(bad, LOOK, 360)
    assert seen["width"] > 900 and len(seen["outside"]) == 1
    assert seen["smallest"] == pytest.approx(13 / 4)
    assert seen["loaded"] == ["http://other.example/x.png"]
    assert "undefined" in seen["text"]


@needs_chromium
def test_the_report_prints(page, tmp_path):
    browser.pdf(page, tmp_path / "report.pdf")
    printed = (tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 10
    # A4 in points, upright
    assert re.search(rb"/MediaBox\s*\[0 0 59[45][\d.]* 84[12][\d.]*\]", printed)


@needs_chromium
def test_the_page_of_dvc_draws_without_a_network(tmp_path_factory):
    page = dvc_page(tmp_path_factory.mktemp("dvc"))
    seen = browser.ask(page, LOOK, 700, milliseconds=500)
    drawn = [height for _, _, height in seen["svgs"] if height > 200]  # the others are its menus
    assert len(drawn) == page.count("vegaEmbed('#") == 5
    assert seen["loaded"] == []
    assert not re.search(r"error|NaN|undefined", seen["text"])


@needs_chromium
def test_a_picture_of_a_report(page, tmp_path, capsys):
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    drawn = tmp_path / "new" / "picture.png"
    assert picture.main([str(tmp_path / "report.html"), str(drawn)]) == 0
    head = drawn.read_bytes()[:24]
    assert head.startswith(b"\x89PNG") and int.from_bytes(head[16:20], "big") == 1200
    bottoms, tops = (
        browser.ask(
            page, f"[...page.querySelectorAll('{where}')].map((one) => one.getBoundingClientRect().{edge})"
        )
        for where, edge in (("figure", "bottom"), ("figure", "top"))
    )
    # Six charts compare, and then come those over steps.
    assert 800 < max(bottoms[:6]) <= int.from_bytes(head[20:24], "big") <= min(tops[6:])
    assert capsys.readouterr().out.strip() == str(drawn)


def test_a_picture_without_chromium_says_what_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "report.html").write_text("<p>hello", encoding="utf-8")
    monkeypatch.setattr(browser, "find", lambda: None)
    assert picture.main([str(tmp_path / "report.html"), str(tmp_path / "p.png")]) == 2
    assert "picture: no Chromium found; install one of chromium," in capsys.readouterr().err
    assert not (tmp_path / "p.png").exists()


def test_a_picture_of_nothing_says_so(tmp_path, capsys):
    assert picture.main([str(tmp_path / "report.html"), "p.png"]) == 2
    assert "report.html is missing: run `dvc repro` first" in capsys.readouterr().err
    assert picture.main([]) == 2
    assert "usage: python -m plots.picture" in capsys.readouterr().err
