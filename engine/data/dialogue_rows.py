"""Dialogues to rows: each reply with what was said before it, and wrong replies to choose from beside it.

Wrong replies that the data set does not have are drawn from other dialogues of the same split, by a hash of the row:
neither the order of a file nor another row moves them. It must not know a tokenizer.
"""

import hashlib
from dataclasses import dataclass

from engine.data.dialogues import Dialogue, plain
from engine.data.draws import Words
from engine.errors import ConfigError

DRAW = "1"  # of wrong replies and of where the true one stands; another one draws others
TRIES = 1000  # draws for one wrong reply


@dataclass(frozen=True)
class Row:
    """One reply that is to be chosen and foretold; candidates: the true one is at `gold`."""

    persona: tuple[str, ...]
    turns: tuple[str, ...]  # before the reply: the last is what is replied to
    candidates: tuple[str, ...]
    gold: int
    dialogue: bytes  # that it is of, the same for all its rows


def rows(dialogues: list[Dialogue], count: int, longest: int = 0, length_of=len) -> list[Row]:
    """A row of each reply, with `count` candidates.

    longest: no wrong reply is drawn that has more than so many by length_of; 0: any may be.
    Raises ConfigError if there are too few different replies, in the data set's own candidates or to draw from.
    """
    pool = sorted({one.turns[i] for one in dialogues for i in range(1, len(one.turns), 2)})
    if longest:
        pool = [text for text in pool if length_of(text) <= longest]
    return [row for one in dialogues for row in _rows_of(one, count, pool)]


def _rows_of(one: Dialogue, count: int, pool: list[str]) -> list[Row]:
    own, found = {plain(text) for text in one.turns}, []
    dialogue = hashlib.sha256(f"{one.persona}\n{one.turns}".encode()).digest()
    for place in range(len(one.turns) // 2):
        before, true = one.turns[: 2 * place + 1], one.turns[2 * place + 1]
        words = Words(f"{DRAW}\n{one.persona}\n{before}\n{true}")
        if one.candidates:
            wrong = list(one.candidates[place][-(count - 1) :])
            if len(wrong) < count - 1:
                raise ConfigError(
                    f"candidates = {count}: a reply of the data set has {len(wrong) + 1}; set it to that at most"
                )
        else:
            wrong = _drawn(words, count - 1, pool, own, count)
        gold = words.below(count)
        found.append(Row(one.persona, before, (*wrong[:gold], true, *wrong[gold:]), gold, dialogue))
    return found


def _drawn(words: Words, number: int, pool: list[str], own: set[str], count: int) -> list[str]:
    """Different replies from `pool`, none of which is said in the dialogue itself."""
    seen, found = set(own), []
    for _ in range(TRIES * number):
        if len(found) == number:
            break
        text = pool[words.below(len(pool))] if pool else ""
        if plain(text) not in seen:
            seen.add(plain(text))
            found.append(text)
    if len(found) < number:
        raise ConfigError(
            f"candidates = {count}: there are too few different replies in a split of {len(pool)}; set it lower"
        )
    return found
