"""FineWeb-Edu: educational pages of the web (Penedo et al. 2024, arXiv:2406.17557), its sample of ten billion tokens.

By name it is streamed, and no more is fetched than max_train_bytes asks for. A directory holds some of the parquet
files of the sample, which are read in the order of their names; other files of documents in a column `text` will do,
and are said to stand in for it: they lack its own columns. Files that have them may still hold anything, and no
checksum of the sample is known here, so they are said to be unverified, and if their words are not those of English
text, that too.
Licence: ODC-By 1.0. It must not choose or change documents: splits are by hash, in engine/data/documents.py.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from engine.data.documents import Source
from engine.data.hub import fetching
from engine.data.parquet import column, columns
from engine.data.places import OR_BY_NAME
from engine.digest import sha256
from engine.errors import ConfigError

NAME = "FineWeb-Edu"
HUB, CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"
COLUMN = "text"
OWN_COLUMNS = {"id", "dump", "url"}  # beside the text, in every file of the sample
LOOKED_AT = 1 << 20  # characters of a directory's first documents
COMMON = frozenset(("the", "of", "and", "to", "a", "in"))
LEAST = 0.1  # share of words that are COMMON: of FineWeb-Edu 0.19, and 0.15 in its poorest 20,000 characters


def load(settings) -> Source:
    """The documents of settings.data_dir or, when that is empty, by name through `datasets`.

    Raises ConfigError when there is no parquet file or nothing can be fetched.
    """
    if not settings.data_dir:
        return Source(_fetch, {"name": f"{HUB}, {CONFIG}"})
    files = sorted(Path(settings.data_dir).expanduser().glob("*.parquet"))
    if not files:
        raise ConfigError(f"there is no .parquet file{OR_BY_NAME}", where=f"data_dir={settings.data_dir}")

    def documents() -> Iterator[str]:
        return (text for file in files for text in column(file, COLUMN))

    facts = {"sha256_files": {file.name: sha256(file) for file in files}}
    if not all(set(columns(file)) >= OWN_COLUMNS for file in files):
        return Source(documents, facts, stands_in_for=NAME)
    return Source(documents, facts, unverified=f"local files said to be {NAME}{_unlike(documents())}")


def _unlike(documents: Iterator[str]) -> str:
    """What the first documents are not, in words; nothing where their words are those of English text."""
    words = common = characters = 0
    for text in documents:
        found = re.findall(r"[^\W_]+", text.lower())
        words, common = words + len(found), common + sum(word in COMMON for word in found)
        characters += len(text)
        if characters >= LOOKED_AT:
            break
    share = common / max(words, 1)
    if share >= LEAST:
        return ""
    return (
        f", whose words are not those of English text ({share:.1%} of them are {', '.join(sorted(COMMON))})"
    )


def _fetch() -> Iterator[str]:
    otherwise = "; where there is neither, dataset=imdb_text stands in for it"
    with fetching(
        "dataset=fineweb_edu", f"{HUB}, {CONFIG}", "parquet files of its sample", otherwise=otherwise
    ):
        import datasets

        for row in datasets.load_dataset(HUB, CONFIG, split="train", streaming=True):
            yield row[COLUMN]
