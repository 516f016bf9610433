"""A user's own text in one file, cut by position: training first, then validation, then test.

Also the one place that cuts a text by position. No window of one split shares a character with another, because
windows lie within a split. Licence: whatever the text's owner says. It must not change or shuffle the text.
"""

from pathlib import Path

from engine.data.textdir import read_file
from engine.errors import ConfigError

NAME = "text file"


def by_position(text: str, validation_percent: int, test_percent: int) -> dict[str, str]:
    """The three parts of `text`, in its order; together they are the text. The test is empty for 0 %.

    Raises ConfigError where a part that was asked for has no character.
    """
    validation = len(text) * (100 - validation_percent - test_percent) // 100
    test = len(text) * (100 - test_percent) // 100
    parts = {"train": text[:validation], "validation": text[validation:test], "test": text[test:]}
    wanted = [split for split in parts if split != "test" or test_percent]
    if empty := [split for split in wanted if not parts[split]]:
        raise ConfigError(f"{len(text)} characters are too few: no text is left for {', '.join(empty)}")
    return parts


def load(settings) -> dict[str, str]:
    """The three texts. Raises ConfigError when data_file is not set, missing, not UTF-8 or too short."""
    if not settings.data_file:
        raise ConfigError("dataset=text_file needs the file (or the same name with .xz): -S data_file=FILE")
    path = Path(settings.data_file).expanduser()
    text = read_file(path.parent, path.name.removesuffix(".xz"))
    try:
        return by_position(text, settings.validation_percent, settings.test_percent)
    except ConfigError as error:
        raise ConfigError(error.problems, where=f"data_file={settings.data_file}") from None
