"""The report of one study: one HTML page that needs no network.

Every word from a file is escaped. Must not compute a result: numbers and sentences come from metrics/.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from metrics.findings import findings
from metrics.hypothesis import conclusion
from metrics.rows import RunSeed
from metrics.summary import Summary
from metrics.words import footnotes, headline, number
from plots.course_tables import course_tables
from plots.figures import Figure, comparisons, of_scaling, over_steps
from plots.measured_tables import measured_tables, memory_tables
from plots.outcome_tables import (
    Table,
    criteria_tables,
    epoch_caption,
    epoch_tables,
    optimizer_tables,
    outside_tables,
    scaling_tables,
    sparsity_tables,
)
from plots.tables import cost_table, hypothesis_lines, outcome, quality_table, verdicts

TEMPLATE = Path(__file__).with_name("report.html")
LONGEST_SAMPLE = 1500  # characters of one text that are shown


def html(summary: Summary) -> str:
    """The whole report as one HTML page, without a link to anything outside it."""
    study = summary.results.study
    quality = f"Results: mean ± 95 % interval over seeds, difference to {study.baseline}"
    cost = f"Cost: mean ± 95 % interval over seeds, ratio to {study.baseline} with its 95 % interval"
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"Study {study.name}"),
        question=escape(study.question),
        outcome=_outcome(summary),
        experiment="".join(f'<p class="experiment">{escape(line)}</p>' for line in hypothesis_lines(summary)),
        headline=escape(conclusion(summary) or headline(summary)),
        verdicts=_list([escape(text) for text in verdicts(summary)]),
        findings=_findings(summary),
        quality=_table(quality_table(summary, full=True), quality, anchors=True, aside=_aside(summary)),
        cost=_table(cost_table(summary, full=True), cost, aside=_aside(summary)),
        criteria=_captioned("Criteria", criteria_tables(summary))
        + _captioned("To beat", outside_tables(summary)),
        optimizers=_captioned("Optimizers", optimizer_tables(summary)),
        scaling=_scaling(summary),
        memory=_captioned("Memory", memory_tables(summary)),
        measured=_captioned("Inference and machine", measured_tables(summary, wide=True)),
        notes=_list([escape(note) for note in footnotes(summary)]),
        marks=_marks(summary),
        bars=_figures(comparisons(summary)),
        curves=_figures(over_steps(summary)),
        course=_course(summary),
        sparsity=_sparsity(summary),
        fairness=_fairness(summary),
        ledger=_ledger(summary),
        configuration=_configuration(summary),
        counts=_counts(summary),
        samples=_samples(summary),
        environment=_environment(summary),
    )


def _list(items: Sequence[str]) -> str:
    """A list of pieces of HTML."""
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>" if items else ""


def _table(
    table: Table, caption: str, kind: str = "numbers", anchors: bool = False, aside: Sequence[int] = ()
) -> str:
    """A table that scrolls by itself where the page is narrow.

    `anchors` gives the n-th row the id run-n; rows of `aside` are grey: their numbers may not be compared.
    """
    heads, rows = table
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads)
    body = []
    for place, (first, *others) in enumerate(rows):
        name = f' id="run-{place}"' if anchors else ""
        grey = ' class="aside"' if place in aside else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        body.append(f'<tr{name}{grey}><th scope="row">{escape(first)}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _outcome(summary: Summary) -> str:
    """Whether the criteria are met, before anything else."""
    said = outcome(summary)
    return f'<p class="outcome"><strong>{escape(said)}</strong></p>' if said else ""


def _captioned(title: str, tables: Sequence[tuple[str, Table]]) -> str:
    """A section with its tables; nothing where there is none."""
    shown = "".join(_table(table, caption) for caption, table in tables)
    return f"<h2>{title}</h2>{shown}" if shown else ""


def _scaling(summary: Summary) -> str:
    """Table and charts of the declared pairs. What is lost to what is said among the findings."""
    section = _captioned("Scaling", scaling_tables(summary, wide=True))
    drawn = _figures(of_scaling(summary))
    return section + (f'<div class="curves">{drawn}</div>' if drawn else "")


def _course(summary: Summary) -> str:
    """What the study asks of the course; and each run's evaluations, folded away."""
    parts = []
    for run, table in epoch_tables(summary).items():
        shown = _table(table, epoch_caption(summary, run))
        parts.append(f"<details><summary>{escape(run)}</summary>{shown}</details>")
    asked = "".join(_table(table, caption) for caption, table in course_tables(summary))
    return f"<h2>Course of training</h2>{asked}{''.join(parts)}" if parts else ""


