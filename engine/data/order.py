"""The order of training samples: a pure function of (seed, step), whatever a sample is.

So workers, restarts and the number of processes change nothing. Nothing here may keep a position, or draw from a
random state that outlives a call. It imports no torch.
"""

from abc import ABC, abstractmethod

import numpy as np


def windows(tokens: int, context: int) -> int:
    """How many windows of `context` + 1 of so many tokens an epoch has, whatever its offset.

    As many as fit behind the largest offset, and at least one; 0 where there are too few tokens for one.
    """
    return max(1, (tokens - context) // context) if tokens > context else 0


class Order(ABC):
    """Samples drawn without replacement within an epoch; every epoch has the same number of them.

    So the epoch of a sample follows from its number alone; a step may span two epochs, or more.
    """

    def __init__(self, samples_per_epoch: int, context: int, batch_size: int, seed: int):
        """`batch_size` counts the samples of a step over all ranks; `context` is in tokens."""
        self.samples_per_epoch, self.context = samples_per_epoch, context
        self.batch_size, self.seed = batch_size, seed
        self._drawn: dict[int, tuple[int, np.ndarray]] = {}

    @abstractmethod
    def batch(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs, int64 of shape (B, context), and targets, int64, of the samples `sample_ids` of shape (B,)."""

    def draw(self, epoch: int) -> tuple[int, np.ndarray]:
        """A random word of 64 bits, and the order of an epoch's samples, a permutation of (samples_per_epoch,).

        Only the counter-based generator's raw words are used: NumPy promises them to be the same in every
        version, which it does not for `Generator.permutation`.
        """
        drawn = self._drawn.get(epoch)
        if drawn is None:
            words = np.random.Philox(key=[self.seed, epoch]).random_raw(1 + self.samples_per_epoch)
            drawn = int(words[0]), np.argsort(words[1:], kind="stable")
            # Consecutive steps need two epochs at most. A new dictionary, because a prefetching thread
            # reads too.
            self._drawn = {k: v for k, v in self._drawn.items() if k == epoch - 1} | {epoch: drawn}
        return drawn

    def sample_ids(self, step: int) -> np.ndarray:
        """The ids of the samples of `step`, shape (batch_size,): epoch * samples_per_epoch + place in the epoch."""
        numbers = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        ids = np.empty_like(numbers)
        epochs = numbers // self.samples_per_epoch
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            first = epoch * self.samples_per_epoch
            ids[chosen] = first + self.draw(epoch)[1][numbers[chosen] - first]
        return ids

    def rank_slice(self, step: int, rank: int, world: int) -> np.ndarray:
        """The part of `sample_ids(step)` that `rank` of `world` trains on, shape (batch_size / world,)."""
        assert self.batch_size % world == 0, (self.batch_size, world)
        size = self.batch_size // world
        return self.sample_ids(step)[rank * size : (rank + 1) * size]
