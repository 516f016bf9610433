"""How often the verdicts are wrong, by simulation: false ones without a difference, missed ones with one.

Every trial is a study made up of normal numbers, judged by `statistics.compare` itself. `pytest -s` or `-rP` shows
the figures.
"""

import numpy as np
import pytest

from metrics import statistics

TRIALS = 1000
SEED_SPREAD = 3.0  # of what a seed does to all runs alike; pairing takes it out
SPREAD = 1.0  # of what it does to one run, so paired differences have a deviation of sqrt(2)


def trials(runs: int, seeds: int, shift: float = 0.0, margin: float = 0.0, shifted: int = 1):
    """TRIALS studies of `runs` runs against a baseline; the first `shifted` are worse by `shift`."""
    draw = np.random.default_rng([20, runs, seeds])
    for _ in range(TRIALS):
        common = draw.normal(0, SEED_SPREAD, seeds)
        values = common + draw.normal(0, SPREAD, (runs + 1, seeds))
        values[1 : 1 + shifted] += shift
        names = ["baseline", *(f"run{i}" for i in range(1, runs + 1))]
        study = {name: dict(enumerate(row)) for name, row in zip(names, values.tolist(), strict=True)}
        yield statistics.compare(study, "baseline", "lower", margin)


@pytest.mark.parametrize(("runs", "seeds"), [(1, 3), (3, 3), (3, 5), (4, 10)])
def test_studies_without_a_difference_have_few_false_verdicts(runs, seeds):
    """A/A: every run is the baseline. A study is wrong when any of its runs is called better or worse."""
    wrong = sum(
        any(one.verdict in ("better", "worse") for one in compared.values())
        for compared in trials(runs, seeds)
    )
    print(f"A/A, {TRIALS} studies of {runs} runs × {seeds} seeds: {wrong / TRIALS:.1%} with a false verdict")
    assert 0.03 <= wrong / TRIALS <= 0.07


@pytest.mark.parametrize(("runs", "seeds"), [(1, 3), (3, 3), (3, 5), (4, 10)])
def test_the_smallest_difference_that_is_stated_is_found_as_often_as_is_said(runs, seeds):
    """Power: one run differs by what `compare` states for the deviation that the differences really have."""
    deviation = SPREAD * np.sqrt(2)
    study = {"baseline": dict.fromkeys(range(seeds), 0.0)}
    exact = deviation * np.sqrt((seeds - 1) / seeds)  # so that alternating signs have this deviation
    signs = [(-1.0) ** i for i in range(seeds)]
    if seeds % 2:
        signs, exact = [0.0, *signs[1:]], deviation
    study |= {f"run{i}": {s: exact * sign for s, sign in enumerate(signs)} for i in range(1, runs + 1)}
    stated = statistics.compare(study, "baseline", "lower")["run1"].smallest_detectable
    found = sum(compared["run1"].verdict == "worse" for compared in trials(runs, seeds, shift=stated))
    print(
        f"power, {TRIALS} studies of {runs} runs × {seeds} seeds: a difference of {stated:.2f} "
        f"({stated / deviation:.2f} deviations) found in {found / TRIALS:.1%}"
    )
    assert found / TRIALS == pytest.approx(statistics.POWER, abs=0.04)


@pytest.mark.parametrize(("runs", "seeds"), [(1, 3), (3, 5), (4, 10)])
def test_runs_that_differ_by_the_margin_are_seldom_called_equivalent(runs, seeds):
    """A study is wrong when any of its runs is, each of which differs by just as much as would matter."""
    margin = 6 * SPREAD  # so large that the test of the other side has no part in it
    studies = trials(runs, seeds, shift=margin, margin=margin, shifted=runs)
    wrong = sum(any(one.verdict == "equivalent" for one in compared.values()) for compared in studies)
    print(
        f"at the margin, {TRIALS} studies of {runs} runs × {seeds} seeds: {wrong / TRIALS:.1%} with a false verdict"
    )
    assert 0.03 <= wrong / TRIALS <= 0.07
