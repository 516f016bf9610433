"""What a process does before torch is imported: find its tokens, or make them."""

import os
import time

from engine.config import Config
from engine.data.prepare import Tokens, open_tokens, prepare
from engine.errors import ConfigError


def tokens_for(config: Config) -> Tokens:
    """Open the run's token files; a run started by hand, without the tokenize stage, makes them first.

    Of several processes, the first on a machine makes them and the others wait; it also checks every byte, so that
    no other tokens are trained on in their place. Raises ConfigError for missing or changed data and for tokens made
    with other settings.
    """
    directory = config.tokens_directory
    if not directory.exists():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("LOCAL_RANK") != "0":
            return _wait_for(directory, config)
        prepare(config.data, directory)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    return open_tokens(directory, config.data, verify=first)


def _wait_for(directory, config: Config, seconds: float = 600) -> Tokens:
    """The other ranks wait for rank 0, which makes the directory appear whole."""
    deadline = time.monotonic() + seconds
    while not directory.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"no tokens after {seconds:.0f} s; run python -m engine.data.prepare FILE.toml first",
                str(directory),
            )
        time.sleep(0.2)
    return open_tokens(directory, config.data)
