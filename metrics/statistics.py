"""Intervals, paired comparisons, Holm's correction and verdicts over seeds.

A seed fixes the initial weights and the data order, so the same seed in two runs is a pair. Must not guess:
one seed gives no verdict, a number that is not finite gives no verdict, and both say why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import stats
from scipy.optimize import brentq

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.80

SeedValues = Mapping[int, float]  # seed -> value of one metric of one run


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half-width of its 95 % t interval (None for one seed, or not finite)."""

    mean: float
    half_width: float | None
    count: int

    def times(self, factor: float) -> Estimate:
        """The same in another unit, of which `factor` make one of this."""
        half = self.half_width
        return self if factor == 1 else Estimate(self.mean * factor, half and half * factor, self.count)

    def ends(self, least: float = -math.inf) -> tuple[float | None, float | None]:
        """Both ends of the interval, neither below `least`, the least that the quantity can be; None for one seed."""
        half = self.half_width
        return (None, None) if half is None else (max(self.mean - half, least), self.mean + half)


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of run / baseline over paired seeds, with its 95 % interval (None for one pair)."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def times(self, factor: float) -> Ratio:
        """The ratio and its interval, each times `factor`."""
        low, high = (None if end is None else end * factor for end in (self.low, self.high))
        return Ratio(self.mean * factor, low, high, self.count)


@dataclass(frozen=True)
class Proportion:
    """A proportion with its 95 % binomial interval, of `count` things that were looked at."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Comparison:
    """One run against the baseline on one metric. Differences are run - baseline, in the metric's units."""

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    estimate: Estimate | None = None  # of the differences
    t: float | None = None
    p: float | None = None  # two-sided paired t-test
    p_holm: float | None = None  # the same, corrected for the number of runs compared
    p_equivalent: float | None = None  # that the difference is the margin or more, corrected alike
    smallest_detectable: float | None = None  # with 80 % power at alpha 0.05 after Holm's correction
    # better, worse, identical, equivalent, inconclusive; None with the reason
    verdict: str | None = None
    reason: str = ""


def _deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; exactly 0 for equal values, where floating-point means would leave 1e-17."""
    return 0.0 if len(set(values)) == 1 else float(np.std(values, ddof=1))


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean ± 95 % t interval of independent values.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    count = len(values)
    mean = values[0] if len(set(values)) == 1 else sum(values) / count
    if count == 1 or not all(math.isfinite(value) for value in values):
        return Estimate(mean, None, count)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Estimate(mean, quantile * _deviation(values) / math.sqrt(count), count)


def proportion(mean: float, count: int) -> Proportion:
    """Wilson's 95 % interval of the share `mean` among `count` independent things. Source: Wilson (1927).

    Raises:
        ValueError: `mean` is no share, or there is nothing that it could be one of.
    """
    if not 0 <= mean <= 1 or count < 1:
        raise ValueError(
            f"a proportion needs a share from 0 to 1 of at least one thing, got {mean} of {count}"
        )
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    # At shares of exactly 0 and 1 the interval ends there; rounding would leave 1e-17.
    return Proportion(mean, 0.0 if mean == 0 else centre - half, 1.0 if mean == 1 else centre + half, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given. Source: Holm (1979)."""
    adjusted = [0.0] * len(p_values)
    floor = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


@cache
def smallest_detectable_deviations(pairs: int, power: float = POWER, alpha: float = ALPHA) -> float:
    """Smallest true difference that a two-sided paired t-test of `pairs` pairs finds with the given power.

    In standard deviations of the paired differences: 3.26 for 3 pairs, 1.68 for 5, 1.00 for 10.

    Raises:
        ValueError: fewer than 2 pairs.
    """
    if pairs < 2:  # noqa: PLR2004
        raise ValueError(f"a paired test needs at least 2 pairs, got {pairs}")
    critical = float(stats.t.ppf(1 - alpha / 2, pairs - 1))

    def missing_power(deviations: float) -> float:
        # The other tail (a significant result of the wrong sign) is below 1e-3 here, and scipy's noncentral t
        # turns to nan far out in it; leaving it out errs towards a larger difference.
        return float(stats.nct.sf(critical, pairs - 1, deviations * math.sqrt(pairs))) - power

    upper = 1.0
    while missing_power(upper) < 0:
        upper *= 2
    return float(brentq(missing_power, 0.0, upper))


