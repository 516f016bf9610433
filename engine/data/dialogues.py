"""Dialogues to rows: what was said before a reply, and the replies to choose from, one of which was given.

    context   bos, persona, then speaker1, turn, speaker2, turn, ... to the turn that is replied to
    reply     speaker2, text, eos
    types     the speaker of each token; of bos and persona speaker2, whose they are

No persona is in two splits. Validation and test are whole, whatever tokenizer or batch: a context that is too long
loses its oldest turns there; in training the row is dropped, and counted. Wrong replies that the data set does not
have are drawn from other dialogues of the same split, by a hash of the row: neither the order of a file nor another
row moves them. It must not know a model.
"""

import hashlib
import importlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.data import DIALOGUES
from engine.data.choices import Choices
from engine.errors import ConfigError

SPLITS = ("train", "validation", "test")
SPECIALS = ("bos", "eos", "pad", "speaker1", "speaker2")  # the last ids of the vocabulary, in this order
DRAW = "1"  # of wrong replies and of where the true one stands; another one draws others
NOT_WORDS = re.compile(r"[^\w]+")
TRIES = 1000  # draws for one wrong reply


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
class Row:
    """One reply that is to be chosen and foretold; candidates: the true one is at `gold`."""

    persona: tuple[str, ...]
    turns: tuple[str, ...]  # before the reply: the last is what is replied to
    candidates: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Splits:
    source: Source
    dialogues: dict[str, list[Dialogue]]
    dropped: dict[str, int]

    def training_text(self) -> str:
        """What a tokenizer's vocabulary is made from."""
        return "\n".join(text for one in self.dialogues["train"] for text in (*one.persona, *one.turns))


def special_ids(vocabulary_size: int) -> dict[str, int]:
    """The ids of SPECIALS in a vocabulary that has them, of `vocabulary_size` ids with them."""
    return {name: vocabulary_size - len(SPECIALS) + i for i, name in enumerate(SPECIALS)}


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


# --- rows


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
        found.append(Row(one.persona, before, (*wrong[:gold], true, *wrong[gold:]), gold))
    return found


def _drawn(words: "Words", number: int, pool: list[str], own: set[str], count: int) -> list[str]:
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


class Words:
    """Random numbers that follow from a text alone, from a counter-based generator's raw words."""

    def __init__(self, text: str):
        key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype="<u8").astype(np.uint64)
        self._generator = np.random.Philox(key=key)

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1."""
        return int(self._generator.random_raw()) % limit


# --- tokens


class Encoder:
    """Rows as token ids. An utterance is encoded once, however often it stands in a history."""

    def __init__(self, tokenizer):
        self.tokenizer, self.unknown = tokenizer, 0
        self.vocabulary_size = tokenizer.vocabulary_size + len(SPECIALS)
        self.ids = special_ids(self.vocabulary_size)
        self._seen: dict[str, tuple[list[int], int]] = {}

    def text(self, text: str) -> list[int]:
        if text not in self._seen:
            ids, unknown = self.tokenizer.encode_counted(text)
            self._seen[text] = ids.tolist(), unknown
        ids, unknown = self._seen[text]
        self.unknown += unknown
        return ids

    def context(self, persona: tuple[str, ...], turns: tuple[str, ...]) -> tuple[list[int], list[int]]:
        """Token ids and types. The last of `turns` is what the second speaker replies to."""
        first, second = self.ids["speaker1"], self.ids["speaker2"]
        tokens = [self.ids["bos"], *self.text(" ".join(persona))]
        types = [second] * len(tokens)
        for back, turn in enumerate(turns):
            speaker = first if (len(turns) - back) % 2 else second
            said = [speaker, *self.text(turn)]
            tokens, types = tokens + said, types + [speaker] * len(said)
        return tokens, types

    def reply(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids and types of one candidate."""
        tokens = [self.ids["speaker2"], *self.text(text), self.ids["eos"]]
        return tokens, [self.ids["speaker2"]] * len(tokens)

    def reply_length(self, text: str) -> int:
        return len(self.reply(text)[0])


