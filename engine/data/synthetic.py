"""Made-up rows: seeded words in four classes, for tests and for machines without a network.

Each class prefers some words; a row mixes words of its class with words of any, so that some rows cannot be
told: counting words (naive Bayes) gets 92 % right.
Licence: made here, free of any. It must be the same in every Python and NumPy, so it draws raw words only.
"""

import numpy as np

from engine.data.labelled import Row, Source

NAME = "synthetic rows"
VERSION = 1  # of the rows below; tokens of another one are refused
CLASSES = ["north", "east", "south", "west"]
ROWS, WORDS, SEED = 12_000, 2_000, 1
SHORTEST, LONGEST = 8, 60  # words of a row
OWN = 0.3  # share of a row's words that are drawn from its class's own frequencies
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def load(settings) -> Source:
    """The same 12,000 rows for everybody; validation and test rows are held out of them."""
    return Source(CLASSES, rows(ROWS))


def rows(count: int) -> list[Row]:
    """The first `count` rows: row i is of class i mod 4."""
    spelled = [
        SYLLABLES[i // len(SYLLABLES) % len(SYLLABLES)] + SYLLABLES[i % len(SYLLABLES)] for i in range(WORDS)
    ]
    uniform = _uniform(count * (1 + 2 * LONGEST)).reshape(count, 1 + 2 * LONGEST)
    # Zipf's law: word w has a share like 1 / (w + 10); each class has its own order of the words.
    shares = np.cumsum(1 / (np.arange(WORDS) + 10.0))
    shares /= shares[-1]
    orders = [np.argsort(_uniform(WORDS, 1 + c), kind="stable") for c in range(len(CLASSES))]
    made = []
    for i in range(count):
        label = i % len(CLASSES)
        length = SHORTEST + int(uniform[i, 0] * (LONGEST - SHORTEST + 1))
        ranks = np.searchsorted(shares, uniform[i, 1 : 1 + length], side="right")
        own = uniform[i, 1 + LONGEST : 1 + LONGEST + length] < OWN
        words = np.where(own, orders[label][ranks], ranks)
        made.append((" ".join(spelled[w] for w in words.tolist()), label))
    return made


def _uniform(count: int, stream: int = 0) -> np.ndarray:
    """Numbers in [0, 1), shape (count,), of one of the seed's streams."""
    return (np.random.Philox(key=[SEED, stream]).random_raw(count) >> np.uint64(11)) * 2.0**-53
