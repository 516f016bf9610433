"""The TF-IDF ranker, by hand: four documents, of which one word is in two."""

import math

import pytest

from metrics.ranker import Ranker, credit, words

DOCUMENTS = ["I like cats.", "i like, like dogs", "They ride horses", "don't run"]
RARE, TWICE = math.log(4), math.log(2)  # of a word in one document of four, and in two


@pytest.fixture
def ranker():
    return Ranker(DOCUMENTS)


def test_words_are_letters_and_digits_in_small_letters():
    assert words("I don't, 42  DO-it!") == ["i", "don't", "42", "do", "it"]


def test_weights_by_hand(ranker):
    length = math.sqrt((2 * TWICE) ** 2 + RARE**2 + RARE**2)  # like twice, cats and the unknown word once
    assert ranker.vector("like cats like zebras") == pytest.approx(
        {"like": 2 * TWICE / length, "cats": RARE / length, "zebras": RARE / length}
    )
    assert ranker.vector("") == ranker.vector("!?") == {}


def test_scores_are_cosines(ranker):
    found = ranker.scores("like cats", ["cats", "like cats", "horses", ""])
    length = math.sqrt(TWICE**2 + RARE**2)
    assert found == pytest.approx([RARE / length, 1.0, 0.0, 0.0])


def test_a_word_that_every_document_has_says_nothing():
    assert Ranker(["a cat", "a dog"]).vector("a") == {}


def test_equals_share_what_a_choice_by_chance_would_earn():
    assert credit([0.1, 0.9, 0.3], 1) == 1
    assert credit([0.1, 0.9, 0.3], 2) == 0
    assert credit([0.9, 0.9, 0.3], 1) == 1 / 2
    assert credit([0.0] * 8, 7) == credit([0.0] * 8, 0) == 1 / 8


def test_nothing_to_count_words_in_is_refused():
    with pytest.raises(ValueError, match="at least one document"):
        Ranker([])
