"""Curriculum: the first steps draw from the easiest samples, and from more of them step by step.

A sample is easy if its tokens are common: its rarity is the mean of -log p over its tokens, where p is a token's
share of the training text (Platanios et al., 2019, whose competence here grows linearly). The samples of a step
follow from (seed, step) alone, as without a curriculum.
"""

import math

import numpy as np

from engine.config import Training
from engine.data.batches import TrainOrder
from engine.errors import ConfigError
from engine.ledger import Line


def surprisal(tokens: np.ndarray) -> np.ndarray:
    """-log of each token's share of `tokens`, by id, in nats, shape (largest id + 1,); 0 for an absent id."""
    counts = np.bincount(tokens)
    return np.where(counts > 0, -np.log(np.maximum(counts, 1) / len(tokens)), 0.0)


def share(settings: Training, step: int) -> float:
    """The share of the samples, the easiest, that `step` draws from; 1 from curriculum_steps on."""
    if settings.curriculum == "none" or step >= settings.curriculum_steps:
        return 1.0
    start = settings.curriculum_start
    return start + (1 - start) * step / settings.curriculum_steps


class CurriculumOrder(TrainOrder):
    """TrainOrder whose first steps draw, without replacement within a step, from the easiest windows.

    The windows are those of the epoch that the plain order would be in at the step. From curriculum_steps on it is
    the plain order. While it draws from few windows, some come often: `dataset` in the ledger counts tokens consumed.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch_size: int, seed: int, settings: Training):
        super().__init__(tokens, context, batch_size, seed)
        self.settings = settings
        easiest = self.allowed(0)
        if easiest < batch_size:
            raise ConfigError(
                f"curriculum_start = {settings.curriculum_start}: {easiest} of {self.samples_per_epoch} samples, "
                f"fewer than the {batch_size} of a step; at least {batch_size / self.samples_per_epoch:.3g} is needed"
            )
        self._sums = np.concatenate([[0.0], np.cumsum(surprisal(tokens)[tokens])])
        self._ranked: tuple[int, np.ndarray] | None = None  # the newest epoch, its windows in order

    def allowed(self, step: int) -> int:
        """How many windows, the easiest, `step` draws from."""
        return math.ceil(share(self.settings, step) * self.samples_per_epoch)

    def rarity(self, starts: np.ndarray) -> np.ndarray:
        """The mean surprisal of the inputs of the windows at `starts`, in nats, same shape."""
        return (self._sums[starts + self.context] - self._sums[starts]) / self.context

    def easiest_first(self, epoch: int) -> np.ndarray:
        """The windows of an epoch, by their rarity, shape (samples_per_epoch,)."""
        ranked = self._ranked
        if ranked is None or ranked[0] != epoch:
            starts = self.epoch(epoch)[0] + np.arange(self.samples_per_epoch) * self.context
            ranked = self._ranked = epoch, np.argsort(self.rarity(starts), kind="stable")
        return ranked[1]

    def sample_ids(self, step: int) -> np.ndarray:
        if step >= self.settings.curriculum_steps:
            return super().sample_ids(step)
        epoch = step * self.batch_size // self.samples_per_epoch
        easiest = self.easiest_first(epoch)[: self.allowed(step)]
        # Of another key than any epoch's words; as uint64, because a list of such numbers would become floats.
        key = np.array([self.seed, 2**63 + step], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(len(easiest))
        chosen = easiest[np.argsort(words, kind="stable")[: self.batch_size]]
        return epoch * self.samples_per_epoch + chosen


class Seen:
    """How rare the samples were that were really trained on, against what each step may draw from."""

    def __init__(self, order: TrainOrder, settings: Training):
        self.order, self.settings = order, settings
        self.steps = self.within = (
            0  # of the curriculum: seen here, and of these with no sample that is too rare
        )
        self.surprisal = surprisal(order.tokens) if settings.curriculum != "none" else None
        self._limits: dict[tuple[int, int], float] = {}

    def add(self, step: int, inputs: np.ndarray) -> None:
        """Note the inputs (b, T) of `step` that this rank trains on."""
        if self.surprisal is None or step >= self.settings.curriculum_steps:
            return
        self.steps += 1
        self.within += bool(self.surprisal[inputs].mean(1).max() <= self._limit(step) + 1e-9)

    def _limit(self, step: int) -> float:
        """The rarity of the hardest sample that `step` may have, worked out apart from the order's own ranking."""
        order = self.order
        epoch = step * order.batch_size // order.samples_per_epoch
        offset = order.epoch(epoch)[0]
        windows = order.tokens[offset : offset + order.samples_per_epoch * order.context]
        rarities = self._rarities(epoch, windows)
        return rarities[math.ceil(share(self.settings, step) * order.samples_per_epoch) - 1]

    def _rarities(self, epoch: int, tokens: np.ndarray) -> np.ndarray:
        """Of all windows of an epoch, the least first."""
        if epoch not in self._limits:
            self._limits = {epoch: np.sort(self.surprisal[tokens].reshape(-1, self.order.context).mean(1))}
        return self._limits[epoch]

    def lines(self) -> list[Line]:
        """Whether the steps of the curriculum had the easy samples that they should; nothing where none is asked."""
        if not self.steps:
            return []
        s = self.settings
        return [
            Line(
                "curriculum",
                f"{s.curriculum}: from {s.curriculum_start:.0%} of the samples to all at step {s.curriculum_steps}",
                f"{self.within} of {self.steps} steps had only samples that were easy enough",
                "mean surprisal of each trained sample's own tokens, against that of all samples of its epoch",
                self.within == self.steps,
            )
        ]
