"""How much is pruned when: pure functions of the number of updates, in exact fractions. No torch, no state.

The share of pruned weights rises from 0 after `pruning_start` updates to `sparsity` after `steps - pruning_hold`, and
stays there. Weights are ranked again every `pruning_interval` updates on the way, and at its end.

    linear p      cubic_late p³: slow at first      cubic_early 1 - (1 - p)³: slow at last (Zhu and Gupta 2017)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

RAMPS = {
    "linear": lambda p: p,
    "cubic_late": lambda p: p**3,
    "cubic_early": lambda p: 1 - (1 - p) ** 3,
}
MOST_OF_A_LAYER = Fraction(95, 100)  # that layer_ramp prunes


@dataclass(frozen=True)
class Ramp:
    """The ramp of one run."""

    shape: str
    sparsity: Fraction  # at its end
    start: int  # updates after which it begins
    end: int
    interval: int

    @classmethod
    def of(cls, settings, steps: int) -> "Ramp":
        """settings: an engine.config.Pruning."""
        end = steps - settings.pruning_hold
        sparsity = Fraction(repr(settings.sparsity))  # as it was written
        return cls(settings.pruning_ramp, sparsity, settings.pruning_start, end, settings.pruning_interval)

    def target(self, updates: int) -> Fraction:
        """The share that should be pruned after so many updates."""
        p = Fraction(min(max(updates - self.start, 0), self.end - self.start), self.end - self.start)
        return self.sparsity * RAMPS[self.shape](p)

    def is_due(self, updates: int) -> bool:
        """Whether weights are ranked after so many updates."""
        if not self.start < updates <= self.end:
            return False
        return (updates - self.start) % self.interval == 0 or updates == self.end

    @property
    def first(self) -> int:
        """The updates after which they are ranked for the first time."""
        return min(self.start + self.interval, self.end)

    def newest(self, updates: int) -> int:
        """The updates after which they were ranked last; 0 if they were not yet."""
        if updates >= self.end:
            return self.end
        ranked = updates - (updates - self.start) % self.interval
        return ranked if ranked > self.start else 0


def pruned_counts(share: Fraction, sizes: Sequence[int], threshold: str) -> list[int]:
    """How many elements of a model's prunable tensors, of these sizes, are pruned: [of all], or of each.

    threshold: of engine.pruning.THRESHOLDS. layer_ramp prunes 0.7 × the share of the first tensor and 1.3 × that of
    the last, but never more than 0.95: so of all together it is not the share.
    """
    if threshold == "global":
        return [int(share * sum(sizes))]
    if threshold == "layer":
        return [int(share * size) for size in sizes]
    last = max(len(sizes) - 1, 1)
    factors = [Fraction(7, 10) + Fraction(6, 10) * i / last for i in range(len(sizes))]
    return [int(min(MOST_OF_A_LAYER, share * f) * size) for f, size in zip(factors, sizes, strict=True)]
