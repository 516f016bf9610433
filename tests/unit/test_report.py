"""The tables in Markdown and LaTeX, and the report: everything said, everything escaped, nothing from outside."""

import dataclasses
import re
from html import unescape

import pytest
from fake_results import awkward_study, write_run, write_study

from metrics import findings, rows, summary, words
from plots import report, tables


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return summary.summarize(rows.read(write_study(tmp_path_factory.mktemp("study"))))


@pytest.fixture(scope="module")
def page(study):
    """Its report, of which nothing is out of the ordinary."""
    return report.html(study)


def _text(page):
    """What a reader sees of a piece of HTML."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page)))


def _changed(study, run, **changes):
    """The study with another summary of one run, as if its rows had been different."""
    runs = tuple(dataclasses.replace(r, **changes) if r.run == run else r for r in study.runs)
    return dataclasses.replace(study, runs=runs)


def _section(page, title):
    """The part of a page from one heading to the next."""
    return re.search(rf"<h2[^>]*>{title}</h2>(.*?)(<h2|</main>)", page, re.DOTALL)[1]


def test_report_stands_alone(study, page):
    links = set(re.findall(r"https?://[^\"'<> )]+", page))
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\((?!#)", page)
    assert len(page.encode()) < 2_000_000
    # Quality, perplexity, three costs, the trade-off; two losses, lr, gradient norm, activations of one block.
    assert page.count("<svg") == page.count('role="img" aria-label="Chart: ') == 11
    assert words.headline(study) in _text(page)
    for sentence in (words.verdict_sentence(study, run) for run in study.runs if run.comparison):
        assert sentence in _text(page)


def test_report_of_thirty_runs_stays_under_two_megabytes(tmp_path):
    results = write_study(tmp_path, seeds=(1,), runs={f"run_{i}": {} for i in range(30)}, baseline="run_0")
    page = report.html(summary.summarize(rows.read(results)))
    assert page.count("<svg") == 11
    assert len(page.encode()) < 2_000_000


def test_every_table_has_a_caption_and_scopes(page):
    assert page.count("<table") == page.count("<caption>") > 3
    for table in re.findall(r"<table.*?</table>", page, re.DOTALL):
        head, *body = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        assert "<th>" not in table
        assert all(row.count('<th scope="row">') == 1 for row in body)
        assert len({row.count("<td>") + 1 for row in body} | {head.count('<th scope="col">')}) == 1


def test_report_escapes_what_files_say(tmp_path):
    study = summary.summarize(rows.read(awkward_study(tmp_path)))
    page = report.html(study)
    for raw in ("<b>bold", "post<norm>", "<i>", "<script"):
        assert raw not in page
    assert 'Is <b>bold</b> & "quoted" \N{ROCKET} text $safe?' in unescape(page)
    assert "post&lt;norm&gt; &amp; &quot;co&quot;" in page
    assert "<b>bold" not in tables.markdown(study)


def test_findings_link_to_the_rows_they_came_from(study, monkeypatch):
    found = (findings.Finding("sgd is <faster>", ("sgd", "adamw")),)
    monkeypatch.setattr(report, "findings", lambda _: found)
    page = report.html(study)
    section = _section(page, "Findings")
    assert "sgd is &lt;faster&gt;" in section
    links = re.findall(r'<a href="#([^"]+)">([^<]+)</a>', section)
    assert [name for _, name in links] == ["sgd", "adamw"]
    for target, name in links:
        assert f'<tr id="{target}"><th scope="row">{name}</th>' in page
    monkeypatch.setattr(report, "findings", lambda _: ())
    assert "Findings" not in report.html(study)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"not_comparable": ("trained on 5 tokens",)}, "not comparable"),
        ({"invalid": ("peak memory over the device's",)}, "invalid"),
    ],
)
def test_a_run_that_is_not_like_the_others_is_named_and_not_ranked(study, page, changes, state):
    assert "Every run is complete and comparable." in page
    assert 'class="aside"' not in page and "Grey rows" not in page
    sgd = {"comparison": None, "ratios": dict.fromkeys(study.runs[0].ratios), **changes}
    page = report.html(_changed(study, "sgd", **sgd))
    [[why]] = changes.values()
    assert f"sgd {state} {why}" in _text(_section(page, "What is comparable"))
    assert page.count('class="aside"') == 2 and "Grey rows are not ranked" in page
    assert "Not drawn, since not comparable: sgd." in page
    comparison = _section(page, "Comparison")
    assert ">adamw: 2.113 ± 0.021<" in comparison and ">sgd" not in comparison
    assert f"sgd: {state}: {why}" in tables.markdown(_changed(study, "sgd", **sgd))


def test_diverged_runs_counts_and_samples_are_shown(tmp_path):
    study = summary.summarize(rows.read(awkward_study(tmp_path)))
    page = report.html(_changed(study, "adamw", counts={"skipped steps": 1234, "loss spikes": 2}))
    fairness = _text(_section(page, "What is comparable"))
    assert "Compared at equal tokens." in fairness
    assert (
        fairness.count("sgd") == 1
        and "sgd diverged seeds 1, 2, 3: diverged: at step 7: loss 9 > 3" in fairness
    )
    assert "adamw 1,234 skipped steps, 2 loss spikes" in _text(_section(page, "Events"))
    samples = _section(page, "Samples")
    assert (
        "adamw, seed 1, after 301 steps" in samples and "sgd" not in samples
    )  # nothing of a run without a result


def test_samples_of_the_last_step_are_shown_cut_and_escaped(tmp_path, page):
    assert "Samples" not in page
    results = write_study(tmp_path)
    lines = [
        '{"step": 10, "prompt": "The", "text": " early"}',
        '{"step": 300, "prompt": "The <i>", "text": " cat\\u2028&"}',
        '{"step": 300, "prompt": "", "text": "' + "x" * 2000 + '"}',
    ]
    (results / "sgd-2" / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    section = _section(report.html(summary.summarize(rows.read(results))), "Samples")
    assert "<h3>sgd, seed 2, after 301 steps</h3>" in section
    assert "<b>The &lt;i&gt;</b> cat\u2028&amp;" in section
    assert "early" not in section
    assert "x" * 1500 in section and "x" * 1501 not in section and "500 more characters" in section


def test_report_names_ledger_differences_once_with_their_seeds(tmp_path, page):
    assert "took effect as requested" in page and "sgd *" not in page
    results = write_study(tmp_path)
    write_run(results, "sgd", 2, agrees=False)
    write_run(results, "sgd", 3, agrees=False)
    study = summary.summarize(rows.read(results))
    page = report.html(study)
    section = _text(_section(page, "Requested and in effect"))
    assert section.count("sgd 2, 3 compile true false dynamo counters: 0 graphs") == 1
    assert "took effect as requested" not in page
    assert page.count('<th scope="row">sgd *</th>') == 2 and "* Not as requested" in page
    assert "| sgd \\* |" in tables.markdown(study)


def test_configuration_says_what_each_run_sets(tmp_path):
    results = write_study(tmp_path)
    for seed in (1, 2, 3):
        (results / f"adamw-{seed}" / "config.toml").write_text(
            f'[run]\nseed = {seed}\n[optimizer]\noptimizer = "adamw"\n'
        )
    section = _text(_section(report.html(summary.summarize(rows.read(results))), "Configuration"))
    assert "adamw nothing –" in section
    differences = (
        "optimizer = sgd, lr = 0.1, momentum = 0.9 optimizer = adamw, lr = 0.001, momentum: its default"
    )
    assert f"sgd {differences}" in section
    assert "steps = 300" in section and "seeds = 1, 2, 3" in section and "dataset = stdlib" in section


def test_environment_says_each_fact_once_and_no_idle_digits(tmp_path):
    results = write_study(tmp_path)
    for run in ("adamw", "adamw-checkpointing", "sgd"):
        for seed in (1, 2, 3):
            torch = "2.11" if (run, seed) == ("sgd", 3) else "2.13"
            env = f'{{"torch": "{torch}", "device_memory_gib": 139.80072021484375, "git_commit": null}}'
            (results / f"{run}-{seed}" / "env.json").write_text(env)
    section = _text(_section(report.html(summary.summarize(rows.read(results))), "Environment"))
    assert "device memory gib 139.8 git commit not known" in section
    assert "2.11 (sgd-3)" in section


def test_latex_is_escaped_and_has_the_cells_of_the_terminal(tmp_path):
    study = summary.summarize(rows.read(awkward_study(tmp_path)))
    tex = tables.latex(study)
    row = (
        r"    post\textless{}norm\textgreater{} \& \"co\" & 3 & 2.113 $\pm$ 0.021 & 0 $\pm$ 0 & 1 & identical"
    )
    assert row.replace('\\"', '"') in tex
    assert r"text \$safe?" in tex and r"a\_run\_whose" in tex
    for kind in ("table", "tabular"):
        assert tex.count(f"\\begin{{{kind}}}") == tex.count(f"\\end{{{kind}}}") == 2
    for line in re.findall(r"^ {4}(?!\\).*$", tex, re.MULTILINE):
        assert line.endswith(r" \\")
    assert tables.latex_text("a\\b_c^d~e") == r"a\textbackslash{}b\_c\textasciicircum{}d\textasciitilde{}e"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "not known"), (True, "yes"), (2.5e-4, "0.00025"), (1 / 3, "0.3333"), ([0, 3], "[0, 3]")],
)
def test_values_of_files_as_words(value, text):
    assert report._text(value) == text
