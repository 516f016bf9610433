"""Rows of a context and the replies to choose from, in memory maps: which of them a step takes, an evaluation scores.

Padding is made here, and nowhere else. It imports no torch.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.data.examples import IGNORED
from engine.data.order import Order
from engine.data.redraw import Redraw
from engine.errors import ConfigError


def lines_of(context: int, reply: int) -> int:
    """Lines of `reply` tokens that hold `context` tokens."""
    return -(-context // reply)


@dataclass(frozen=True)
class Choices:
    """The rows of one split; `len()` is their number, each has a context and then its candidates.

    tokens: ids of all, one after another, an unsigned type of shape (tokens,). types: of each token, the same.
    ends: where each context and each candidate ends in them, int64 of shape (rows × (1 + candidates),). labels: which
    candidate is the true one, int32 of shape (rows,). dialogues, replies: a number for the dialogue that a row is of,
    and for what its true reply says, whatever its case and punctuation; the same shape. pad: the id of padding.
    """

    tokens: np.ndarray
    types: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    dialogues: np.ndarray
    replies: np.ndarray
    pad: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def candidates(self) -> int:
        """Replies to choose from, in each row."""
        return len(self.ends) // len(self.labels) - 1

    def first(self, count: int) -> "Choices":
        """The first `count` rows. Raises ConfigError if there are fewer."""
        if count > len(self):
            raise ConfigError(
                f"eval_train_rows = {count}: there are {len(self):,} training rows; set it to that at most"
            )
        ends = self.ends[: count * (1 + self.candidates)]
        of_rows = (array[:count] for array in (self.labels, self.dialogues, self.replies))
        return Choices(self.tokens[: ends[-1]], self.types[: ends[-1]], ends, *of_rows, self.pad)

    def lengths(self) -> np.ndarray:
        """Tokens of each context and candidate, int64 of shape (rows, 1 + candidates)."""
        return np.diff(self.ends, prepend=0).reshape(len(self), -1)

    def true_parts(self, rows: np.ndarray) -> np.ndarray:
        """Which of all contexts and candidates is the true reply of each row, same shape as `rows`."""
        return rows * (1 + self.candidates) + 1 + self.labels[rows]

    def gather(
        self,
        rows: np.ndarray,
        context: int,
        reply: int,
        drawn: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs, int64 of shape (B, 2, lines, reply), and targets, int64 of shape (B, 1 + reply).

        Inputs are token ids and types in lines of `reply` tokens: as many lines as hold `context` tokens, with the
        context from the first on, then a line of each candidate; all padded. Targets are which candidate is the true
        one, and for each of its tokens the one that follows, or -100 behind the last.

        drawn: of each row the candidates (B, candidates), each the true reply of a row with this number, and which of
        them is its own (B,); in place of those in the files.
        """
        parts, context = 1 + self.candidates, lines_of(context, reply) * reply
        shown = rows[:, None] * parts + np.arange(parts)  # (B, parts)
        gold = self.labels[rows].astype(np.int64)
        if drawn is not None:
            shown[:, 1:], gold = self.true_parts(drawn[0]), drawn[1]
        ends = self.ends[shown]
        begins = np.where(shown > 0, self.ends[np.maximum(shown - 1, 0)], 0)
        widths = np.array([context] + [reply] * (parts - 1))
        assert ((ends - begins) <= widths).all()
        place = np.concatenate([np.arange(width) for width in widths])  # in its part
        part = np.repeat(np.arange(parts), widths)
        position = begins[:, part] + place  # (B, context + candidates × reply)
        inside = position < ends[:, part]
        where = np.minimum(position, len(self.tokens) - 1)
        tokens, types = (
            np.where(inside, array[where].astype(np.int64), self.pad) for array in (self.tokens, self.types)
        )
        of_gold = context + gold[:, None] * reply + np.arange(1, reply)
        following = np.take_along_axis(tokens, of_gold, 1)
        real = np.take_along_axis(inside, of_gold, 1)
        targets = np.full((len(rows), 1 + reply), IGNORED, dtype=np.int64)
        targets[:, 0], targets[:, 1:reply] = gold, np.where(real, following, IGNORED)
        inputs = np.stack([tokens, types], 1)
        return inputs.reshape(len(rows), 2, -1, reply), targets

    def arrays(self) -> dict[str, np.ndarray]:
        """What is in which of a split's files, by their suffixes."""
        return {
            "": self.tokens,
            ".types": self.types,
            ".ends": self.ends,
            ".labels": self.labels,
            ".dialogues": self.dialogues,
            ".replies": self.replies,
        }

    def digests(self) -> dict[str, str]:
        """sha256, in hex, of each file."""
        names = {suffix: suffix.removeprefix(".") or "tokens" for suffix in self.arrays()}
        return {
            names[suffix]: hashlib.sha256(array.tobytes()).hexdigest()
            for suffix, array in self.arrays().items()
        }

    def sha256(self) -> str:
        """sha256, in hex, of all of them together, whatever integer types hold them."""
        digest = hashlib.sha256(f"{len(self.tokens)} {len(self)} {self.pad}".encode())
        kinds = ("<u4", "<u4", "<i8", "<i4", "<i4", "<i4")
        for array, kind in zip(self.arrays().values(), kinds, strict=True):
            digest.update(np.ascontiguousarray(array, dtype=kind))
        return digest.hexdigest()


class ChoiceOrder(Order):
    """Training rows; an epoch takes every row once. A sample's id is epoch * rows + row."""

    def __init__(
        self, examples: Choices, context: int, reply: int, batch_size: int, seed: int, redraw: bool = False
    ):
        """`batch_size` counts the rows of a step over all ranks; context, reply: as `gather` has them.

        redraw: each epoch has other wrong replies (engine/data/redraw.py), not those in the files. Raises ConfigError
        if there are too few to draw from.
        """
        if not len(examples):
            raise ConfigError("the training split has no rows")
        super().__init__(len(examples), context, batch_size, seed)
        self.examples, self.reply = examples, reply
        self.redraw = Redraw(examples, seed) if redraw else None

    def batch(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, as `Choices.gather` has them, of the rows of these ids, shape (B,)."""
        epochs, rows = np.divmod(sample_ids, self.samples_per_epoch)
        drawn = self.redraw.draw(rows, epochs) if self.redraw else None
        return self.examples.gather(rows, self.context, self.reply, drawn)


def eval_batches(
    examples: Choices, context: int, reply: int, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets, as `Choices.gather` has them, of `batch_size` rows of one rank's part.

    Every row is in one batch of one rank. Every rank gets the same number of batches of the same shape, so
    collectives line up; what fills the last ones has no targets.
    """
    for first in range(0, len(examples), batch_size * world):
        mine = np.arange(batch_size) + first + rank * batch_size  # (B,) row numbers, some beyond the last
        there = mine < len(examples)
        inputs, targets = examples.gather(np.where(there, mine, 0), context, reply)
        yield inputs, np.where(there[:, None], targets, IGNORED)
