"""IMDb's film reviews as if two people said them in turn: to learn choosing from, before there are dialogues.

A review's first sentences stand for a persona, and those that follow for turns; written as PERSONA-CHAT is, in lower
case with spaces around punctuation. A long sentence is cut at a comma. The true reply is the sentence that follows;
wrong ones are of other reviews, so that it is told by what a review is about. The reviews are those of imdb_text;
source and licence: engine/data/imdb.py. Accuracy on it says nothing of conversation.
"""

import hashlib
import re

from engine.data import imdb_text
from engine.data.dialogues import Dialogue, Source
from engine.data.imdb import cleaned

NAME = "IMDb reviews in turns"
VERSION = 1  # of what is made of the files; tokens of another one are refused
PERSONA, TURNS = 4, 12  # sentences of a review that are used
WORDS = range(4, 19)  # of a sentence, punctuation with them
LETTERS = 15  # of a word; longer ones are left out
SHORT_WORDS, SHORT_LETTERS = 14, 9  # at most, in the reviews that are held out: none of their replies is long
HELD_OUT = 250  # reviews for validation, and as many for the test
END = re.compile(r"(?<=[.!?])\s+")
MARKS = re.compile(r"([.,!?;:()\"])")
OTHER = re.compile(r"[^\x20-\x7e]")
BREAKS = (",", ";", "and", "but")


def load(settings) -> Source:
    """Dialogues of the reviews in settings.data_dir or, when that is empty, by name.

    Raises ConfigError when they are missing, cannot be fetched, or are not the known ones.
    """
    parts = imdb_text.reviews(settings.data_dir).values()
    dialogues = [one for part in parts for text in part if (one := dialogue(cleaned(text)))]
    short = sorted(filter(is_short, dict.fromkeys(dialogues)), key=_key)
    validation, test = short[:HELD_OUT], short[HELD_OUT : 2 * HELD_OUT]
    held = {*validation, *test}
    return Source(train=[one for one in dialogues if one not in held], validation=validation, test=test)


def dialogue(review: str) -> Dialogue | None:
    """The review in turns; None if it is too short for one."""
    said = sentences(review)[: PERSONA + TURNS]
    return Dialogue(tuple(said[:PERSONA]), tuple(said[PERSONA:])) if len(said) >= PERSONA + 2 else None


def sentences(review: str) -> list[str]:
    """Its sentences, without those that have few words; long ones in parts."""
    found = []
    for sentence in END.split(review):
        words = MARKS.sub(r" \1 ", OTHER.sub(" ", sentence.lower())).split()
        words = [word for word in words if len(word) <= LETTERS]
        while len(words) > WORDS[-1]:
            last = next((n for n in range(WORDS[-1], WORDS[0], -1) if words[n - 1] in BREAKS), WORDS[-1])
            found.append(" ".join(words[:last]))
            words = words[last:]
        if len(words) >= WORDS[0]:
            found.append(" ".join(words))
    return found


def is_short(one: Dialogue) -> bool:
    """Whether none of its replies can be many tokens."""
    words = [text.split() for text in one.turns[1::2]]
    return all(len(w) <= SHORT_WORDS and max(map(len, w)) <= SHORT_LETTERS for w in words)


def _key(one: Dialogue) -> bytes:
    return hashlib.sha256("\n".join(one.persona).encode()).digest()
