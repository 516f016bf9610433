"""The embedded data set: the source text of the Python standard library on this machine.

Real text that is present wherever Python is, with nothing shipped and nothing downloaded. It differs between
Python versions, so its sha256 is recorded with the tokens and two results compare only when those agree.
Licence: PSF License Version 2; the text is read where Python installed it and is never copied into the
project. It must never fall back to other text: a Python without its source is an error.
"""

import hashlib
import os
import sysconfig
from pathlib import Path

from engine.errors import ConfigError

NAME = "Python standard library source"

# Test suites and installed packages are not the library. The others are generated: character tables that
# repeat from file to file, which would put near copies of training text into validation, and help topics.
EXCLUDED_DIRECTORIES = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "encodings",
        "pydoc_data",
    }
)
# Written by whoever built or installed this Python, so they say more about the machine than about the
# library.
EXCLUDED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")

VALIDATION_FROM, TEST_FROM = 0.90, 0.95
# The hash draws files, not bytes. With this prefix validation and test each come out between 4.5 % and 5.3
# % of the bytes in every Python from 3.6 to 3.13; without one, validation is 2 %.
HASH_PREFIX = "3:"


def split_of(relative_path: str) -> str:
    """The split of a file: a pure function of its path below the library, written with forward slashes."""
    digest = hashlib.sha256((HASH_PREFIX + relative_path).encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < VALIDATION_FROM:
        return "train"
    return "validation" if position < TEST_FROM else "test"


def split_files(root: Path) -> dict[str, list[tuple[str, str]]]:
    """The files below `root` by split, as (relative path, text), sorted by path.

    Of files with identical bytes only the first is kept, so no text is in two splits.
    """
    paths = []
    for directory, names, files in os.walk(root):
        names[:] = [n for n in names if n not in EXCLUDED_DIRECTORIES and not n.startswith("config-")]
        paths += [Path(directory, f) for f in files if f.endswith(".py") and not f.startswith(EXCLUDED_FILES)]
    splits = {"train": [], "validation": [], "test": []}
    seen = set()
    for relative, path in sorted((p.relative_to(root).as_posix(), p) for p in paths):
        if not path.is_file():  # a link that leads nowhere
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if not content or digest in seen:
            continue
        seen.add(digest)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        splits[split_of(relative)].append((relative, text))
    return splits


def load(settings) -> dict[str, str]:
    """The text of each split, files joined in path order.

    Raises ConfigError where Python has no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    splits = split_files(root)
    empty = [name for name, files in splits.items() if not files]
    if empty:
        raise ConfigError(
            f"dataset=stdlib: no Python source for {', '.join(empty)} in this Python's "
            f"standard library at {root}; use a Python installed with its source files, "
            "or your own text: -S dataset=text -S data_dir=DIRECTORY"
        )
    return {name: "".join(_with_final_newline(text) for _, text in files) for name, files in splits.items()}


def _with_final_newline(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"
