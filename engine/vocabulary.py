"""A run's vocabulary travels with its model: tokenizer.json lies beside the weights, its checksum in metrics.json.

An id means what the tokenizer of the run's tokens says, and equal numbers of tokens prove nothing: two texts may have
as many characters, and others. So what is read with a model is compared by content. It must not make a tokenizer.
"""

import hashlib
import shutil
from pathlib import Path

from engine.config import Config
from engine.data.prepare import tokenizer_in
from engine.data.tokenizers import FILENAME
from engine.errors import ConfigError
from engine.rundir import read_outcome

KEY = "vocabulary_sha256"  # in metrics.json


def sha256(directory: Path) -> str:
    """The checksum of a directory's vocabulary, in hexadecimal."""
    return hashlib.sha256((directory / FILENAME).read_bytes()).hexdigest()


def keep(tokens: Path, run: Path) -> None:
    """Put the vocabulary of the `tokens` into the directory of the `run`."""
    shutil.copyfile(tokens / FILENAME, run / FILENAME)


def of_run(directory: Path, config: Config):
    """The tokenizer that a finished run was trained with, an engine.data.tokenizers.Tokenizer.

    Raises ConfigError if it is not there, or is another than the model's.
    """
    _recorded(directory)
    return tokenizer_in(directory, config.data.tokenizer)


def require_same(directory: Path, tokens: Path) -> None:
    """Raise ConfigError unless the model in the run's `directory` was trained with the vocabulary of the `tokens`."""
    mine, theirs = _recorded(directory), sha256(tokens)
    if mine != theirs:
        raise ConfigError(
            f"its model's vocabulary (sha256 {mine[:12]}) is not that of {tokens} ({theirs[:12]}): the same id means "
            "another token there; use tokens of the same text and tokenizer, or train the run again",
            str(directory),
        )


def _recorded(directory: Path) -> str:
    """The checksum in the run's metrics.json, which its vocabulary has."""
    recorded = read_outcome(directory).get(KEY)
    if recorded is None or not (directory / FILENAME).is_file():
        raise ConfigError(
            f"no {FILENAME} of its own, so what its ids mean is not known; train it again", str(directory)
        )
    if (found := sha256(directory)) != recorded:
        raise ConfigError(
            f"{FILENAME} is not the model's vocabulary: its sha256 is {found}, the model's {recorded}",
            str(directory),
        )
    return recorded
