"""Wrong replies of training rows that are drawn anew in each epoch; engine/redrawn.py proves that they were.

With the same few wrong replies in every epoch a model can learn by heart which ones are wrong. What is drawn follows
from (seed, epoch, row) alone, so that steps, ranks and restarts change nothing. It must not touch validation or test.
It imports no torch.
"""

import numpy as np

from engine.data.draws import Words
from engine.errors import ConfigError


class Redraw:
    """Candidates for the rows of `examples`, an engine.data.choices.Choices of a training split.

    Wrong replies are true ones of other dialogues: each says something else than the others, than the row's own reply
    and than every reply of the row's dialogue.
    """

    def __init__(self, examples, seed: int):
        """Raises ConfigError if the dialogues have too few different replies for some row."""
        self.examples, self.seed = examples, seed
        _, self.pool = np.unique(examples.replies, return_index=True)  # a row of each different reply
        self._own: dict[int, set[int]] = {}
        for dialogue, said in zip(examples.dialogues.tolist(), examples.replies.tolist(), strict=True):
            self._own.setdefault(dialogue, set()).add(said)
        left = len(self.pool) - max(map(len, self._own.values()))
        if left < examples.candidates - 1:
            raise ConfigError(
                f"redraw_candidates = true: beside a dialogue's own there are {left} different replies in the "
                f"training split, and candidates = {examples.candidates} needs {examples.candidates - 1}"
            )

    def draw(self, rows: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For `rows` (B,) in their `epochs` (B,): whose true replies are shown, as row numbers (B, candidates), and
        which of them is the row's own (B,)."""
        shown = np.empty((len(rows), self.examples.candidates), dtype=np.int64)
        gold = np.empty(len(rows), dtype=np.int64)
        for place, (row, epoch) in enumerate(zip(rows.tolist(), epochs.tolist(), strict=True)):
            words = Words(f"{self.seed}\n{epoch}\n{row}")
            gold[place] = words.below(shown.shape[1])
            shown[place] = np.insert(self._wrong(words, row), gold[place], row)
        return shown, gold

    def _wrong(self, words: Words, row: int) -> list[int]:
        """Rows whose true replies are wrong ones for `row`."""
        seen = set(self._own[int(self.examples.dialogues[row])])
        found: list[int] = []
        while len(found) < self.examples.candidates - 1:
            other = int(self.pool[words.below(len(self.pool))])
            if (said := int(self.examples.replies[other])) not in seen:
                seen.add(said)
                found.append(other)
        return found
