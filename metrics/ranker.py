"""A ranker that only counts words, by how rare they are: what a model that chooses replies must beat.

A text is a vector with a weight for each of its words, how often it is there times log(documents / documents with it)
(Spärck Jones 1972). Of several candidates the one nearest to the context by cosine is chosen. A word that no document
has is as rare as one that a single document has. Must not read or write files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

WORD = re.compile(r"\w+(?:'\w+)*")


class Ranker:
    """Weights of words, from `documents`, an iterable of texts.

    Raises:
        ValueError: there is no document.
    """

    def __init__(self, documents: Iterable[str]):
        counts: Counter[str] = Counter()
        self.documents = 0
        for text in documents:
            counts.update(set(words(text)))
            self.documents += 1
        if not self.documents:
            raise ValueError("a ranker needs at least one document")
        self._rarity = {word: math.log(self.documents / count) for word, count in counts.items()}
        self._unseen = math.log(self.documents)

    def vector(self, text: str) -> dict[str, float]:
        """word -> weight, of length 1 in all, or 0 where no word of the text says anything."""
        weights = {
            word: count * self._rarity.get(word, self._unseen) for word, count in Counter(words(text)).items()
        }
        length = math.sqrt(sum(weight * weight for weight in weights.values()))
        return {word: weight / length for word, weight in weights.items()} if length else {}

    def scores(self, context: str, candidates: Sequence[str]) -> list[float]:
        """The cosine of each candidate to the context."""
        query = self.vector(context)
        return [
            sum(weight * query.get(word, 0.0) for word, weight in self.vector(candidate).items())
            for candidate in candidates
        ]


def words(text: str) -> list[str]:
    """The words of a text in small letters."""
    return WORD.findall(text.lower())


def credit(scores: Sequence[float], gold: int) -> float:
    """1 where `gold` alone has the highest score, 1 / n where it shares it with n - 1 others, else 0.

    What choosing among equals by chance would earn: where no word is shared all are equal, and their order must not
    decide.
    """
    best = max(scores)
    return 1 / sum(score == best for score in scores) if scores[gold] == best else 0.0
