"""Labelled rows in memory maps: which of them a training step takes, and which an evaluation scores.

Rows are cut at `context` tokens and padded with id 0 here, and nowhere else. It imports no torch.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.data.order import Order
from engine.errors import ConfigError

PADDING = 0  # token id; no row holds it
IGNORED = -100  # target that no loss counts; torch's cross_entropy skips it by default


@dataclass(frozen=True)
class Examples:
    """The rows of one split; `len()` is their number.

    tokens: ids of all rows one after another, an unsigned type of shape (tokens,). ends: where each row ends in it,
    int64 of shape (rows,). labels: the number of each row's class, int32 of shape (rows,).
    """

    tokens: np.ndarray
    ends: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def row(self, number: int) -> np.ndarray:
        """All token ids of one row, neither cut nor padded, shape (tokens of the row,)."""
        return self.tokens[self.ends[number - 1] if number else 0 : self.ends[number]]

    def lengths(self) -> np.ndarray:
        """Tokens of each row, before it is cut, int64 of shape (rows,)."""
        return np.diff(self.ends, prepend=0)

    def gather(self, rows: np.ndarray, context: int, trim_to: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Inputs, int64 of shape (B, T), and labels, int64 of shape (B,), of the rows numbered in (B,).

        T is `context`, or with trim_to the tokens of the longest of these rows, rounded up to a multiple of it.
        """
        begin = np.where(rows > 0, self.ends[np.maximum(rows - 1, 0)], 0)[:, None]
        if trim_to:
            longest = int((self.ends[rows] - begin[:, 0]).max())
            context = min(context, -(-longest // trim_to) * trim_to)
        position = begin + np.arange(context)  # (B, T)
        inside = position < self.ends[rows][:, None]
        inputs = np.where(inside, self.tokens[np.minimum(position, len(self.tokens) - 1)], PADDING)
        return inputs.astype(np.int64), self.labels[rows].astype(np.int64)

    def sha256(self) -> str:
        """sha256, in hex, of tokens, ends and labels together, whatever integer types hold them."""
        digest = hashlib.sha256(f"{len(self.tokens)} {len(self)}".encode())
        for array, kind in ((self.tokens, "<u4"), (self.ends, "<i8"), (self.labels, "<i4")):
            digest.update(np.ascontiguousarray(array, dtype=kind))
        return digest.hexdigest()


class ExampleOrder(Order):
    """Training rows; an epoch takes every row once. A sample's id is epoch * rows + row."""

    def __init__(self, examples: Examples, context: int, batch_size: int, seed: int, trim_to: int = 0):
        """`batch_size` counts the rows of a step over all ranks; rows are cut at `context` tokens and padded.

        They are padded to `context`; with trim_to, to the longest row of the batch (see Examples.gather).

        Raises ConfigError if there is no row.
        """
        if not len(examples):
            raise ConfigError("the training split has no rows")
        super().__init__(len(examples), context, batch_size, seed)
        self.examples, self.trim_to = examples, trim_to

    def batch(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs, int64 of shape (B, T), padded with 0, and the rows' labels, int64 of shape (B,)."""
        return self.examples.gather(sample_ids % self.samples_per_epoch, self.context, self.trim_to)


def eval_batches(
    examples: Examples, context: int, batch_size: int, rank: int = 0, world: int = 1, trim_to: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs, int64 of shape (batch_size, T), and labels, int64 of shape (batch_size,), of one rank's part.

    Every row is in one batch of one rank. Every rank gets the same number of batches of the same shape, so
    collectives line up; what fills the last ones is padding with the target -100.
    """
    for first in range(0, len(examples), batch_size * world):
        mine = np.arange(batch_size) + first + rank * batch_size  # (B,) row numbers, some beyond the last
        there = mine < len(examples)
        inputs, labels = examples.gather(np.where(there, mine, 0), context, trim_to)
        yield np.where(there[:, None], inputs, PADDING), np.where(there, labels, IGNORED)
