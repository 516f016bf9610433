"""Tiny Shakespeare: 1,115,394 characters of the plays, the usual character-level data set.

The text is cut by position into 90 % training, 5 % validation and 5 % test, so no window of validation shares
a character with training. (The published nanoGPT losses use one validation split of the last 10 %.) Licence:
public domain. It must accept only the known file.
"""

from engine.data.textdir import read_file
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
    validation, test = len(text) * 90 // 100, len(text) * 95 // 100
    return {"train": text[:validation], "validation": text[validation:test], "test": text[test:]}
