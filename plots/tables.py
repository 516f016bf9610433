"""The tables of one study as words, and as Markdown and LaTeX: the terminal and the page show the same cells.

Must not compute a result: numbers and sentences come from metrics/.
"""

from __future__ import annotations

from html import escape

from metrics.findings import findings
from metrics.measures import COSTS, METRICS
from metrics.statistics import Ratio
from metrics.summary import RunSummary, Summary
from metrics.words import (
    cost_sentence,
    footnotes,
    headline,
    number,
    p_value,
    verdict_sentence,
    with_interval,
)

Table = tuple[list[str], list[list[str]]]  # heads, rows of cells

LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "∞": r"$\infty$",
    "\n": " ",
}


def marked(run: RunSummary) -> str:
    """The run's name, with a star where something requested did not take effect."""
    return f"{run.run} *" if run.ledger else run.run


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

    `full` adds validation and training loss and every interval, which a terminal has no room for. A metric that
    no run has gets no column.
    """
    study = summary.results.study
    others = ["test_perplexity", "test_bits_per_byte"]
    if full:
        others += ["test_loss", "test_accuracy", "val_loss", "best_val_loss", "train_loss"]
    others = [
        name for name in others if name != study.metric and any(r.estimates[name] for r in summary.runs)
    ]
    heads = ["run", "seeds", summary.metric.label, "difference", "p", "verdict"]
    heads += [METRICS[name].label for name in others]
    rows = []
    for run in summary.runs:
        comparison = run.comparison if run.complete_seeds else None
        difference = with_interval(comparison.estimate, signed=True) if comparison else "–"
        p = p_value(comparison.p_holm if comparison else None)
        cells = [marked(run), _seeds(summary, run), _cell(run, study.metric), difference, p, run.status]
        cells += [_cell(run, name, interval=full) for name in others]
        rows.append(cells)
    return heads, rows


def cost_table(summary: Summary, full: bool = False) -> Table:
    """Run, then speed, step time and memory, with their ratios to the baseline where there is room."""
    with_ratio = COSTS if full else ("step_milliseconds", "activation_mib")
    heads = ["run"]
    for name in COSTS:
        heads += [METRICS[name].axis, "ratio"] if name in with_ratio else [METRICS[name].axis]
    rows = []
    for run in summary.runs:
        cells = [marked(run)]
        for name in COSTS:
            cells.append(_cell(run, name, interval=full))
            if name in with_ratio:
                cells.append(ratio_text(run.ratios.get(name) if run.comparison else None))
        rows.append(cells)
    return heads, rows


def _cell(run: RunSummary, name: str, interval: bool = True) -> str:
    estimate = run.estimates[name]
    return with_interval(estimate) if interval else number(estimate.mean if estimate else None)


def verdicts(summary: Summary) -> list[str]:
    """What the study says of each run against the baseline, and of its costs."""
    others = [run for run in summary.runs if run.run != summary.results.study.baseline]
    sentences = [say(summary, run) for run in others for say in (verdict_sentence, cost_sentence)]
    return [sentence for sentence in sentences if sentence]


def markdown(summary: Summary) -> str:
    """The verdicts, the findings, the tables and the footnotes as Markdown."""
    study = summary.results.study
    found = [f"{one.text} ({', '.join(one.runs)})" for one in findings(summary)]
    parts = [
        f"# {_markdown_text(study.name)}",
        _markdown_text(study.question),
        f"**{_markdown_text(headline(summary))}**",
        _markdown_list([*verdicts(summary), *found]),
        _markdown_table(quality_table(summary, full=True)),
        _markdown_table(cost_table(summary, full=True)),
        _markdown_list(footnotes(summary)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_text(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("*", "\\*").replace("\n", " ")


def _markdown_list(texts: list[str]) -> str:
    return "\n".join(f"- {_markdown_text(text)}" for text in texts)


def _markdown_table(table: Table) -> str:
    heads, rows = table
    lines = [heads, [":--"] + ["--:"] * (len(heads) - 1), *([_markdown_text(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(summary: Summary) -> str:
    """Both tables for a LaTeX document with `booktabs`, each with its caption."""
    study = summary.results.study
    quality = f"{study.question} Mean ± 95 % interval over seeds; difference to {study.baseline}."
    cost = f"Cost: mean over seeds, and ratio to {study.baseline} with its 95 % interval."
    parts = ["% Needs \\usepackage{booktabs}."]
    for caption, (heads, rows) in ((quality, quality_table(summary)), (cost, cost_table(summary))):
        lines = [r"\begin{table}", r"  \centering", f"  \\caption{{{latex_text(caption)}}}"]
        lines += [f"  \\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"    \toprule", _latex_row(heads)]
        lines += [r"    \midrule", *map(_latex_row, rows), r"    \bottomrule"]
        parts.append("\n".join([*lines, r"  \end{tabular}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def latex_text(text: str) -> str:
    """The text with what LaTeX would take for a command written so that it is printed."""
    return "".join(LATEX.get(character, character) for character in text)


def _latex_row(cells: list[str]) -> str:
    return "    " + " & ".join(map(latex_text, cells)) + r" \\"
