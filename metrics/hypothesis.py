"""Whether a study's hypothesis was falsified: by the conditions that it named beforehand, decided from its rows.

One condition that came true falsifies; a condition whose figures are not there decides nothing. Must not read or
write files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from metrics.criteria import Criterion
from metrics.measures import DECIDED, Metric
from metrics.statistics import paired_ratio
from metrics.summary import Summary, seed_values
from metrics.words import difference, headline


@dataclass(frozen=True)
class Condition:
    """One condition: whether it came true (None: not decided), and why."""

    came_true: bool | None
    words: str


@dataclass(frozen=True)
class Outcome:
    """What became of a hypothesis: falsified, not falsified, undecided, or to be read off the tables."""

    state: str
    words: str
    conditions: tuple[Condition, ...] = ()


def outcome(summary: Summary) -> Outcome | None:
    """None for a study without a hypothesis."""
    study = summary.results.study
    if not study.hypothesis:
        return None
    if not study.falsified_by.get("when"):
        return Outcome(
            "open", "Whether the hypothesis is falsified is for the reader: no condition was named."
        )
    found = tuple(_condition(summary, one) for one in study.falsified_by["when"])
    true = [one.words for one in found if one.came_true]
    open_ = [one.words for one in found if one.came_true is None]
    if true:
        return Outcome("falsified", f"The hypothesis is falsified: {'; '.join(true)}.", found)
    if open_:
        return Outcome("undecided", f"The hypothesis is undecided: {'; '.join(open_)}.", found)
    false = "; ".join(one.words for one in found)
    return Outcome("not falsified", f"The hypothesis is not falsified: {false}.", found)


def conclusion(summary: Summary) -> str:
    """The outcome of the hypothesis and the verdicts, made from the rows; "" for a study without a hypothesis."""
    found = outcome(summary)
    return f"{found.words} {headline(summary)}" if found else ""


def _condition(summary: Summary, one: dict[str, Any]) -> Condition:
    return _verdict(summary, one) if "verdict" in one else _measure(summary, one)


def _verdict(summary: Summary, one: dict[str, Any]) -> Condition:
    """Of the run's verdict against the baseline, over all seeds; `inconclusive` decides only where it is named."""
    wanted = one["verdict"] if isinstance(one["verdict"], list) else [one["verdict"]]
    run, baseline = summary.of(one["run"]), summary.results.study.baseline
    estimate = run.comparison.estimate if run.comparison else None
    by = (
        f" by {difference(estimate, summary.metric)} {summary.metric.difference_unit}".rstrip()
        if estimate
        else ""
    )
    if run.status == "diverged" or run.status in ("better", "worse"):
        said = (
            f"{run.run} diverged"
            if run.status == "diverged"
            else f"{run.run} is {run.status} than {baseline}{by}"
        )
    else:
        said = f"{run.run} against {baseline}: {run.status}{by}"
    fewest = min(len(summary.of(name).complete_seeds) for name in (run.run, baseline))
    if run.comparison and run.status != "diverged" and 0 < fewest < len(summary.results.study.seeds):
        return Condition(None, f"{said}, with {fewest} of {len(summary.results.study.seeds)} seeds complete")
    if run.status in wanted:
        return Condition(True, said)
    decided = run.status in DECIDED and run.status != "inconclusive"
    return Condition(False if decided else None, said)


def _measure(summary: Summary, one: dict[str, Any]) -> Condition:
    """Of a measure's mean over all seeds, or of its ratio to another run's over paired seeds."""
    run, name, seeds = one["run"], one["measure"], len(summary.results.study.seeds)
    metric, label = summary.measure(name), summary.measure(name).label
    runs = [run, *([one["against"]] if "against" in one else [])]
    for each in runs:
        found = summary.of(each)
        if found.invalid or len(found.complete_seeds) < seeds:
            why = "is invalid" if found.invalid else f"{len(found.complete_seeds)} of {seeds} seeds complete"
            return Condition(None, f"{label} of {each} is not known: {why}")
    values = seed_values(summary.results, name)
    if "against" in one:
        ratio = paired_ratio(values[run], values[one["against"]])
        value, metric = (ratio.mean if ratio and ratio.count == seeds else None), _ratio(metric)
        said = f"{run}'s {label} against {one['against']}'s"
    else:
        estimate = summary.of(run).estimates[name]
        value = estimate.mean if estimate and estimate.count == seeds else None
        said = f"{run}'s {label}"
    judged = Criterion(run, name, metric, one.get("at_least"), one.get("at_most"), value, "")
    if value is None or math.isnan(value):
        return Condition(None, f"{said} was not measured")
    return Condition(judged.met, f"{said} is {judged.shown} (falsifying: {judged.bound})")


def _ratio(metric: Metric) -> Metric:
    return Metric(metric.label, "×", metric.value, better=metric.better)