def write(splits: Splits, settings, tokenizer, dtype: np.dtype, directory: Path) -> dict:
    """Write the files of each split into `directory`; returns what meta.json says of dialogues.

    Raises ConfigError for a row of validation or test that cannot be shown whole.
    """
    encoder, longest = Encoder(tokenizer), settings.max_reply_tokens
    dropped = dict(splits.dropped)
    train = rows(splits.dialogues["train"], settings.candidates, longest, encoder.reply_length)
    fitting = [row for row in train if max(map(encoder.reply_length, row.candidates)) <= longest]
    dropped[f"with a reply of more than {longest} tokens"] = len(train) - len(fitting)
    if not fitting:
        raise ConfigError(
            f"max_reply_tokens = {longest}: no training row has replies so short; set it higher"
        )
    if settings.max_train_rows > len(fitting):
        raise ConfigError(
            f"max_train_rows = {settings.max_train_rows}: {len(fitting):,} training rows are left; 0 takes them all"
        )
    if settings.max_train_rows:
        chosen = set(sorted(fitting, key=_row_key)[: settings.max_train_rows])
        dropped["not among max_train_rows"] = len(fitting) - len(chosen)
        fitting = [row for row in fitting if row in chosen]
    lengths = [len(encoder.context(row.persona, row.turns)[0]) for row in fitting]
    room = sorted(lengths)[math.ceil(settings.length_percentile / 100 * len(lengths)) - 1]
    kept = [row for row, length in zip(fitting, lengths, strict=True) if length <= room]
    dropped[f"with more than {room} tokens before the reply"] = len(fitting) - len(kept)
    own = {"train": (kept, 0)}
    for name in ("validation", "test"):
        found = rows(splits.dialogues[name], settings.candidates, longest, encoder.reply_length)
        own[name] = _whole(found, encoder, room, longest, name)
    source = splits.source
    given = {name: bool(splits.dialogues[name][0].candidates) for name in SPLITS}
    return {
        "kind": "dialogues",
        "version": version(settings.dataset),
        "choices": settings.candidates,
        "context_tokens": room,
        "reply_tokens": longest,
        "specials": encoder.ids,
        "distractors": "the data set's own" if all(given.values()) else DRAWN,
        "dropped": dropped,
        "shortened": {name: cut for name, (_, cut) in own.items() if cut},
        "source_rows": {n: replies(d) for n in SPLITS if (d := getattr(source, n)) is not None},
        "of_rows": source.of_rows,
        "splits": {
            name: _write_split(own[name][0], splits.dialogues[name], encoder, dtype, directory / name)
            for name in SPLITS
        },
    }


DRAWN = "drawn with a fixed seed from replies of other dialogues of the same split"


def _row_key(row: Row) -> bytes:
    return hashlib.sha256(f"{row.persona}\n{row.turns}\n{row.candidates[row.gold]}".encode()).digest()


def _whole(found: list[Row], encoder: Encoder, room: int, longest: int, name: str) -> tuple[list[Row], int]:
    """All rows, and how many of them lost their oldest turns."""
    kept, cut = [], 0
    for row in found:
        if (length := max(map(encoder.reply_length, row.candidates))) > longest:
            raise ConfigError(
                f"max_reply_tokens = {longest}: a reply in the {name} set has {length} with its speaker and its end, "
                "and none is left out there; set it to that at least"
            )
        turns = row.turns
        while len(encoder.context(row.persona, turns)[0]) > room:
            if len(turns) == 1:
                raise ConfigError(
                    f"length_percentile: a persona and the turn after it have more than {room} tokens in the {name} "
                    "set, where nothing is left out; set it higher"
                )
            turns = turns[1:]
        cut += len(turns) < len(row.turns)
        kept.append(Row(row.persona, turns, row.candidates, row.gold))
    return kept, cut


def _write_split(
    found: list[Row], dialogues: list[Dialogue], encoder: Encoder, dtype: np.dtype, path: Path
) -> dict:
    encoder.unknown, tokens, types, ends, text_bytes, goal = 0, [], [], [], 0, [0, 0]
    digest = hashlib.sha256()
    for row in found:
        for ids, speakers in (encoder.context(row.persona, row.turns), *map(encoder.reply, row.candidates)):
            tokens += ids
            types += speakers
            ends.append(len(tokens))
        said = " ".join(row.persona), *row.turns, *row.candidates
        text_bytes += sum(len(text.encode("utf-8")) for text in said)
        true = row.candidates[row.gold]
        goal[0] += encoder.reply_length(true) - 1
        goal[1] += len(true.encode("utf-8"))
        digest.update(f"{row}\n".encode())
    unknown = encoder.unknown
    examples = Choices(
        np.array(tokens, dtype),
        np.array(types, dtype),
        np.array(ends, np.int64),
        np.array([row.gold for row in found], np.int32),
        pad=encoder.ids["pad"],
    )
    for suffix, array in examples.arrays().items():
        array.tofile(path.with_name(f"{path.name}{suffix}.bin"))
    return {
        "rows": len(found),
        "segments": len(ends),
        "dialogues": len(dialogues),
        "personas": len({persona_key(one) for one in dialogues}),
        "tokens": len(tokens),
        "bytes": text_bytes,
        "bytes_per_token": text_bytes / len(tokens),
        "unknown_tokens": unknown,
        "reply_targets": goal[0],  # tokens of true replies with their ends, without their speakers
        "reply_bytes": goal[1],
        "sha256_text": digest.hexdigest(),
        **{f"sha256_{name}": d for name, d in examples.digests().items()},
        "sha256_rows": examples.sha256(),
    }
