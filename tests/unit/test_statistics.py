"""Intervals, paired tests, Holm and verdicts against numbers worked out by hand."""

import math

import pytest

from metrics import statistics

# With 2 degrees of freedom the t distribution has a closed form: p = 1 - t / sqrt(t^2 + 2).
T_975_DF2 = 4.302653


def test_mean_interval_of_three_values():
    estimate = statistics.mean_interval([1.0, 2.0, 3.0])  # sd 1
    assert estimate.mean == 2.0
    assert estimate.half_width == pytest.approx(T_975_DF2 / math.sqrt(3), rel=1e-6)
    assert estimate.count == 3


def test_equal_values_have_an_interval_of_exactly_zero():
    assert statistics.mean_interval([0.1, 0.1, 0.1]) == statistics.Estimate(0.1, 0.0, 3)


def test_one_value_or_infinity_has_no_interval():
    assert statistics.mean_interval([2.0]).half_width is None
    assert statistics.mean_interval([2.0, math.inf]) == statistics.Estimate(math.inf, None, 2)


def test_no_values_are_an_error():
    with pytest.raises(ValueError, match="at least one value"):
        statistics.mean_interval([])


def test_paired_test_by_hand():
    values = {
        "base": {1: 2.0, 2: 2.1, 3: 2.2},
        "run": {3: 2.5, 1: 2.1, 2: 2.3},
    }  # pairs by seed, not by place
    result = statistics.compare(values, "base", "lower")["run"]
    t = 0.2 / (0.1 / math.sqrt(3))  # differences 0.1, 0.2, 0.3: mean 0.2, sd 0.1
    assert result.differences == pytest.approx((0.1, 0.2, 0.3))
    assert result.t == pytest.approx(t)
    assert result.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert result.estimate is not None
    assert result.estimate.half_width == pytest.approx(T_975_DF2 * 0.1 / math.sqrt(3), rel=1e-6)
    assert result.smallest_detectable == pytest.approx(0.326, abs=5e-4)
    assert result.verdict == "inconclusive"


def test_holm_by_hand():
    # sorted 0.01, 0.03, 0.04: times 3, 2, 1, never falling
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_holm_decides_the_verdict():
    """One run that is significant alone is not beside three others that are not."""
    base = {1: 0.0, 2: 0.0, 3: 0.0}
    clear = {1: 0.9, 2: 1.0, 3: 1.3}  # t = 8.87, p = 0.0124
    noise = {1: -1.0, 2: 0.1, 3: 1.0}
    assert statistics.compare({"base": base, "a": clear}, "base", "lower")["a"].verdict == "worse"
    crowd = {"base": base, "a": clear} | {name: noise for name in ("b", "c", "d", "e")}
    result = statistics.compare(crowd, "base", "lower")["a"]
    assert result.p < 0.05 < result.p_holm == pytest.approx(5 * result.p)
    assert result.verdict == "inconclusive"


@pytest.mark.parametrize(("better", "verdict"), [("lower", "better"), ("higher", "worse")])
def test_direction_follows_the_better_side(better, verdict):
    values = {"base": {1: 2.0, 2: 2.1, 3: 2.2}, "run": {1: 1.0, 2: 1.11, 3: 1.19}}
    assert statistics.compare(values, "base", better)["run"].verdict == verdict


def test_identical_differences_need_no_variance():
    base = {1: 1.0, 2: 2.0, 3: 4.0}
    values = {"base": base, "same": dict(base), "shifted": {seed: v + 0.5 for seed, v in base.items()}}
    results = statistics.compare(values, "base", "lower")
    assert (results["same"].verdict, results["same"].p) == ("identical", 1.0)
    assert (results["shifted"].verdict, results["shifted"].t, results["shifted"].p) == (
        "worse",
        math.inf,
        0.0,
    )
    assert results["shifted"].smallest_detectable == 0.0


def test_no_verdict_says_why():
    values = {"base": {1: 1.0, 2: 1.0}, "one": {1: 2.0}, "nan": {1: 1.0, 2: math.nan}, "other": {7: 1.0}}
    results = statistics.compare(values, "base", "lower")
    assert {run: result.verdict for run, result in results.items()} == dict.fromkeys(results)
    assert results["one"].reason == "one seed gives no verdict"
    assert results["nan"].reason == "not finite in seed 2"
    assert results["other"].reason == "no seed in common with the baseline"


def test_unknown_better_side():
    with pytest.raises(ValueError, match="'lower' or 'higher', got 'smaller'"):
        statistics.compare({}, "base", "smaller")


@pytest.mark.parametrize(("pairs", "deviations"), [(3, 3.26), (5, 1.68), (10, 1.00)])
def test_smallest_detectable_difference(pairs, deviations):
    assert statistics.smallest_detectable_deviations(pairs) == pytest.approx(deviations, abs=0.005)


def test_smallest_detectable_difference_needs_two_pairs():
    with pytest.raises(ValueError, match="at least 2 pairs, got 1"):
        statistics.smallest_detectable_deviations(1)


