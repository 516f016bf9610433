"""FineWeb-Edu: educational pages of the web (Penedo et al. 2024, arXiv:2406.17557), its sample of ten billion tokens.

By name it is streamed, and no more is fetched than max_train_bytes asks for. A directory holds some of the parquet
files of the sample, which are read in the order of their names; other files of documents in a column `text` will do,
and are said to stand in for it: they lack its own columns.
Licence: ODC-By 1.0. It must not choose or change documents: splits are by hash, in engine/data/documents.py.
"""

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


def load(settings) -> Source:
    """The documents of settings.data_dir or, when that is empty, by name through `datasets`.

    Raises ConfigError when there is no parquet file or nothing can be fetched.
    """
    if not settings.data_dir:
        return Source(_fetch, {"name": f"{HUB}, {CONFIG}"})
    files = sorted(Path(settings.data_dir).expanduser().glob("*.parquet"))
    if not files:
        raise ConfigError(f"there is no .parquet file{OR_BY_NAME}", where=f"data_dir={settings.data_dir}")
    return Source(
        lambda: (text for file in files for text in column(file, COLUMN)),
        {"sha256_files": {file.name: sha256(file) for file in files}},
        stands_in_for="" if all(set(columns(file)) >= OWN_COLUMNS for file in files) else NAME,
    )


def _fetch() -> Iterator[str]:
    otherwise = "; where there is neither, dataset=imdb_text stands in for it"
    with fetching(
        "dataset=fineweb_edu", f"{HUB}, {CONFIG}", "parquet files of its sample", otherwise=otherwise
    ):
        import datasets

        for row in datasets.load_dataset(HUB, CONFIG, split="train", streaming=True):
            yield row[COLUMN]