def paired_ratio(run: SeedValues, baseline: SeedValues) -> Ratio | None:
    """Run / baseline over the seeds both have, on the log scale; None unless all are positive and finite."""
    seeds = sorted(run.keys() & baseline.keys())
    values = [value for seed in seeds for value in (run[seed], baseline[seed])]
    if not seeds or not all(math.isfinite(value) and value > 0 for value in values):
        return None
    logs = mean_interval([math.log(run[seed] / baseline[seed]) for seed in seeds])
    if logs.half_width is None:
        return Ratio(math.exp(logs.mean), None, None, logs.count)
    low, high = math.exp(logs.mean - logs.half_width), math.exp(logs.mean + logs.half_width)
    return Ratio(math.exp(logs.mean), low, high, logs.count)


def _paired_test(run: SeedValues, baseline: SeedValues) -> Comparison:
    """One run against the baseline before Holm; what depends on the other runs is None still."""
    seeds = tuple(sorted(run.keys() & baseline.keys()))
    if not seeds:
        return Comparison((), (), reason="no seed in common with the baseline")
    infinite = [str(s) for s in seeds if not (math.isfinite(run[s]) and math.isfinite(baseline[s]))]
    if infinite:
        return Comparison(seeds, (), reason=f"not finite in seed {', '.join(infinite)}")
    differences = tuple(run[seed] - baseline[seed] for seed in seeds)
    estimate = mean_interval(differences)
    if len(seeds) == 1:
        return Comparison(seeds, differences, estimate, reason="one seed gives no verdict")
    deviation = _deviation(differences)
    if deviation > 0:
        t = estimate.mean / (deviation / math.sqrt(len(seeds)))
        p = float(2 * stats.t.sf(abs(t), len(seeds) - 1))
    elif estimate.mean == 0:  # every difference is exactly 0: 0/0, and nothing to find
        t, p = 0.0, 1.0
    else:  # the same non-zero difference in every seed
        t, p = math.copysign(math.inf, estimate.mean), 0.0
    return Comparison(seeds, differences, estimate, t, p)


def _smallest_detectable(comparison: Comparison, tested: int) -> float:
    """The smallest true difference found with 80 % power when no other of the `tested` runs differs.

    Holm holds the smallest of so many p-values against alpha / tested.
    """
    deviations = smallest_detectable_deviations(len(comparison.seeds), alpha=ALPHA / tested)
    return _deviation(comparison.differences) * deviations


def _p_equivalent(comparison: Comparison, margin: float) -> float:
    """Of the two one-sided tests that the difference is the margin or more, either way, the larger p.

    Source: Schuirmann (1987).
    """
    assert comparison.estimate is not None
    room = margin - abs(comparison.estimate.mean)
    deviation, count = _deviation(comparison.differences), len(comparison.seeds)
    if deviation == 0:
        return 0.0 if room > 0 else 1.0
    return float(stats.t.sf(room / (deviation / math.sqrt(count)), count - 1))


def _verdict(comparison: Comparison, better: str) -> str:
    """A difference that is surely smaller than the margin is none worth a choice, even where it is surely not 0."""
    assert comparison.p_holm is not None
    if not any(comparison.differences):
        return "identical"
    if comparison.p_equivalent is not None and comparison.p_equivalent < ALPHA:
        return "equivalent"
    if comparison.p_holm >= ALPHA:
        return "inconclusive"
    assert comparison.estimate is not None
    return "better" if (comparison.estimate.mean < 0) == (better == "lower") else "worse"


def compare(
    values: Mapping[str, SeedValues], baseline: str, better: str, margin: float = 0.0
) -> dict[str, Comparison]:
    """Every run but the baseline against it, paired by seed, with Holm's correction over the runs tested.

    Args:
        values: run -> seed -> value; a run or seed without a value is left out or empty.
        baseline: the run compared with; without values every comparison says so.
        better: "lower" or "higher".
        margin: smaller differences, in the metric's units, would change no choice; 0: none would be too small.
            Whether they are is a claim of another kind, with a correction of its own over the same runs.

    Raises:
        ValueError: `better` is something else, or `margin` is negative.
    """
    if better not in ("lower", "higher"):
        raise ValueError(f"better must be 'lower' or 'higher', got {better!r}")
    if not margin >= 0:
        raise ValueError(f"margin must be a number >= 0, got {margin!r}")
    base = values.get(baseline, {})
    tests = {run: _paired_test(seeds, base) for run, seeds in values.items() if run != baseline}
    tested = [run for run, test in tests.items() if test.p is not None]
    different = holm([p for run in tested if (p := tests[run].p) is not None])
    equivalent = (
        holm([_p_equivalent(tests[run], margin) for run in tested]) if margin else [None] * len(tested)
    )
    for run, p_holm, p_equivalent in zip(tested, different, equivalent, strict=True):
        one = replace(
            tests[run],
            p_holm=p_holm,
            p_equivalent=p_equivalent,
            smallest_detectable=_smallest_detectable(tests[run], len(tested)),
        )
        tests[run] = replace(one, verdict=_verdict(one, better))
    return tests
