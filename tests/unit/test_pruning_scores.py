"""Importance scores against scalar formulas written out again, and by hand; ramps in exact fractions."""

import math
from fractions import Fraction

import pytest
import torch

from engine.config import Pruning
from engine.pruning.ramp import Ramp, pruned_counts
from engine.pruning.scores import SCORES, SIGNED, Parts, definition


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def to_zero(w, m, v):
    return sign(w) * m / (math.sqrt(v) + 1e-8)


# Each in plain Python, of one weight: w, m, v and the m̂ of step t under β1.
REFERENCES = {
    "bitter0": lambda w, m, v, h: abs(w * m) * abs(w) / (math.sqrt(v) + 1e-8),
    "bitter1": lambda w, m, v, h: abs(w),
    "bitter2": lambda w, m, v, h: abs(w),
    "bitter3": lambda w, m, v, h: abs(w) * math.sqrt(abs(m) + 1e-8),
    "bitter4": lambda w, m, v, h: abs(w) * math.sqrt(abs(m) + 1e-8),
    "bitter5": lambda w, m, v, h: to_zero(w, m, v) + 0.1 * abs(w),
    "bitter5_corrected": lambda w, m, v, h: 0.1 * abs(w) - to_zero(w, m, v),
    "bitter6": lambda w, m, v, h: abs(w) * math.sqrt(abs(m) + 1e-8) * math.sqrt(m * m / (v + 1e-8)),
    "bitter7": lambda w, m, v, h: abs(w) / (math.sqrt(v) + 1e-6),
    "bitter7_head": lambda w, m, v, h: abs(w) * (abs(v) + 1e-8) ** 0.25,
    "bitter8": lambda w, m, v, h: abs(w) * math.sqrt(abs(h) + 1e-8),
    # |w| · rsqrt(rsqrt(|v| + 1e-5)), as that code has it.
    "bitter8_head": lambda w, m, v, h: abs(w) / math.sqrt(1 / math.sqrt(abs(v) + 1e-5)),
    "bitter9": lambda w, m, v, h: abs(w) * math.sqrt(abs(m)) + 0.1 * to_zero(w, m, v),
    "bitter9_corrected": lambda w, m, v, h: abs(w) * math.sqrt(abs(m)) - 0.1 * to_zero(w, m, v),
    "bitter10z": lambda w, m, v, h: abs(w) * math.sqrt(abs(m)) * abs(m) / (math.sqrt(v) + 1e-8),
}
# w, m, v; in the last ones nothing has moved yet, and a gradient's square was too small for a float.
POINTS = [
    (0.5, 0.04, 0.0016),
    (-0.5, 0.05, 0.0016),
    (0.02, -3e-4, 2.5e-5),
    (-1.25, -0.09, 0.04),
    (0.0, 0.01, 0.01),
    (0.3, 0.0, 0.0),
    (-0.3, 1e-20, 0.0),
]
BETA1, T = 0.9, 2


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_that_of_the_formula_and_finite_where_v_is_zero(name):
    w, m, v = torch.tensor(POINTS).unbind(1)
    found = SCORES[name](Parts(w, m, v, torch.tensor(float(T)), BETA1))
    hat = 1 - BETA1**T
    expected = [REFERENCES[name](*point, point[1] / hat) for point in POINTS]
    assert found.isfinite().all() and found.shape == w.shape
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_scores_by_hand():
    """w = 0.5, m = 0.04, v = 0.0016: √v = 0.04, √|m| = 0.2, m̂ = 0.04 / 0.19 at t = 2."""
    parts = Parts(torch.tensor([0.5]), torch.tensor([0.04]), torch.tensor([0.0016]), torch.tensor(2.0), 0.9)
    by_hand = {
        "bitter0": 0.25,  # 0.02 · 0.5 / 0.04
        "bitter1": 0.5,
        "bitter2": 0.5,
        "bitter3": 0.1,
        "bitter4": 0.1,
        "bitter5": 1.05,  # 1 + 0.05
        "bitter5_corrected": -0.95,
        "bitter6": 0.1,  # m²/v is 1
        "bitter7": 12.5,
        "bitter7_head": 0.1,  # 0.0016^¼ = 0.2
        "bitter8": 0.22942,  # 0.5 · √0.2105263
        "bitter9": 0.2,  # 0.1 + 0.1
        "bitter9_corrected": 0.0,
        "bitter10z": 0.1,
    }
    for name, expected in by_hand.items():
        assert SCORES[name](parts).item() == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    # 0.5 · (0.0016 + 0.00001)^¼ = 0.5 · √0.0401248
    assert SCORES["bitter8_head"](parts).item() == pytest.approx(0.100156, rel=1e-4)
    assert by_hand.keys() | {"bitter8_head"} == SCORES.keys()


