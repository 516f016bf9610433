"""Dialogues of two speakers, and which of them are for training, validation and test: no persona is in two splits.

Rows are made of them in engine/data/dialogue_rows.py, and tokens of rows in engine/data/dialogue_tokens.py. It must
not choose candidates, nor know a tokenizer.
"""

import hashlib
import importlib
import math
import re
from dataclasses import dataclass, field

from engine.data import DIALOGUES
from engine.errors import ConfigError

SPLITS = ("train", "validation", "test")
NOT_WORDS = re.compile(r"[^\w]+")


@dataclass(frozen=True)
class Dialogue:
    """turns: the first speaker's first; every second one is a reply of the speaker whose `persona` it is.

    candidates: for each reply wrong ones, or nothing.
    """

    persona: tuple[str, ...]
    turns: tuple[str, ...]
    candidates: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Source:
    """What a data set's `load(settings)` gives; validation is None where it is to be held out."""

    train: list[Dialogue]
    test: list[Dialogue]
    validation: list[Dialogue] | None = None
    of_rows: dict[str, int] = field(
        default_factory=dict
    )  # replies of the published splits, where they are known


@dataclass(frozen=True)
class Splits:
    source: Source
    dialogues: dict[str, list[Dialogue]]
    dropped: dict[str, int]

    def training_text(self) -> str:
        """What a tokenizer's vocabulary is made from."""
        return "\n".join(text for one in self.dialogues["train"] for text in (*one.persona, *one.turns))


def replies(dialogues: list[Dialogue]) -> int:
    return sum(len(one.turns) // 2 for one in dialogues)


def version(dataset: str) -> int:
    """Of what is made of a data set's files: tokens of another one are other tokens."""
    return importlib.import_module(DIALOGUES[dataset]).VERSION


def load(settings) -> Splits:
    """The dialogues of settings.dataset. Raises ConfigError for missing or wrong data, and where nothing is left."""
    source = importlib.import_module(DIALOGUES[settings.dataset]).load(settings)
    try:
        return split(source, settings)
    except ConfigError as error:
        raise ConfigError(error.problems, f"dataset={settings.dataset}") from None


def plain(text: str) -> str:
    """What two texts have in common that differ in case, punctuation and white space only."""
    return NOT_WORDS.sub(" ", text.lower()).strip()


def persona_key(one: Dialogue) -> bytes:
    """What two dialogues have in common whose personas have the same sentences; 32 bytes."""
    return hashlib.sha256("\n".join(sorted(map(plain, one.persona))).encode()).digest()


def split(source: Source, settings) -> Splits:
    """Hold out what is to be held out, by persona, and drop what would be in two splits or is there twice."""
    dropped = dict.fromkeys(
        (
            "of a persona in the test set",
            "of a persona in the validation set",
            "repeated",
            "not among max_train_rows",
        ),
        0,
    )
    held = {persona_key(one) for one in source.test}
    train, validation = source.train, source.validation

    def without(dialogues: list[Dialogue], personas: set[bytes], why: str) -> list[Dialogue]:
        left = [one for one in dialogues if persona_key(one) not in personas]
        dropped[why] += replies(dialogues) - replies(left)
        return left

    train = without(train, held, "of a persona in the test set")
    if validation is None:
        share = settings.validation_percent / 100
        ranked = sorted({persona_key(one) for one in train})
        chosen = set(ranked[: math.ceil(share * len(ranked))])
        validation = [one for one in train if persona_key(one) in chosen]
        train = [one for one in train if persona_key(one) not in chosen]
    else:
        dropped["of the validation set, of a persona in the test set"] = 0
        validation = without(validation, held, "of the validation set, of a persona in the test set")
        train = without(train, {persona_key(one) for one in validation}, "of a persona in the validation set")
    once = list(dict.fromkeys(train))
    dropped["repeated"] = replies(train) - replies(once)
    found = {"train": once, "validation": validation, "test": source.test}
    if empty := [name for name, dialogues in found.items() if not dialogues]:
        raise ConfigError(f"no dialogues are left for {' and '.join(empty)}")
    return Splits(source, found, dropped)
