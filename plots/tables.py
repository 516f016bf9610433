"""The tables of one study as words, and as Markdown and LaTeX: the terminal and the page show the same cells.

Must not compute a result: numbers and sentences come from metrics/.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from metrics.criteria import criteria, verdict
from metrics.findings import findings
from metrics.hypothesis import conclusion
from metrics.measures import AXES, METRICS, amount, shown_costs
from metrics.summary import RunSummary, Summary
from metrics.words import (
    binomial,
    cost_sentence,
    difference,
    footnotes,
    headline,
    number,
    p_value,
    verdict_sentence,
    with_interval,
)
from plots.course_tables import course_tables
from plots.measured_tables import measured_tables, memory_tables
from plots.outcome_tables import (
    Captioned,
    Table,
    batch_tables,
    criteria_tables,
    optimizer_tables,
    outside_tables,
    ranking_tables,
    ratio_text,
    scaling_tables,
)

Column = tuple[str, Callable[[RunSummary], str]]  # head, a run's cell

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
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "×": r"$\times$",
    "\n": " ",
}


def marked(run: RunSummary) -> str:
    """The run's name, with a star where something requested did not take effect."""
    return f"{run.run} *" if run.ledger else run.run


def _seeds(summary: Summary, run: RunSummary) -> str:
    asked = len(summary.results.study.seeds)
    done = len(run.complete_seeds)
    return str(done) if done == asked else f"{done} of {asked}"


def quality_table(summary: Summary, full: bool = False) -> Table:
    """Run, seeds, the study's metric, difference, p, verdict and what else was measured of the model, as words.

    `full` adds validation and training loss and every interval, which a terminal has no room for. A metric that
    no run has gets no column; an accuracy has its binomial interval beside the one over seeds.
    """
    study = summary.results.study
    others = ["test_perplexity", "test_bits_per_byte"]
    if summary.labelled:
        others = ["test_accuracy", "test_loss", "test_reply_perplexity"]
    if full:
        others += [
            "sparsity",
            "best_val_loss_at_target",
            "test_loss",
            "test_accuracy",
            "test_lm_loss",
            "test_mc_loss",
            "val_loss",
            "best_val_loss",
            "val_accuracy",
            "best_val_accuracy",
        ]
        others.append("train_loss")
    others = [
        name
        for name in dict.fromkeys(others)
        if name != study.metric and any(r.estimates[name] for r in summary.runs)
    ]
    columns: list[Column] = [
        ("run", marked),
        ("seeds", lambda run: _seeds(summary, run)),
        *_metric_columns(summary, study.metric, True),
        (
            "difference",
            lambda run: difference(run.comparison.estimate, summary.metric) if _compared(run) else "–",
        ),
        ("p", lambda run: p_value(run.comparison.p_holm if _compared(run) else None)),
        ("verdict", lambda run: run.status),
    ]
    for name in others:
        columns += _metric_columns(summary, name, full)
    return [head for head, _ in columns], [[cell(run) for _, cell in columns] for run in summary.runs]


def _compared(run: RunSummary) -> bool:
    return bool(run.comparison and run.complete_seeds)


def _metric_columns(summary: Summary, name: str, interval: bool) -> list[Column]:
    """The metric, and the binomial interval of one that has it."""
    metric = METRICS[name]
    head = metric.axis if metric.unit == "%" else metric.label
    columns: list[Column] = [(head, lambda run: cell(run, name, interval))]
    if any(name in run.proportions for run in summary.runs):
        columns.append(("binomial interval (%)", lambda run: binomial(run, name)))
    return columns


def cost_table(summary: Summary, full: bool = False) -> Table:
    """Run, then speed, step time and memory, with their ratios to the baseline where there is room.

    A cost that no run has gets no column.
    """
    costs = [
        name
        for name in shown_costs(summary.labelled)
        if any(run.estimates[name] for run in summary.runs) and (full or name != "train_seconds")
    ]
    with_ratio = costs if full else ("step_milliseconds", "activation_mib")
    heads = ["run"]
    for name in costs:
        heads += [METRICS[name].axis, "ratio"] if name in with_ratio else [METRICS[name].axis]
    rows = []
    for run in summary.runs:
        cells = [marked(run)]
        for name in costs:
            cells.append(cell(run, name, interval=full))
            if name in with_ratio:
                cells.append(ratio_text(run.ratios.get(name) if run.comparison else None))
        rows.append(cells)
    return heads, rows


