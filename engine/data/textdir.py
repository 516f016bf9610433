"""A user's own text: a directory with train.txt, valid.txt and test.txt (or the same names with .xz).

Also the one place that reads text files for the data sets that are kept in a directory.
Licence: whatever the text's owner says. It must not split or change the text: the three files are the splits.
"""

import hashlib
import lzma
from pathlib import Path

from engine.errors import ConfigError

NAME = "text directory"
FILES = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}


def read_file(directory: str, filename: str, sha256: str = "", instead: str = "") -> str:
    """The text of `filename`, or of `filename`.xz, in `directory`; its bytes must have the `sha256` if given.

    Raises ConfigError for a missing (saying what would do `instead`), damaged, changed or non-UTF-8 file.
    """
    plain = Path(directory).expanduser() / filename
    packed = plain.with_name(filename + ".xz")
    if plain.is_file():
        path, content = plain, plain.read_bytes()
    elif packed.is_file():
        path = packed
        try:
            content = lzma.decompress(packed.read_bytes())
        except lzma.LZMAError as error:
            raise ConfigError(f"{packed} cannot be unpacked: {error}") from error
    else:
        raise ConfigError(f"{plain} is missing (nor is there {packed.name}){instead}")
    found = hashlib.sha256(content).hexdigest()
    if sha256 and found != sha256:
        raise ConfigError(f"{path}: wrong sha256: expected {sha256}, found {found}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error


def read_files(
    setting: str, directory: str, files: dict[str, str], sha256: dict[str, str], instead: str = ""
) -> dict[str, str]:
    """`read_file` for each of {key: filename}, by key; all problems in one ConfigError naming `setting`."""
    texts, problems = {}, []
    for key, filename in files.items():
        try:
            texts[key] = read_file(directory, filename, sha256.get(key, ""), instead)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems, where=f"{setting}={directory}")
    return texts


def load(settings) -> dict[str, str]:
    """The three texts of settings.data_dir.

    Raises ConfigError when it is not set or a file is missing or empty.
    """
    if not settings.data_dir:
        raise ConfigError(
            "dataset=text needs a directory with train.txt, valid.txt and test.txt: -S data_dir=DIRECTORY"
        )
    texts = read_files("data_dir", settings.data_dir, FILES, {})
    empty = [FILES[split] for split, text in texts.items() if not text]
    if empty:
        raise ConfigError([f"{name} is empty" for name in empty], where=f"data_dir={settings.data_dir}")
    return texts
