"""Which wrong replies a run on dialogues really trained on, where each epoch is to have its own.

Looked at where batches are used, so that a drawing that was never done, or is the same in every epoch, is found out
whatever the settings say. It must not draw: engine/data/redraw.py does.
"""

import numpy as np
import torch

from engine import parallel
from engine.ledger import Line

ROWS = 8  # of each batch whose candidates are compared with those of the epoch before
CHANCE = 0.9  # share of rows that must have other candidates; a few may be drawn again
AT_ONCE = 4096  # rows


class Seen:
    """The candidates in this process's batches. Every rank makes the same calls.

    order: an engine.data.choices.ChoiceOrder where `wanted`.
    """

    def __init__(self, order, wanted: bool):
        self.order, self.wanted = order, wanted
        self.looked_at = self.others = 0  # rows, and those of them with other candidates than before
        if wanted:
            self._words = np.random.Philox(key=0).random_raw(order.reply).view(np.int64)
            _, rows = np.unique(order.examples.replies, return_index=True)
            self._pool = np.unique(self._true(rows))
            self._found = np.zeros(len(self._pool), dtype=np.int64)  # 1: was a wrong reply

    def add(self, sample_ids: np.ndarray, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Inputs and targets as `Choices.gather` has them, of the samples `sample_ids` of shape (B,)."""
        if not self.wanted:
            return
        marks = self._marks(inputs)
        wrong = marks[np.arange(marks.shape[1]) != targets[:, :1]]
        place = np.searchsorted(self._pool, wrong).clip(max=len(self._pool) - 1)
        self._found[place[self._pool[place] == wrong]] = 1
        before = self._before(sample_ids[:ROWS])
        self.looked_at += len(before)
        self.others += int((before != marks[:ROWS]).any(1).sum())

    def lines(self, first_step: int) -> list[Line]:
        """What has been so since `first_step`, on all ranks; nothing where it is not wanted."""
        if not self.wanted:
            return []
        counts = torch.from_numpy(np.append(self._found, [self.looked_at, self.others]))
        *found, looked_at, others = parallel.total(counts).tolist()
        different = sum(count > 0 for count in found)
        return [
            Line(
                "redraw_candidates",
                "true",
                f"other candidates in {others:,} of {looked_at:,} rows",
                f"{ROWS} rows of each batch since step {first_step} against the epoch before, in the first epoch "
                f"against the token files; {different:,} different wrong replies trained on, of {len(found):,}",
                others >= CHANCE * looked_at,
            )
        ]

    def _before(self, sample_ids: np.ndarray) -> np.ndarray:
        """The marks of what these rows had in the epoch before, in the first epoch of what the token files have."""
        order, n = self.order, self.order.samples_per_epoch
        inputs, _ = order.examples.gather(sample_ids % n, order.context, order.reply)
        later = sample_ids >= n
        if later.any():
            inputs[later] = order.batch(sample_ids[later] - n)[0]
        return self._marks(inputs)

    def _true(self, rows: np.ndarray) -> np.ndarray:
        """The marks of these rows' true replies, shape (rows,)."""
        order, found = self.order, []
        for some in np.array_split(rows, -(-len(rows) // AT_ONCE)):
            inputs, targets = order.examples.gather(some, order.context, order.reply)
            found.append(np.take_along_axis(self._marks(inputs), targets[:, :1], 1)[:, 0])
        return np.concatenate(found)

    def _marks(self, inputs: np.ndarray) -> np.ndarray:
        """A number for each candidate in `inputs`, the same for the same tokens; int64 of shape (B, candidates)."""
        lines = inputs[:, 0, -self.order.examples.candidates :]
        return (lines * self._words).sum(-1)
