"""What a TF-IDF ranker and chance get of the candidates that a run was scored on, added to the run's figures.

    python -m stages.ranking RUN HITS.json TOKENS

The eval stage does it with the test's; this command with what engine.hits left, of tokens with more candidates.

The ranker learns how rare words are from the training utterances alone. It compares a candidate with the persona and
the last two turns: on training dialogues that is better than the last turn, and than all of them. No maths here: that
is in metrics/ranker.py.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine.config import load
from engine.data import DIALOGUES
from engine.data.choices import Choices
from engine.data.prepare import SPLITS, load_tokenizer, open_tokens
from engine.errors import ConfigError, command
from engine.rundir import write_json
from metrics.ranker import Ranker, credit

TURNS = 2  # of a context, the last ones


def add(directory: Path, output: Path, among: Path | None = None) -> None:
    """Put tfidf_accuracy, chance_accuracy and candidates into `output`, of a run in `directory` on dialogues.

    among: the tokens that were scored, where they are not the run's own. Raises ConfigError if others were.
    """
    found = _scored(output)
    config = load(directory / "config.toml")
    if "reason" in found or config.data.dataset not in DIALOGUES:
        return
    if found.get("split") not in SPLITS or "evaluation_sha256" not in found:
        raise ConfigError("is not what engine.hits leaves: it does not say what was scored", str(output))
    where = among or config.tokens_directory
    tokens = open_tokens(where, None if among else config.data)
    if "specials" not in tokens.meta:
        raise ConfigError("tokens that are not of dialogues, so there is nothing to choose from", str(where))
    texts = Texts(load_tokenizer(where), tokens.meta["specials"])
    rows = getattr(tokens, found["split"])
    if found["evaluation_sha256"] != rows.sha256():
        raise ConfigError(f"what was scored is not the {found['split']} split of {where}", str(output))
    ranker = Ranker(texts.utterances(tokens.train))
    earned = [
        credit(ranker.scores(" ".join([context[0], *context[1:][-TURNS:]]), candidates), gold)
        for context, candidates, gold in texts.rows(rows)
    ]
    measured = {"candidates": rows.candidates, "chance_accuracy": 1 / rows.candidates}
    write_json(output, found | measured | {"tfidf_accuracy": sum(earned) / len(earned)})


def asked_for_more(directory: Path, output: Path) -> bool:
    """Whether the run is to be scored among more candidates too, and there was something to score."""
    scored = "reason" not in _scored(output)
    return scored and load(directory / "config.toml").evaluation.hits_candidates > 0


def add_more(directory: Path, output: Path, more: Path) -> None:
    """Put hits_at_1, tfidf_hits_at_1 and hits_candidates into `output`, of what engine.hits left in `more`."""
    found = _scored(more)
    study = load(directory / "config.toml").tokens_directory
    add(directory, more, study.with_name(f"{study.name}_among_{found['candidates']}"))
    ranked = _scored(more)
    hits = {
        "hits_candidates": ranked["candidates"],
        "hits_at_1": ranked["hits_at_1"],
        "tfidf_hits_at_1": ranked["tfidf_accuracy"],
    }
    write_json(output, _scored(output) | hits)


def _scored(path: Path) -> dict:
    """What engine.evaluate or engine.hits left. Raises ConfigError if the file is missing or is not theirs."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file; engine.hits writes it: --output FILE", str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from None
    except ValueError as error:
        raise ConfigError(f"not valid JSON: {error}", str(path)) from None
    if not isinstance(found, dict):
        raise ConfigError(f"is a {type(found).__name__}, and not what engine.hits leaves", str(path))
    return found


class Texts:
    """Rows of token ids as words. A text is decoded once, however often it stands in a history."""

    def __init__(self, tokenizer, specials: dict[str, int]):
        self.tokenizer, self.specials = tokenizer, np.array(sorted(specials.values()))
        self._seen: dict[bytes, str] = {}

    def rows(self, rows: Choices) -> Iterator[tuple[list[str], list[str], int]]:
        """Of each row the persona and the turns after it, the candidates, and which of them is the true one."""
        parts = np.split(
            np.asarray(rows.tokens), rows.ends[:-1]
        )  # context, candidates, context, candidates, …
        each = 1 + rows.candidates
        for number, gold in enumerate(rows.labels):
            context, *replies = parts[number * each : (number + 1) * each]
            yield self._between(context), [self._between(one)[0] for one in replies], int(gold)

    def utterances(self, rows: Choices) -> list[str]:
        """Every different turn and true reply of the rows."""
        said = (text for context, replies, gold in self.rows(rows) for text in (*context[1:], replies[gold]))
        return list(dict.fromkeys(said))

    def _between(self, ids: np.ndarray) -> list[str]:
        """The texts after each special token, but for one at the end, which closes the last."""
        starts = np.flatnonzero(np.isin(ids, self.specials))
        ends = [*starts[1:], len(ids)]
        texts = [self._decoded(ids[start + 1 : end]) for start, end in zip(starts, ends, strict=True)]
        return texts[:-1] if starts[-1] == len(ids) - 1 and len(texts) > 1 else texts

    def _decoded(self, ids: np.ndarray) -> str:
        key = ids.tobytes()
        if key not in self._seen:
            self._seen[key] = self.tokenizer.decode(ids)
        return self._seen[key]


@command
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of a finished run on dialogues")
    parser.add_argument("hits", type=Path, help="what engine.hits left, which gets the figures")
    parser.add_argument("tokens", type=Path, help="directory of the token files that were scored")
    asked = parser.parse_args(arguments)
    add(asked.run, asked.hits, asked.tokens)
    if "tfidf_accuracy" not in (found := _scored(asked.hits)):
        raise ConfigError(
            found.get("reason", "the run is not on dialogues: nothing was chosen"), str(asked.run)
        )


if __name__ == "__main__":
    main()
