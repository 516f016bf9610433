"""Weight averaging: an exponential moving average of the weights, which evaluations and the final model have.

After update n the average is average + (1 - d) (weights - average), with d = min(average_decay, n / (n + 9)), so that
the first updates do not weigh as much as the random initial weights would have them. Training itself never sees it.
It costs one more copy of the weights, sharded as they are.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn as nn

from engine.ledger import Line
from engine.split import local

WARM_UP = 9  # updates


def decay_at(update: int, decay: float) -> float:
    """d of the `update`-th update, the first being 1."""
    return min(decay, update / (update + WARM_UP))


class Average:
    """The average of a model's weights; one of decay 0 is none, and its calls do nothing."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._weights = [local(p.detach()) for p in model.parameters()] if decay else []
        self.held = [w.clone() for w in self._weights]  # the average
        self.updates = self.used = 0  # used: evaluations, samples and saves that had the average in effect

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are after a step into account."""
        if not self.decay:
            return
        self.updates += 1
        torch._foreach_lerp_(self.held, self._weights, 1 - decay_at(self.updates, self.decay))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average inside, and its own weights again after."""
        if not self.decay:
            yield
            return
        self.used += 1
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """One weight at a time, so that there is no third copy of all; in their memory, which CUDA graphs know."""
        for weight, average in zip(self._weights, self.held, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict:
        return {"held": self.held, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        for mine, saved in zip(self.held, state["held"], strict=True):
            mine.copy_(saved)
        self.updates = state["updates"]

    def lines(self, wanted: float, steps: int, evaluations: int) -> list[Line]:
        """Whether all steps were averaged and evaluations had the average; nothing where none is asked or made."""
        if not wanted and not self.decay:
            return []
        apart = sum(
            (a - w).double().square().sum().item() for a, w in zip(self.held, self._weights, strict=True)
        )
        size = sum(w.double().square().sum().item() for w in self._weights)
        return [
            Line(
                "average_decay",
                f"{wanted:g}",
                f"{self.decay:g}, {self.updates} updates, in effect for {self.used} evaluations",
                f"counted at {steps} steps and {evaluations} evaluations; the average is "
                f"{(apart / size) ** 0.5 if size else 0:.1e} of the weights' norm from them",
                self.decay == wanted and self.updates == steps and self.used >= evaluations,
            )
        ]
