"""IMDb's film reviews as text to model: a stand-in for text of the web, where that cannot be fetched.

The 25,000 training and 50,000 unlabelled reviews, each a document; the test reviews are left out, so that a model of
them stays new to the test of dataset = imdb. Perplexities are of film reviews, and not comparable with any of web
text. Source, licence and the two forms of line breaks: engine/data/imdb.py. It must accept only the known file, and
by name only the known counts.
"""

from pathlib import Path

from engine.data.documents import Source
from engine.data.hub import fetching
from engine.data.imdb import FILE, SHA256, cleaned
from engine.data.parquet import read_parquet
from engine.data.places import OR_BY_NAME
from engine.errors import ConfigError

NAME = "IMDb reviews as text"
REVIEWS = {"train": 25_000, "unsupervised": 50_000}
UNLABELLED = "unsup"  # the label of reviews of the file that have none


def load(settings) -> Source:
    """The reviews of settings.data_dir or, when that is empty, by name through `datasets`.

    Raises ConfigError when they are missing, cannot be fetched, or are not the known ones.
    """
    texts = [cleaned(text) for part in reviews(settings.data_dir).values() for text in part]
    return Source(lambda: iter(texts), {"reviews": REVIEWS}, stands_in_for="text of the web (FineWeb-Edu)")


def reviews(directory: str) -> dict[str, list[str]]:
    """The texts of REVIEWS, in `directory` or, when that is empty, by name. Raises ConfigError as `load` does."""
    found = _directory(directory) if directory else _fetch()
    if (counts := {name: len(texts) for name, texts in found.items()}) != REVIEWS:
        raise ConfigError(f"IMDb: expected reviews {REVIEWS}, found {counts}")
    return found


def _directory(directory: str) -> dict[str, list[str]]:
    try:
        _, table = read_parquet(Path(directory).expanduser() / FILE, SHA256[FILE], OR_BY_NAME)
    except ConfigError as error:
        raise ConfigError(error.problems, where=f"data_dir={directory}") from None
    reviews = {name: [] for name in REVIEWS}
    for split, label, text in zip(table["split"], table["label"], table["text"], strict=True):
        if label == UNLABELLED:
            reviews["unsupervised"].append(text)
        elif split == "train":
            reviews["train"].append(text)
    return reviews


def _fetch() -> dict[str, list[str]]:
    with fetching("dataset=imdb_text", "stanfordnlp/imdb", FILE):
        import datasets

        loaded = datasets.load_dataset("stanfordnlp/imdb")
        return {name: list(loaded[name]["text"]) for name in REVIEWS}