def cell(run: RunSummary, name: str, interval: bool = True) -> str:
    """The mean over the run's seeds of one of METRICS, in the unit that is shown."""
    estimate = run.estimates[name]
    estimate = estimate and estimate.times(METRICS[name].factor)
    return with_interval(estimate) if interval else number(estimate.mean if estimate else None)


def outcome(summary: Summary) -> str:
    """Whether the study's criteria are met, in a sentence; nothing for a study without any."""
    found = criteria(summary)
    return verdict(found) if found else ""


def hypothesis_lines(summary: Summary) -> list[str]:
    """What the study expected, what would show it wrong, and its design; nothing of a study without a hypothesis."""
    study = summary.results.study
    if not study.hypothesis:
        return []
    design = [f"compared at {summary.axis}"]
    if study.budget:
        design.append(f"{study.budget:,} {AXES[study.axis].unit} a run")
    design.append(f"{amount(len(study.runs), 'run')} × {amount(len(study.seeds), 'seed')}")
    if study.frozen:
        design.append(f"frozen: {', '.join(study.frozen)}")
    if study.chosen_from:
        seeds = ", ".join(map(str, study.chosen_from["seeds"]))
        several = "s" if len(study.chosen_from["seeds"]) > 1 else ""
        chosen = f"by {study.chosen_from['study']} on seed{several} {seeds}, by {study.chosen_from['metric']}"
        design.append(f"runs chosen {chosen}" if seeds else "runs not chosen by rows yet: a first guess")
    return [
        f"Hypothesis: {study.hypothesis}",
        f"Falsified by: {study.falsified_by['says']}",
        f"Design: {'; '.join(design)}.",
    ]


def outcome_tables(summary: Summary, wide: bool = False) -> list[Captioned]:
    """Those that the study has of criteria, a figure to beat, choices, batches, optimizers, scaling, memory, latency,
    machine and course.

    wide: where there is room for every figure.
    """
    return [
        *criteria_tables(summary),
        *outside_tables(summary),
        *ranking_tables(summary),
        *batch_tables(summary),
        *optimizer_tables(summary),
        *scaling_tables(summary, wide),
        *(memory_tables(summary) if wide else []),
        *measured_tables(summary, wide),
        *course_tables(summary),
    ]


def verdicts(summary: Summary) -> list[str]:
    """What the study says of each run against the baseline, and of its costs."""
    others = [run for run in summary.runs if run.run != summary.results.study.baseline]
    sentences = [say(summary, run) for run in others for say in (verdict_sentence, cost_sentence)]
    return [sentence for sentence in sentences if sentence]


def markdown(summary: Summary) -> str:
    """The verdicts, the findings, the tables and the footnotes as Markdown."""
    study = summary.results.study
    found = [f"{one.text} ({', '.join(one.runs)})" for one in findings(summary)]
    more = outcome_tables(summary, wide=True)
    parts = [
        f"# {_markdown_text(study.name)}",
        _markdown_text(study.question),
        *map(_markdown_text, hypothesis_lines(summary)),
        _markdown_bold(outcome(summary)),
        _markdown_bold(conclusion(summary) or headline(summary)),
        _markdown_list([*verdicts(summary), *found]),
        _markdown_table(quality_table(summary, full=True)),
        _markdown_table(cost_table(summary, full=True)),
        *(f"{_markdown_text(caption)}:\n\n{_markdown_table(table)}" for caption, table in more),
        _markdown_list(footnotes(summary)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_bold(text: str) -> str:
    return text and f"**{_markdown_text(text)}**"


def _markdown_text(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("*", "\\*").replace("\n", " ")


def _markdown_list(texts: list[str]) -> str:
    return "\n".join(f"- {_markdown_text(text)}" for text in texts)


def _markdown_table(table: Table) -> str:
    heads, rows = table
    lines = [heads, [":--"] + ["--:"] * (len(heads) - 1), *([_markdown_text(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(summary: Summary) -> str:
    """All tables for a LaTeX document with `booktabs`, each with its caption."""
    study = summary.results.study
    quality = f"{study.question} Mean ± 95 % interval over seeds; difference to {study.baseline}."
    cost = f"Cost: mean over seeds, and ratio to {study.baseline} with its 95 % interval."
    parts = ["% Needs \\usepackage{booktabs}."]
    captioned = [(quality, quality_table(summary)), (cost, cost_table(summary))]
    captioned += [(f"{caption}.", table) for caption, table in outcome_tables(summary)]
    for caption, (heads, rows) in captioned:
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