def test_ratio_is_a_geometric_mean_of_pairs():
    ratio = statistics.paired_ratio({1: 2.0, 2: 8.0}, {1: 1.0, 2: 1.0, 3: 5.0})
    assert ratio is not None
    assert (ratio.mean, ratio.count) == (pytest.approx(4.0), 2)
    assert ratio.low * ratio.high == pytest.approx(16.0)
    assert statistics.paired_ratio({1: 3.0}, {1: 2.0}) == statistics.Ratio(pytest.approx(1.5), None, None, 1)
    assert statistics.paired_ratio({1: 3.0}, {1: 0.0}) is None
    assert statistics.paired_ratio({}, {1: 1.0}) is None


def test_the_smallest_difference_counts_the_runs_that_are_tested():
    """Four p-values: the smallest is held against 0.05 / 4."""
    base, run = {1: 2.0, 2: 2.1, 3: 2.2}, {1: 2.1, 2: 2.3, 3: 2.5}
    values = {"base": base, "run": run} | {name: dict(run) for name in ("b", "c", "d")}
    result = statistics.compare(values, "base", "lower")["run"]
    expected = 0.1 * statistics.smallest_detectable_deviations(3, alpha=0.0125)
    assert result.smallest_detectable == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mean", "count", "low", "high"),
    [  # centre (p + z²/2n) / (1 + z²/n), half-width z sqrt(p(1-p)/n + z²/4n²) / (1 + z²/n), z = 1.959964
        (0.5, 100, 0.40383, 0.59617),
        (0.9, 7600, 0.89305, 0.90654),
        (0.0, 10, 0.0, 0.27753),
        (1.0, 10, 0.72247, 1.0),
    ],
)
def test_binomial_interval_by_hand(mean, count, low, high):
    found = statistics.proportion(mean, count)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-6), pytest.approx(high, abs=5e-6))
    assert (found.mean, found.count) == (mean, count)


@pytest.mark.parametrize(("mean", "count"), [(1.2, 10), (-0.1, 10), (0.5, 0)])
def test_a_share_that_is_none(mean, count):
    with pytest.raises(ValueError, match="a share from 0 to 1 of at least one thing, got"):
        statistics.proportion(mean, count)


# --- equivalence


def differing(*differences: float, **others: tuple[float, ...]) -> dict[str, dict[int, float]]:
    """A baseline of zeros and runs that differ from it by so much, a number a seed."""
    runs = {"base": (0.0,) * len(differences), "run": differences, **others}
    return {run: dict(enumerate(values)) for run, values in runs.items()}


def test_two_one_sided_tests_by_hand():
    values = differing(0.1, 0.2, 0.3)  # mean 0.2, sd 0.1
    result = statistics.compare(values, "base", "lower", margin=0.8)["run"]
    t = (0.8 - 0.2) / (0.1 / math.sqrt(3))
    assert result.p_equivalent == pytest.approx((1 - t / math.sqrt(t * t + 2)) / 2)  # one-sided: 0.0046
    assert result.verdict == "equivalent"
    mirrored = statistics.compare(differing(-0.1, -0.2, -0.3), "base", "lower", margin=0.8)["run"]
    assert mirrored.p_equivalent == pytest.approx(result.p_equivalent) and mirrored.verdict == "equivalent"


@pytest.mark.parametrize(
    ("differences", "margin", "verdict"),
    [
        ((0.1, 0.2, 0.3), 0.0, "inconclusive"),
        ((0.1, 0.2, 0.3), 0.25, "inconclusive"),  # within the margin, but not surely
        ((0.010, 0.011, 0.012), 0.02, "equivalent"),  # surely not 0, and surely too small to matter
        ((0.010, 0.011, 0.012), 0.005, "worse"),  # surely larger than the margin
        ((0.0, 0.0, 0.0), 0.01, "identical"),
        ((0.5, 0.5, 0.5), 1.0, "equivalent"),  # the same in every seed: no variance to divide by
        ((0.5, 0.5, 0.5), 0.5, "worse"),
    ],
)
def test_a_difference_below_the_margin_is_none_worth_a_choice(differences, margin, verdict):
    assert statistics.compare(differing(*differences), "base", "lower", margin)["run"].verdict == verdict


def test_equivalence_has_a_correction_of_its_own():
    """p 0.0229 alone is not beside two runs that differ, whose own p is as small as ever."""
    small, far = (-0.1, 0.0, 0.1), (2.9, 3.0, 3.1)
    t = 0.26 / (0.1 / math.sqrt(3))
    alone = statistics.compare(differing(*small), "base", "lower", 0.26)["run"]
    assert (
        alone.p_equivalent == pytest.approx((1 - t / math.sqrt(t * t + 2)) / 2) and alone.p_equivalent < 0.05
    )
    beside = statistics.compare(differing(*small, one=far, two=far), "base", "lower", 0.26)
    assert beside["run"].p_equivalent == pytest.approx(3 * alone.p_equivalent)
    assert [beside[run].verdict for run in ("run", "one", "two")] == ["inconclusive", "worse", "worse"]


def test_a_negative_margin_is_no_margin():
    with pytest.raises(ValueError, match="margin must be a number >= 0, got -1"):
        statistics.compare({}, "base", "lower", -1)