def _sparsity(summary: Summary) -> str:
    """What was pruned of each tensor, folded away, with the score that decided it."""
    parts = []
    for run, table in sparsity_tables(summary).items():
        how = next(one.metrics["pruning"] for one in summary.results.of(run) if "pruning" in one.metrics)
        caption = f"{run}: weights that are zero at the end, by {how['score']}, version {how['version']}: "
        caption += f"{how['formula']}; means over seeds"
        parts.append(f"<details><summary>{escape(run)}</summary>{_table(table, caption)}</details>")
    return f"<h2>Sparsity of tensors</h2>{''.join(parts)}" if parts else ""


def _figures(drawn: Sequence[Figure]) -> str:
    parts = []
    for one in drawn:
        caption = f"<figcaption>{escape(one.caption)}</figcaption>" if one.caption else ""
        parts.append(f"<figure>{one.svg}{caption}</figure>")
    return "".join(parts)


def _marks(summary: Summary) -> str:
    """What a grey row and a star mean, where the tables have one."""
    words = []
    if _aside(summary):
        words.append('Grey rows are not ranked: see <a href="#fairness">what is comparable</a>.')
    if any(run.ledger for run in summary.runs):
        words.append('* Not as requested: see <a href="#ledger">requested and in effect</a>.')
    return " ".join(words)


def _aside(summary: Summary) -> list[int]:
    return [place for place, run in enumerate(summary.runs) if run not in summary.comparable]


def _findings(summary: Summary) -> str:
    """Each finding with links to the rows that it was made from."""
    place = {run.run: place for place, run in enumerate(summary.runs)}
    items = []
    for one in findings(summary):
        links = ", ".join(f'<a href="#run-{place[run]}">{escape(run)}</a>' for run in one.runs)
        items.append(f'{escape(one.text)} <span class="small">({links})</span>')
    return f"<h2>Findings</h2>{_list(items)}" if items else ""


def _fairness(summary: Summary) -> str:
    """What is equal for every run, and the runs that are not like the others."""
    study = summary.results.study
    parts = [f"<p>Compared at {escape(summary.axis)}.</p>"]
    if study.frozen:
        parts.append(f"<p>Settings that no run may change: {escape(', '.join(study.frozen))}.</p>")
    rows: list[list[str]] = []
    notes: dict[str, list[str]] = {}
    for run in summary.runs:
        if run.state != "complete":
            rows.append([run.run, run.state, "; ".join(run.notes)])
            continue
        reasons = {
            "invalid": run.invalid,
            "not comparable": run.not_comparable,
            "own budget": run.own_budget,
            "costs not comparable": run.costs_not_comparable,
        }
        rows += [[run.run, what, why] for what, reason in reasons.items() for why in reason]
        for note in run.notes:
            notes.setdefault(note, []).append(run.run)
    if rows:
        parts.append(
            _table((["run", "what it is", "why"], rows), "Runs that are not ranked, and why", "words")
        )
    elif all(len(run.complete_seeds) == len(study.seeds) for run in summary.runs):
        parts.append("<p>Every run is complete and comparable.</p>")
    return "".join(parts) + _list([escape(f"{', '.join(runs)}: {note}") for note, runs in notes.items()])


