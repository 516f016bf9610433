"""Tiny Shakespeare: 1,115,394 characters of the plays, the usual character-level data set.

The text is cut by position (engine/data/textfile.py). nanoGPT's split, whose losses are published, is 90 % training
and 10 % validation: validation_percent = 10, test_percent = 0. Licence: public domain. It must accept only the known
file.
"""

from engine.data.textdir import read_file
from engine.data.textfile import by_position
from engine.errors import ConfigError

NAME = "Tiny Shakespeare"
SHA256 = {"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}


def load(settings) -> dict[str, str]:
    """The three texts. Raises ConfigError without data_dir or for a missing or changed input.txt."""
    if not settings.data_dir:
        raise ConfigError(
            "dataset=tinyshakespeare needs the directory that holds its input.txt (or "
            "input.txt.xz): -S data_dir=DIRECTORY; the file is data/tinyshakespeare/input.txt "
            "of the public repository karpathy/char-rnn"
        )
    text = read_file(settings.data_dir, "input.txt", SHA256["input.txt"])
    return by_position(text, settings.validation_percent, settings.test_percent)