def test_bitter5_and_9_keep_what_moves_towards_zero_as_coded_and_the_corrected_ones_prune_it():
    """Adam subtracts m / √v, so of two equal weights the one whose m has its sign shrinks."""
    w = torch.tensor([0.5, 0.5])
    parts = Parts(w, torch.tensor([0.04, -0.04]), torch.tensor([0.0016, 0.0016]), torch.tensor(2.0))
    shrinks, grows = 0, 1
    assert (w - 0.1 * parts.m / parts.v.sqrt())[shrinks] < w[shrinks]
    for name in ("bitter5", "bitter9"):
        score, corrected = SCORES[name](parts), SCORES[f"{name}_corrected"](parts)
        assert score[shrinks] > score[grows] and corrected[shrinks] < corrected[grows]
        assert SCORES[f"{name}_corrected"].version > SCORES[name].version


def test_only_signed_scores_can_be_below_that_of_a_pruned_weight():
    w, m, v = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1))
    below = {n for n, s in SCORES.items() if (s(Parts(w, m, v.square(), torch.tensor(3.0))) < 0).any()}
    assert below == set(SIGNED) == {"bitter5", "bitter5_corrected", "bitter9", "bitter9_corrected"}


@pytest.mark.parametrize("name", SCORES)
def test_without_moments_a_score_is_the_magnitude(name):
    assert SCORES[name](Parts(torch.tensor([-2.0, 1.0]))).tolist() == [2.0, 1.0]


def test_definitions_carry_name_version_and_formula():
    assert definition("state", "bitter7") == ("bitter7", 1, "|w| / (√v + 1e-6)")
    assert definition("state", "bitter7_head") == ("bitter7_head", 2, "|w| · (|v| + 1e-8)^¼")
    assert definition("magnitude", "bitter7") == ("magnitude", 1, "|w|")
    assert definition("movement_original", "bitter7")[2] == "w · (w - w at the start)"
    assert "Σ w · ∂L/∂w" in definition("movement", "bitter7")[2]
    assert len({(score.formula, name) for name, score in SCORES.items()}) == len(SCORES)


# --- ramps


def ramp(shape: str, **changes) -> Ramp:
    return Ramp.of(Pruning(pruning_ramp=shape, **{"sparsity": 0.8, "pruning_interval": 10, **changes}), 110)


def test_ramps_by_hand():
    """From 10 updates to 90, with a hold of 20; half way p = 1/2, three quarters of the way 3/4."""
    by_hand = {
        "linear": ["0", "2/5", "3/5", "4/5"],
        "cubic_late": ["0", "1/10", "27/80", "4/5"],  # 0.8 / 8, 0.8 · 27 / 64
        "cubic_early": ["0", "7/10", "63/80", "4/5"],  # 0.8 · 7 / 8, 0.8 · 63 / 64
    }
    for shape, expected in by_hand.items():
        one = ramp(shape, pruning_start=10, pruning_hold=20)
        assert [one.target(n) for n in (10, 50, 70, 90)] == [Fraction(x) for x in expected]
        assert one.target(0) == one.target(5) == 0 and one.target(91) == one.target(110) == Fraction(4, 5)


def test_weights_are_ranked_at_intervals_and_at_the_end_of_the_ramp():
    one = ramp("linear", pruning_start=10, pruning_hold=20, pruning_interval=30)
    assert [n for n in range(111) if one.is_due(n)] == [40, 70, 90] and one.first == 40
    assert [one.newest(n) for n in (0, 10, 39, 40, 69, 70, 89, 90, 110)] == [0, 0, 0, 40, 40, 70, 70, 90, 90]
    for n in range(111):
        assert one.newest(n) == max([k for k in range(n + 1) if one.is_due(k)], default=0)


def test_without_a_hold_the_last_update_has_the_final_sparsity():
    one = ramp("cubic_late")
    assert one.is_due(110) and one.target(110) == Fraction(4, 5) and one.target(109) < Fraction(4, 5)


def test_how_many_are_pruned_is_the_floor_of_the_share_as_it_was_written():
    # In floats 0.29 · 100 is 28.999999999999996.
    assert pruned_counts(Fraction("0.29"), [40, 60], "global") == [29]
    assert pruned_counts(Fraction("0.5"), [3, 5, 8], "layer") == [1, 2, 4]
    assert pruned_counts(Fraction("0.5"), [3, 5, 8], "global") == [8]


def test_the_ramp_over_layers_by_hand():
    """0.5 · (0.7, 0.9, 1.1, 1.3) = 0.35, 0.45, 0.55, 0.65; and none above 0.95."""
    assert pruned_counts(Fraction("0.5"), [100] * 4, "layer_ramp") == [35, 45, 55, 65]
    assert pruned_counts(Fraction("0.9"), [100] * 4, "layer_ramp") == [63, 81, 95, 95]
    assert pruned_counts(Fraction("0.5"), [100], "layer_ramp") == [35]