def _ledger(summary: Summary) -> str:
    """What did not take effect as requested, each once with the seeds that had it."""
    found: dict[tuple[str, ...], list[str]] = {}
    for run in summary.complete:
        for one in summary.results.of(run.run):
            for entry in one.ledger:
                if not entry["agrees"]:
                    keys = ("what", "requested", "in_effect", "how")
                    found.setdefault((run.run, *(_text(entry[key]) for key in keys)), []).append(
                        str(one.seed)
                    )
    if not found:
        return "<p>Everything that the ledgers checked took effect as requested.</p>"
    rows = [[run, ", ".join(seeds), *others] for (run, *others), seeds in found.items()]
    heads = ["run", "seeds", "what", "requested", "in effect", "how it was established"]
    return _table((heads, rows), "Requested, and not in effect", "words")


def _configuration(summary: Summary) -> str:
    """What each run sets, beside the baseline's value, and then what all of them share."""
    study = summary.results.study
    base = next((one.config for one in summary.results.of(study.baseline) if one.config), {})
    usual = base | study.base | study.runs[study.baseline]
    rows = []
    for run, settings in study.runs.items():
        sets = [f"{name} = {_text(value)}" for name, value in settings.items()]
        against = [
            f"{name} = {_text(usual[name])}" if name in usual else f"{name}: its default"
            for name in settings
            if run != study.baseline
        ]
        rows.append([run, ", ".join(sets) or "nothing", ", ".join(against) or "–"])
    heads = ["run", "sets", f"where {study.baseline} has"]
    changes = _table((heads, rows), "What each run sets", "words")
    shared = [f"{name} = {_text(value)}" for name, value in study.base.items()]
    shared += [] if "dataset" in study.base else [f"dataset = {study.dataset}"]
    shared.append(f"seeds = {', '.join(map(str, study.seeds))}")
    items = "".join(f"<li>{escape(setting)}</li>" for setting in shared)
    words = "The study sets, for every run that does not set its own:"
    return f'{changes}<p>{words}</p><ul class="settings">{items}</ul>'


def _counts(summary: Summary) -> str:
    """What happened during training that should not go unsaid: skipped steps, spikes, resumes."""
    rows = [
        [run.run, ", ".join(f"{count:,} {what}" for what, count in run.counts.items())]
        for run in summary.runs
        if run.counts
    ]
    if not rows:
        return "<p>No run recorded an event such as a skipped step, a spike or a resume.</p>"
    return _table((["run", "over its seeds"], rows), "Events during training", "words")


def _samples(summary: Summary) -> str:
    """The last texts of the first seed that has any, of every run."""
    parts = []
    for run in summary.complete:
        one = next((one for one in summary.results.of(run.run) if one.samples), None)
        if one is not None:
            last = max(sample["step"] for sample in one.samples)
            where = f"{run.run}, seed {one.seed}, after {last + 1:,} steps"  # rows count from 0
            texts = "".join(_sample(sample) for sample in one.samples if sample["step"] == last)
            parts.append(f"<h3>{escape(where)}</h3>{texts}")
    return f"<h2>Samples</h2>{''.join(parts)}" if parts else ""


def _sample(sample: dict[str, Any]) -> str:
    text, more = sample["text"][:LONGEST_SAMPLE], len(sample["text"]) - LONGEST_SAMPLE
    rest = f' <i class="small">… and {more:,} more characters</i>' if more > 0 else ""
    return f"<blockquote><b>{escape(sample['prompt'])}</b>{escape(text)}{rest}</blockquote>"


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
        rows.append([key.replace("_", " "), "; ".join(words)])
    return _table((["", "value"], rows), _where(done), "words")


def _where(done: Sequence[RunSeed]) -> str:
    return f"What the {len(done)} finished trainings ran on"


def _text(value: Any) -> str:
    """A value of a file as a person would write it: no digits that say nothing."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        short = f"{value:.6g}"
        return short if float(short) == value else number(value)
    return str(value)
