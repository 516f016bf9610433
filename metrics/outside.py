"""A figure from outside that a study sets out to beat, such as a published one, and how far its runs are from it.

A figure that the study declares not comparable is told, with why, and nothing is held against it. Must not read or
write files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from metrics.measures import METRICS, Metric
from metrics.statistics import Comparison, Estimate, compare
from metrics.summary import Summary, seed_values
from metrics.words import difference, with_interval

FIGURE = ""  # among the runs that are compared; no run has an empty name


@dataclass(frozen=True)
class Outside:
    """The declared figure and the comparable runs that measured it. Values as in the rows: shares from 0 to 1."""

    metric: Metric
    value: float
    says: str  # whose it is, and of what
    not_comparable: str  # why no run may be held against it; empty where they may
    estimates: dict[str, Estimate]  # run → mean over its seeds
    comparisons: dict[str, Comparison]  # run → against the figure; none where that is not comparable

    @property
    def figure(self) -> str:
        """`test perplexity 42.82`, `test accuracy 90.9 %`."""
        return f"{self.metric.label} {self.value * self.metric.factor:.10g} {self.metric.unit}".strip()

    @property
    def best(self) -> str:
        """The run with the best mean; empty where none has the figure."""
        means = {run: one.mean for run, one in self.estimates.items() if math.isfinite(one.mean)}
        return (min if self.metric.better == "lower" else max)(means, key=means.__getitem__, default="")


def outside(summary: Summary) -> Outside | None:
    """None for a study that declares no such figure."""
    declared = summary.results.study.to_beat
    if not declared:
        return None
    name, value, why = declared["measure"], declared["value"], declared.get("not_comparable", "")
    runs = [run for run in summary.comparable if run.estimates[name]]
    found = seed_values(summary.results, name)
    values = {run.run: found[run.run] for run in runs}
    # The same number for every seed: what is tested is whether the mean over seeds is that number.
    figure = {FIGURE: dict.fromkeys(summary.results.study.seeds, value)}
    compared = {} if why else compare(values | figure, FIGURE, METRICS[name].better)
    estimates = {run.run: run.estimates[name] for run in runs}
    return Outside(summary.measure(name), value, declared["says"], why, estimates, compared)


def sentence(found: Outside) -> str:
    """The figure, the best run, how far that is from it, or why it is not said."""
    said, best = f"Figure to beat: {found.figure} ({found.says})", found.best
    if not best:
        return f"{said}: no run here has one that is comparable."
    mean = with_interval(found.estimates[best].times(found.metric.factor))
    said += f". Best here: {best}, {mean}"
    if found.not_comparable:
        return f"{said}: not comparable: {found.not_comparable}."
    one = found.comparisons[best]
    delta = f"{difference(one.estimate, found.metric)} {found.metric.difference_unit}".strip()
    return f"{said}, which is {delta}; {one.verdict or one.reason}."
