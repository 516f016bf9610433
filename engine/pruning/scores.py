"""SCORES: name → a versioned definition of how much a weight matters; the lowest are pruned.

    w weight     m, v exponential averages of gradients and of their squares (of Adam and its kin)
    m̂ = m / (1 - β1^t), t the optimizer's count of steps     ε = 1e-8

A definition that changes gets a new version; a formula is what its function computes, as text for the run's figures.
The functions use methods of tensors alone: this module imports no torch, so that settings can be checked by it.

bitter0 to bitter9 and bitter10z are those of AdamWPrune (mcgrof, October 2025), as coded. Where the code divides by
√v alone, the formula here adds ε, so that scores are finite where v = 0. bitter5 and bitter9 mean to prune what moves
towards zero, and do the opposite: Adam subtracts m / √v, so sign(w) · m > 0 is what moves towards zero, and it raises
the score. The `_corrected` ones have the sign that was meant. The `_head` ones are what the names were redefined to.
"""

from collections.abc import Callable
from dataclasses import dataclass

E = 1e-8


@dataclass(frozen=True)
class Parts:
    """What a score is made of, of one tensor; the moments are None as long as the optimizer has none."""

    w: object
    m: object = None
    v: object = None
    t: object = 0
    beta1: float = 0.9

    @property
    def magnitude(self):
        """|w|"""
        return self.w.abs()

    @property
    def m_hat(self):
        """m̂, without the bias of its start at zero."""
        return self.m / (1 - self.beta1**self.t)

    @property
    def root_v(self):
        """√v"""
        return self.v.sqrt()

    @property
    def towards_zero(self):
        """sign(w) · m / (√v + ε): above 0 where Adam's next update makes |w| smaller."""
        return self.w.sign() * self.m / (self.root_v + E)


@dataclass(frozen=True)
class Score:
    """One definition."""

    version: int
    formula: str
    of: Callable[[Parts], object]
    ramp: str  # that the original used with it
    budget: float = 1.0  # of the original, in steps of its baseline
    needs_moments: bool = True
    signed: bool = False  # may be below 0, the score of a pruned weight

    def __call__(self, parts: Parts):
        """The scores of one tensor, a new tensor of its shape; |w| while there are no moments."""
        return self.of(parts) if parts.m is not None or not self.needs_moments else parts.magnitude


def _weighted(p: Parts):
    """|w| · √(|m| + ε)"""
    return p.magnitude * (p.m.abs() + E).sqrt()


WEIGHTED = "|w| · √(|m| + 1e-8)"
LATE, LONG = "cubic_late", 1.3
SCORES = {
    "bitter0": Score(
        1,
        "|w · m| · |w| / (√v + 1e-8)",
        lambda p: (p.w * p.m).abs() * p.magnitude / (p.root_v + E),
        "linear",
    ),
    "bitter1": Score(1, "|w|", lambda p: p.magnitude, "linear", needs_moments=False),
    "bitter2": Score(1, "|w|", lambda p: p.magnitude, "linear", 1.21, needs_moments=False),
    "bitter3": Score(1, WEIGHTED, _weighted, LATE, LONG),
    "bitter4": Score(1, f"{WEIGHTED}, ranked within each layer", _weighted, LATE, LONG),
    "bitter5": Score(
        1,
        "sign(w) · m / (√v + 1e-8) + 0.1 · |w|",
        lambda p: p.towards_zero + 0.1 * p.magnitude,
        LATE,
        LONG,
        signed=True,
    ),
    "bitter5_corrected": Score(
        2,
        "-sign(w) · m / (√v + 1e-8) + 0.1 · |w|",
        lambda p: 0.1 * p.magnitude - p.towards_zero,
        LATE,
        LONG,
        signed=True,
    ),
    "bitter6": Score(
        1,
        f"{WEIGHTED} · √(m² / (v + 1e-8))",
        lambda p: _weighted(p) * (p.m.square() / (p.v + E)).sqrt(),
        LATE,
        LONG,
    ),
    "bitter7": Score(1, "|w| / (√v + 1e-6)", lambda p: p.magnitude / (p.root_v + 1e-6), LATE),
    "bitter7_head": Score(2, "|w| · (|v| + 1e-8)^¼", lambda p: p.magnitude * (p.v.abs() + E).pow(0.25), LATE),
    "bitter8": Score(
        1,
        "|w| · √(|m̂| + 1e-8), m̂ = m / (1 - β1^t)",
        lambda p: p.magnitude * (p.m_hat.abs() + E).sqrt(),
        LATE,
        LONG,
    ),
    "bitter8_head": Score(
        2, "|w| · (|v| + 1e-5)^¼", lambda p: p.magnitude * (p.v.abs() + 1e-5).pow(0.25), LATE, LONG
    ),
    "bitter9": Score(
        1,
        "|w| · √|m| + 0.1 · sign(w) · m / (√v + 1e-8)",
        lambda p: p.magnitude * p.m.abs().sqrt() + 0.1 * p.towards_zero,
        LATE,
        LONG,
        signed=True,
    ),
    "bitter9_corrected": Score(
        2,
        "|w| · √|m| - 0.1 · sign(w) · m / (√v + 1e-8)",
        lambda p: p.magnitude * p.m.abs().sqrt() - 0.1 * p.towards_zero,
        LATE,
        LONG,
        signed=True,
    ),
    "bitter10z": Score(
        1,
        "|w| · √|m| · |m| / (√v + 1e-8)",
        lambda p: p.magnitude * p.m.abs().sqrt() * p.m.abs() / (p.root_v + E),
        LATE,
    ),
}
SIGNED = tuple(name for name, score in SCORES.items() if score.signed)
# Of the methods that keep what they need themselves.
MAGNITUDE = Score(1, "|w|", lambda p: p.magnitude, "linear", needs_moments=False)
FORMULAS = {
    "movement": (1, "-Σ w · ∂L/∂w over the updates so far (Sanh et al. 2020), of clipped gradients"),
    "movement_original": (1, "w · (w - w at the start)"),
}


def definition(method: str, score: str) -> tuple[str, int, str]:
    """(name, version, formula) of what a pruning method ranks by; score: of the method state."""
    if method in FORMULAS:
        return (method, *FORMULAS[method])
    found = SCORES[score] if method == "state" else MAGNITUDE
    return (score if method == "state" else method, found.version, found.formula)
