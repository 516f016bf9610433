"""Summarize one study: `python -m stages.summarize results/<study> reports/<study>`.

Reads the results, writes the tables, DVC's metrics and plot data and the report, and prints the comparison.
No arithmetic here: that is in metrics/, the drawing in plots/. Exit 2 when there is nothing to summarize.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from textwrap import wrap

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from metrics import (
    batches,
    course_frames,
    criteria,
    epochs,
    findings,
    frames,
    grid_results,
    hypothesis,
    pruning,
    ranking,
    rows,
    scaling,
    summary,
    trade_offs,
    words,
)
from plots import outcome_tables, report, tables

EDGES, BETWEEN = 2, 3  # characters beside a table and between two of its columns
SHORT = 20  # characters of a cell that stays in one line
WORD = re.compile(r"[^\W\d_]{4}")
WIDTH = 110  # characters that the tables need: of what is piped, and of a terminal that is narrower


def write_dvc_files(reports: Path, study: summary.Summary) -> None:
    """metrics/<run>.json and the CSV files of charts: what `dvc metrics` and `dvc plots` read."""
    metrics = reports / "metrics"
    metrics.mkdir(parents=True, exist_ok=True)
    for stale in metrics.glob("*.json"):  # of runs that the study no longer has
        stale.unlink()
    for run in study.runs:
        text = json.dumps(
            frames.dvc_metrics(run, study.results.study.metric, study.labelled),
            indent=2,
            ensure_ascii=False,
            allow_nan=False,
        )
        (metrics / f"{run.run}.json").write_text(text + "\n", encoding="utf-8")
    results = study.results
    frames.curves(results, results.steps, ("train_loss", "lr", "grad_norm")).write_csv(reports / "curves.csv")
    frames.curves(results, results.evals, ("val_loss",)).write_csv(reports / "validation.csv")
    trade_offs.trade_offs(study).write_csv(reports / "trade_off.csv")
    frames.dvc_bars(study).write_csv(reports / "bars.csv")


def write_tables(reports: Path, study: summary.Summary) -> Path:
    """table.csv, table.md, table.tex and report.html; returns the report's path.

    Also epochs.csv and, of a study that has any, scaling.csv, choices.csv, batches.csv, criteria.csv, grid.csv,
    sparsity.csv, course.csv, equal_seconds.csv and targets.csv.
    """
    frames.table_frame(study).write_csv(reports / "table.csv")
    epochs.csv_frame(study.results).write_csv(reports / "epochs.csv")
    declared = {
        "scaling.csv": scaling.scaling_frame(study),
        "choices.csv": ranking.ranking(study),
        "batches.csv": batches.batches(study),
        "criteria.csv": criteria.criteria_frame(study),
        "grid.csv": grid_results.grid_frame(study),
        "sparsity.csv": pruning.layers(study.results),
    }
    declared |= course_frames.frames(study)
    for name, frame in declared.items():
        (reports / name).unlink(missing_ok=True)  # of what the study declared before
        if not frame.is_empty():
            frame.write_csv(reports / name)
    (reports / "table.md").write_text(tables.markdown(study), encoding="utf-8")
    (reports / "table.tex").write_text(tables.latex(study), encoding="utf-8")
    page = reports / "report.html"
    page.write_text(report.html(study), encoding="utf-8")
    return page


def terminal() -> Console:
    """What the tables are printed on, never narrower than they need: a terminal folds lines, a table cuts numbers."""
    # Run names and questions are plain text: no markup, no emoji.
    plain = {"markup": False, "emoji": False, "highlight": False}
    width = Console().width if sys.stdout.isatty() else WIDTH
    return Console(width=max(width, WIDTH), **plain)


def show(console: Console, study: summary.Summary, *, costs: bool = True, details: bool = True) -> None:
    """The comparison in the terminal: question, criteria, verdict, results, cost, findings, footnotes.

    Without `costs` no table that counts seconds, of those after the results that of criteria alone. Without `details`
    no findings; they count seconds too, so nobody may ask for them without costs.
    """
    assert costs or not details
    plan = study.results.study
    parts = [plan.question, *tables.hypothesis_lines(study), tables.outcome(study)]
    parts.append(hypothesis.conclusion(study) or words.headline(study))
    said = "\n\n".join(part for part in parts if part)
    console.print(f"\nStudy {plan.name}: {said}\n")
    quality = f"Results: mean ± 95 % interval over seeds, difference to {plan.baseline}"
    show_table(console, quality, tables.quality_table(study))
    if costs:
        cost = f"Cost: ratio to {plan.baseline} with its 95 % interval"
        show_table(console, cost, tables.cost_table(study))
    more = tables.outcome_tables if costs else outcome_tables.criteria_tables
    for title, table in more(study):
        show_table(console, title, table)
    if details:
        show_findings(console, study)
    for note in words.footnotes(study):
        console.print(f"* {note}")


def show_findings(console: Console, study: summary.Summary) -> None:
    """A line a finding."""
    for found in findings.findings(study):
        console.print(f"- {found.text}")


def show_course(console: Console, study: summary.Summary) -> None:
    """The course of the baseline's training: every run's is in the report."""
    run = study.results.study.baseline
    if (table := outcome_tables.epoch_tables(study).get(run)) is not None:
        show_table(console, outcome_tables.epoch_caption(study, run), table)


def show_table(console: Console, title: str, content: outcome_tables.Table) -> None:
    """A table under its title, its heads in several lines; a wide one in parts that say which row is which."""
    for part, (heads, cells) in enumerate(_parts(content, console.width)):
        said = f"{title.partition(':')[0]} (continued)" if part else title
        table = Table(title=said, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for place, head in enumerate(heads):
            column = [line[place] for line in cells]
            if place == 0:  # whole: which row it is must be read in every part
                table.add_column(
                    _head(head), overflow="fold", width=_first_width(head, column, console.width)
                )
            else:
                table.add_column(_head(head), justify="right", no_wrap=not _folds(column))
        for line in cells:
            table.add_row(*line)
        console.print(table)


def _head(text: str) -> str:
    return "\n".join(wrap(text, 11, break_long_words=False))


def _folds(column: list[str]) -> bool:
    """Whether the cells may fold between words: a number may not, and a word or two need not."""
    return _longest(column) > SHORT and all(WORD.search(cell) for cell in column if cell != "–")


def _first_width(head: str, column: list[str], width: int) -> int:
    """As wide as its longest cell, but for names that would leave no room for anything else: those fold."""
    return min(_longest([*_head(head).split("\n"), *column]), width // 2)


def _longest(texts: list[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _parts(content: outcome_tables.Table, width: int) -> list[outcome_tables.Table]:
    """The table with as many columns as fit beside those that say which row it is, then those with the next …"""
    heads, cells = content
    keys, needs = _keys(cells), [_needs(content, place, width) for place in range(len(heads))]
    room = width - EDGES + BETWEEN - sum(needs[:keys])
    parts: list[list[int]] = [[]]
    for place in range(keys, len(heads)):
        part = parts[-1]
        if part and sum(needs[i] for i in (*part, place)) > room:
            # A ratio is of the column before it.
            parts.append([part.pop()] if heads[place] == "ratio" and len(part) > 1 else [])
        parts[-1].append(place)
    shown = [(*range(keys), *part) for part in parts]
    return [([heads[i] for i in part], [[line[i] for i in part] for line in cells]) for part in shown]


def _keys(cells: list[list[str]]) -> int:
    """How many of the first columns say which row it is."""
    length = min(map(len, cells), default=1)
    return next((n for n in range(1, length) if len({tuple(line[:n]) for line in cells}) == len(cells)), 1)


def _needs(content: outcome_tables.Table, place: int, width: int) -> int:
    """Characters that a column cannot do without."""
    head, column = content[0][place], [line[place] for line in content[1]]
    if place == 0:
        return BETWEEN + _first_width(head, column, width)
    longest = _longest([word for cell in column for word in cell.split()])
    cell = max(SHORT, longest) if _folds(column) else _longest(column)
    return BETWEEN + max(cell, _longest(_head(head).split("\n")))


def main(arguments: list[str]) -> int:
    """Run the stage; 0, or 2 with one message."""
    if len(arguments) != 2:  # noqa: PLR2004
        print("usage: python -m stages.summarize results/<study> reports/<study>", file=sys.stderr)
        return 2
    source, reports = Path(arguments[0]), Path(arguments[1])
    try:
        results = rows.read(source)
        study = summary.summarize(results)
    except rows.ResultsError as error:
        print(f"summarize: {error}", file=sys.stderr)
        return 2
    if not study.complete:
        states = "\n".join(f"  {one.run}-{one.seed}: {one.state}, {one.reason}" for one in results.runs)
        print(f"summarize: no run in {source} is complete:\n{states}", file=sys.stderr)
        return 2
    reports.mkdir(parents=True, exist_ok=True)
    write_dvc_files(reports, study)
    page = write_tables(reports, study)
    console = terminal()
    show(console, study)
    show_course(console, study)
    console.print(f"\nReport: {page}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
