"""Whether a study's runs are what it set out to have: its criteria, each met or not, with value and bound.

A figure that was not measured, in any seed, meets nothing. Must not read or write files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from metrics.course import seconds_to, steady_seconds_of
from metrics.measures import SCALING_MEASURES, STEADY, TO_TARGET, Metric, measure
from metrics.scaling import scalings
from metrics.statistics import mean_interval, paired_ratio
from metrics.summary import Summary, seed_values
from metrics.words import number

SCHEMA = {
    "run": pl.String,
    "measure": pl.String,
    "value": pl.Float64,
    "at_least": pl.Float64,
    "at_most": pl.Float64,
    "met": pl.String,
    "why_not_measured": pl.String,
}
OF_SCALING = {
    "speedup": Metric("speedup", "×", lambda _: None, better="higher"),
    "efficiency": Metric("efficiency", "%", lambda _: None, better="higher", factor=100.0),
}


@dataclass(frozen=True)
class Criterion:
    """One criterion and what became of it. Value and bounds as in the rows: shares from 0 to 1."""

    run: str
    measure: str
    metric: Metric
    at_least: float | None
    at_most: float | None
    value: float | None  # mean over seeds
    why: str  # why there is no value

    @property
    def met(self) -> bool:
        """Whether the value is there and inside the bounds."""
        value = math.nan if self.value is None else self.value
        return (
            (-math.inf if self.at_least is None else self.at_least)
            <= value
            <= (math.inf if self.at_most is None else self.at_most)
        )

    @property
    def result(self) -> str:
        """`pass`, `fail` or `fail: not measured`."""
        return "pass" if self.met else "fail" if self.value is not None else "fail: not measured"

    @property
    def bound(self) -> str:
        """`≥ 1.8 ×`, `91 to 95 %`."""
        factor = self.metric.factor
        low, high = (None if b is None else f"{b * factor:.10g}" for b in (self.at_least, self.at_most))
        words = f"{low} to {high}" if low and high else f"≥ {low}" if low else f"≤ {high}"
        return f"{words} {self.metric.unit}".strip()

    @property
    def shown(self) -> str:
        """The value, with as many digits as it takes not to look like a bound that it misses or meets."""
        if self.value is None:
            return "–"
        factor, ends = self.metric.factor, [b for b in (self.at_least, self.at_most) if b is not None]
        digits = next(
            (d for d in range(4, 12) if all(_says(self.value * factor, b * factor, d) for b in ends)), 12
        )
        return f"{number(self.value * factor, digits)} {self.metric.unit}".strip()


def _says(value: float, bound: float, digits: int) -> bool:
    """Whether the value, written with so many digits, is on the side of the bound that it is on."""
    if not math.isfinite(value):
        return True
    written = float(number(value, digits).replace(",", ""))
    return (written < bound, written > bound) == (value < bound, value > bound)


def criteria(summary: Summary) -> tuple[Criterion, ...]:
    """The study's criteria, in its order."""
    return tuple(_criterion(summary, **declared) for declared in summary.results.study.criteria)


def _criterion(
    summary: Summary,
    run: str,
    measure: str,
    at_least: float | None = None,
    at_most: float | None = None,
    against: str = "",
    target: float = 0.0,
) -> Criterion:
    value, why = _value(summary, run, measure, against, target)
    what = metric(measure, summary.labelled, target)
    if against:
        what = replace(what, label=f"{what.label}, ratio to {against}", unit="×", factor=1.0)
    return Criterion(run, measure, what, at_least, at_most, value, why)


def metric(name: str, labelled: bool, target: float = 0.0) -> Metric:
    """What a criterion is about; target: of one on the time to a loss."""
    if name == TO_TARGET:
        return Metric(f"time to a validation loss of {target:g}", "s", lambda _: None)
    if name == STEADY:
        return Metric("training time, compiling not counted", "s", lambda _: None)
    return OF_SCALING[name] if name in SCALING_MEASURES else measure(name, labelled)


def _value(
    summary: Summary, run: str, measure: str, against: str = "", target: float = 0.0
) -> tuple[float | None, str]:
    """The mean over all seeds, or its ratio to another run's over paired seeds; or why there is none."""
    seeds = len(summary.results.study.seeds)
    for name in (run, *([against] if against else [])):
        if why := _unknown(summary, name):
            return None, why
    if measure in SCALING_MEASURES:
        one = next(one for one in scalings(summary) if one.run == run)
        ratio = one.speedup if measure == "speedup" else one.efficiency
        return (None, one.reason) if ratio is None else _of_all(ratio.mean, ratio.count, seeds)
    if measure == TO_TARGET:
        values = {name: seconds_to(summary, name, target) for name in (run, against) if name}
    elif measure == STEADY:
        values = {name: steady_seconds_of(summary, name) for name in (run, against) if name}
    else:
        values = seed_values(summary.results, measure)
    if against:
        both = paired_ratio(values[run], values[against])
        why = "not recorded in both"
        if measure == TO_TARGET:
            never = [name for name in (run, against) if not values[name]]
            why = f"not reached by {' and '.join(never)}" if never else "not reached by both in any one seed"
        return (None, why) if both is None else _of_all(both.mean, both.count, seeds)
    if not values[run]:
        return None, "not reached in any seed" if measure == TO_TARGET else "not recorded"
    return _of_all(mean_interval(list(values[run].values())).mean, len(values[run]), seeds)


def _unknown(summary: Summary, run: str) -> str:
    """Why the figures of a run decide nothing; empty where they do."""
    found, seeds = summary.of(run), len(summary.results.study.seeds)
    if found.invalid:
        return f"{run} is invalid: {'; '.join(found.invalid)}"
    if len(found.complete_seeds) < seeds:
        return f"{len(found.complete_seeds)} of {seeds} seeds complete"
    if found.not_comparable:
        return f"{run} is not comparable: {'; '.join(found.not_comparable)}"
    return ""


def _of_all(mean: float, count: int, seeds: int) -> tuple[float | None, str]:
    return (mean, "") if count == seeds else (None, f"measured in {count} of {seeds} seeds")


def verdict(found: tuple[Criterion, ...]) -> str:
    """`All 6 criteria are met.`, or how many are not and which."""
    missed = [f"{one.run} {one.metric.label} {_missed(one)}" for one in found if not one.met]
    if not missed:
        return f"All {len(found)} criteria are met." if len(found) > 1 else "The criterion is met."
    return f"{len(missed)} of {len(found)} criteria not met: {'; '.join(missed)}."


def _missed(one: Criterion) -> str:
    return f"not measured ({one.why})" if one.value is None else f"{one.shown}, wanted {one.bound}"


def criteria_frame(summary: Summary) -> pl.DataFrame:
    """One row a criterion, unrounded; shares are from 0 to 1."""
    rows: list[tuple[Any, ...]] = [
        (one.run, one.measure, one.value, one.at_least, one.at_most, "yes" if one.met else "no", one.why)
        for one in criteria(summary)
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")
