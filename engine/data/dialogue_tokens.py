"""Rows of dialogues to tokens, and the token files of their splits.

    context   bos, persona, then speaker1, turn, speaker2, turn, ... to the turn that is replied to
    reply     speaker2, text, eos
    types     the speaker of each token; of bos and persona speaker2, whose they are

Validation and test are whole, whatever tokenizer or batch: a context that is too long loses its oldest turns there;
in training the row is dropped, and counted. It must not know a model.
"""

import hashlib
import math
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.data.choices import Choices
from engine.data.dialogue_rows import Row, rows
from engine.data.dialogues import SPLITS, Dialogue, Splits, persona_key, plain, replies, version
from engine.errors import ConfigError

SPECIALS = ("bos", "eos", "pad", "speaker1", "speaker2")  # the last ids of the vocabulary, in this order
DRAWN = "drawn with a fixed seed from replies of other dialogues of the same split"


def special_ids(vocabulary_size: int) -> dict[str, int]:
    """The ids of SPECIALS in a vocabulary that has them, of `vocabulary_size` ids with them."""
    return {name: vocabulary_size - len(SPECIALS) + i for i, name in enumerate(SPECIALS)}


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
    lengths = [len(encoder.context(row.persona, row.turns)[0]) for row in fitting]
    room = sorted(lengths)[math.ceil(settings.length_percentile / 100 * len(lengths)) - 1]
    kept = [row for row, length in zip(fitting, lengths, strict=True) if length <= room]
    dropped[f"with more than {room} tokens before the reply"] = len(fitting) - len(kept)
    if settings.max_train_rows > len(kept):
        raise ConfigError(
            f"max_train_rows = {settings.max_train_rows}: {len(kept):,} training rows are left; 0 takes them all"
        )
    if settings.max_train_rows:
        chosen = set(sorted(kept, key=_row_key)[: settings.max_train_rows])
        dropped["not among max_train_rows"] = len(kept) - len(chosen)
        kept = [row for row in kept if row in chosen]
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
        kept.append(replace(row, turns=turns))
    return kept, cut


def _write_split(
    found: list[Row], dialogues: list[Dialogue], encoder: Encoder, dtype: np.dtype, path: Path
) -> dict:
    encoder.unknown, ends, text_bytes, goal = 0, [], 0, [0, 0]
    tokens, types = array("I"), array("I")  # a list would take 8 bytes of each
    digest = hashlib.sha256()
    for row in found:
        for ids, speakers in (encoder.context(row.persona, row.turns), *map(encoder.reply, row.candidates)):
            tokens.extend(ids)
            types.extend(speakers)
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
        _numbered([row.dialogue for row in found]),
        _numbered([plain(row.candidates[row.gold]) for row in found]),
        pad=encoder.ids["pad"],
    )
    for suffix, values in examples.arrays().items():
        values.tofile(path.with_name(f"{path.name}{suffix}.bin"))
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


def _numbered(things: list) -> np.ndarray:
    """Numbers from 0, equal for equal things, int32 of shape (things,)."""
    number = {one: place for place, one in enumerate(dict.fromkeys(things))}
    return np.array([number[one] for one in things], np.int32)
