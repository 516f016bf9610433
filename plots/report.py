"""The report of one study: its tables, and one HTML page that needs no network.

Every word from a file is escaped. Must not compute a result: numbers and sentences come from metrics.summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from metrics.frames import bars, curves
from metrics.statistics import Ratio
from metrics.summary import COSTS, METRICS, RunSummary, Summary
from metrics.words import cost_sentence, footnotes, number, p_value, verdict_sentence, with_interval
from plots import charts

TEMPLATE = Path(__file__).with_name("report.html")
TRADE_OFFS = ("tokens_per_second", "peak_memory_gib", "activation_mib")
Table = tuple[list[str], list[list[str]]]  # heads, rows of cells


def ratio_text(ratio: Ratio | None) -> str:
    """`0.78 (0.75–0.81)`: the mean and its interval."""
    if ratio is None:
        return "–"
    mean, low, high = (
        None if v is None else f"{v:.2f}" if v >= 0.1 else number(v, 2)  # noqa: PLR2004
        for v in (ratio.mean, ratio.low, ratio.high)
    )
    return str(mean) if low is None or low == high else f"{mean} ({low}–{high})"


def _seeds(summary: Summary, run: RunSummary) -> str:
    asked = len(summary.results.study.seeds)
    done = len(run.complete_seeds)
    return str(done) if done == asked else f"{done} of {asked}"


def quality_table(summary: Summary, full: bool = False) -> Table:
    """Run, seeds, the study's metric, difference, p, verdict, perplexity and bits per byte, as words.

    `full` adds validation and training loss and every interval, which a terminal has no room for.
    """
    study = summary.results.study
    others = ["test_perplexity", "test_bits_per_byte"]
    if full:
        others += ["test_loss", "val_loss", "best_val_loss", "train_loss"]
    others = [name for name in others if name != study.metric]
    heads = ["run", "seeds", summary.metric.label, "difference", "p", "verdict"]
    rows = []
    for run in summary.runs:
        comparison = run.comparison if run.complete_seeds else None
        difference = with_interval(comparison.estimate, signed=True) if comparison else "–"
        p = p_value(comparison.p_holm if comparison else None)
        measured = [_cell(run, name, interval=full) for name in others]
        seeds = _seeds(summary, run)
        rows.append([run.run, seeds, _cell(run, study.metric), difference, p, run.status, *measured])
    return heads + [METRICS[name].label for name in others], rows


def cost_table(summary: Summary, full: bool = False) -> Table:
    """Run, then speed, step time and memory, with their ratios to the baseline where there is room."""
    with_ratio = COSTS if full else ("step_milliseconds", "activation_mib")
    heads = ["run"]
    for name in COSTS:
        heads += [METRICS[name].axis, "ratio"] if name in with_ratio else [METRICS[name].axis]
    rows = []
    for run in summary.runs:
        cells = [run.run]
        for name in COSTS:
            cells.append(_cell(run, name, interval=full))
            if name in with_ratio:
                cells.append(ratio_text(run.ratios[name] if run.comparison else None))
        rows.append(cells)
    return heads, rows


def _cell(run: RunSummary, name: str, interval: bool = True) -> str:
    estimate = run.estimates[name]
    return with_interval(estimate) if interval else number(estimate.mean if estimate else None)


def markdown(summary: Summary) -> str:
    """The tables, the verdicts and the footnotes as Markdown."""
    study = summary.results.study
    verdicts = [f"- {_markdown_text(text)}" for text in _verdicts(summary)]
    parts = [
        f"# {_markdown_text(study.name)}",
        _markdown_text(study.question),
        "\n".join(verdicts),
        _markdown_table(quality_table(summary, full=True)),
        _markdown_table(cost_table(summary, full=True)),
        "\n".join(f"- {_markdown_text(note)}" for note in footnotes(summary)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_text(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _markdown_table(table: Table) -> str:
    heads, rows = table
    lines = [heads, [":--"] + ["--:"] * (len(heads) - 1), *([_markdown_text(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _verdicts(summary: Summary) -> list[str]:
    sentences = []
    for run in summary.runs:
        if run.comparison is not None:
            sentences += [verdict_sentence(summary, run), cost_sentence(summary, run)]
    baseline = summary.results.study.baseline
    return [s for s in sentences if s] or [
        f"{baseline} is the only run: there is nothing to compare it with."
    ]


def html(summary: Summary) -> str:
    """The whole report as one HTML page, without a link to anything outside it."""
    study = summary.results.study
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"Study {study.name}"),
        question=escape(study.question),
        verdicts=_paragraphs(_verdicts(summary)),
        quality=_table(quality_table(summary, full=True)),
        cost=_table(cost_table(summary, full=True)),
        baseline=escape(study.baseline),
        notes=_list(footnotes(summary)),
        charts=_charts(summary),
        ledger=_ledger(summary),
        configuration=_configuration(summary),
        environment=_environment(summary),
    )


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _list(texts: Sequence[str]) -> str:
    return f'<ul class="small">{"".join(f"<li>{escape(text)}</li>" for text in texts)}</ul>' if texts else ""


def _table(table: Table, kind: str = "numbers") -> str:
    heads, rows = table
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _charts(summary: Summary) -> str:
    """Every chart that has something to show, each an inline SVG."""
    results, runs, metric = summary.results, list(summary.results.study.runs), summary.metric
    nats = "loss (nats/token)"
    training = curves(results, results.steps, ("train_loss", "lr", "grad_norm"))
    validation = curves(results, results.evals, ("val_loss",))
    measured, title = bars(summary, (results.study.metric,)), f"{metric.label.capitalize()}, 95 % interval"
    drawn = [charts.intervals(measured, title, metric.axis, runs)]
    for name in TRADE_OFFS:
        frame = bars(summary, (name,))
        if not frame.is_empty():
            title = f"{METRICS[name].label.capitalize()}, 95 % interval"
            drawn.append(charts.costs(frame, title, METRICS[name].axis, runs))
    drawn += [
        charts.curve(training, "train_loss", "Training loss", f"training {nats}", runs),
        charts.curve(validation, "val_loss", "Validation loss", f"validation {nats}", runs, points=True),
        charts.curve(training, "lr", "Learning rate", "learning rate", runs),
        charts.curve(training, "grad_norm", "Gradient norm", "global gradient norm", runs, log=True),
    ]
    return "".join(f"<figure>{charts.svg(chart, f'c{i}')}</figure>" for i, chart in enumerate(drawn))


def _ledger(summary: Summary) -> str:
    rows = []
    for run in summary.complete:
        for one in summary.results.of(run.run):
            differing = [entry for entry in one.ledger if not entry["agrees"]]
            keys = ("what", "requested", "in_effect", "how")
            rows += [[run.run, str(one.seed), *(_text(entry[key]) for key in keys)] for entry in differing]
    if not rows:
        return "<p>Everything that the ledgers checked took effect as requested.</p>"
    heads = ["run", "seed", "what", "requested", "in effect", "how it was established"]
    table = _table((heads, rows), "words")
    return f'<div class="scroll">{table}</div>'


def _configuration(summary: Summary) -> str:
    """The study's own base settings, and what each run changes."""
    study = summary.results.study
    changed = sorted({key for settings in study.runs.values() for key in settings})
    names = [*study.base, *(key for key in changed if key not in study.base)]
    rows = [
        [
            name,
            _text(study.base[name]) if name in study.base else "default",
            *(_text(settings[name]) if name in settings else "" for settings in study.runs.values()),
        ]
        for name in names
    ]
    rows.append(["seeds", ", ".join(map(str, study.seeds)), *("" for _ in study.runs)])
    rows.append(["dataset", study.dataset, *("" for _ in study.runs)])
    return _table((["setting", "study", *study.runs], rows), "words")


def _environment(summary: Summary) -> str:
    """Each fact once; where runs differ, every value with the runs and seeds that had it."""
    facts: dict[str, dict[str, list[str]]] = {}
    done = [one for one in summary.results.runs if one.state == "complete"]
    for one in done:
        for key, value in one.env.items():
            facts.setdefault(key, {}).setdefault(_text(value), []).append(f"{one.run}-{one.seed}")
    rows = []
    for key, values in facts.items():
        alike = len(values) == 1 and len(next(iter(values.values()))) == len(done)
        words = [value if alike else f"{value} ({', '.join(who)})" for value, who in values.items()]
        rows.append([key, "; ".join(words)])
    return _table((["", "value"], rows), "words")


def _text(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
