"""How often a finished run finds the true reply among another number of candidates: hits@1.

    python -m engine.hits RUN_DIRECTORY --candidates 20 --output OUTPUT.json

The rows, and how the candidates are drawn, are those of the run's own data; the wrong replies of a row are those of
the run and then more. Tokens are made beside the run's own, once, in tokens/<study>_among_<candidates>. All
candidates are put behind one context, whatever the run did, where its positions allow that: it is the same function,
and faster. The eval stage does it where hits_candidates is set.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from engine import parallel, tasks, vocabulary
from engine.config import Data, Parallel
from engine.data import DIALOGUES
from engine.data.prepare import Tokens, open_tokens, prepare
from engine.errors import ConfigError, command
from engine.evaluate import evaluated, final_model
from engine.pretrained import finished
from engine.rundir import read_outcome, write_json

USUAL = 20  # candidates, as the data set's own are


def among(directory: Path, candidates: int | None, split: str) -> dict:
    """What the run in `directory` finds in a split; candidates: None takes the run's hits_candidates, or USUAL.

    Raises ConfigError for a run that has not learned to choose.
    """
    config = finished(directory)
    candidates = (config.evaluation.hits_candidates or USUAL) if candidates is None else candidates
    if config.data.dataset not in DIALOGUES:
        raise ConfigError(f"dataset = {config.data.dataset!r}: its rows have no candidates", str(directory))
    if candidates < 2:  # noqa: PLR2004
        raise ConfigError(f"--candidates {candidates}: must be 2 or more")
    own = open_tokens(config.tokens_directory, config.data).meta
    where = config.tokens_directory.with_name(f"{config.run.study}_among_{candidates}")
    shape = replace(config.model, shared_context=config.model.positions != "rotary")
    config = replace(config, data=replace(config.data, candidates=candidates), model=shape)
    tokens = _made(config.data, where, own)
    vocabulary.require_same(directory, where)
    rows, ranks = getattr(tokens, split), parallel.start(Parallel(), config.run.device)
    model = final_model(directory, config, tokens.meta["vocabulary_size"]).to(ranks.device)
    scores = tasks.of(config).evaluate(model, rows, config, ranks)
    of = {key: read_outcome(directory)[key] for key in ("study", "run", "seed", "config_sha256")}
    found = {"split": split, "candidates": candidates, "examples": scores["count"], "chance": 1 / candidates}
    return {
        **of,
        **found,
        "hits_at_1": scores["accuracy"],
        **evaluated(config, rows, model.loss.operand_dtype),
    }


def _made(data: Data, where: Path, own: dict) -> Tokens:
    """Tokens of these settings in `where`: those that are there, if their replies are those of the run's `own`."""
    facts = ("rows", "reply_targets", "sha256_replies", "sha256_dialogues")
    try:
        tokens = open_tokens(where, data)
        pairs = [(tokens.meta["splits"][name], own["splits"][name]) for name in ("validation", "test")]
        if all(theirs[fact] == mine[fact] for theirs, mine in pairs for fact in facts):
            return tokens
    except ConfigError:
        pass  # there are none yet, or others
    prepare(data, where)
    return open_tokens(where, data)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="RUN_DIRECTORY")
    parser.add_argument("--candidates", type=int, help=f"of each row (the run's, or {USUAL})")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--output", type=Path, required=True)
    a = parser.parse_args()
    found = among(a.directory, a.candidates, a.split)
    write_json(a.output, found)
    print(
        f"{a.directory}: of {found['examples']:,} replies the true one among {found['candidates']} in "
        f"{100 * found['hits_at_1']:.1f} % (chance {100 * found['chance']:.1f} %)"
    )


if __name__ == "__main__":
    main()
