"""WikiText-2, word level: the standard small language-modelling benchmark (Merity et al. 2016,
arXiv:1609.07843).

With the `words` tokenizer: 2,088,628 training, 217,646 validation and 245,569 test tokens, counting one <eos>
at each line end, and a vocabulary of 33,278; perplexities are comparable with published ones only at these
counts. Licence: CC BY-SA 3.0 and GFDL. It must accept only the known bytes, wherever they come from.
"""

import hashlib

from engine.data.hub import fetching
from engine.data.places import OR_BY_NAME
from engine.data.textdir import FILES, read_files
from engine.errors import ConfigError

NAME = "WikiText-2"
SHA256 = {
    "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
    "validation": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
TOKENS = {"train": 2_088_628, "validation": 217_646, "test": 245_569}  # words and one <eos> a line


def load(settings) -> dict[str, str]:
    """The three texts, from settings.data_dir or, when that is empty, by name through `datasets`.

    Raises ConfigError when the files are missing, cannot be fetched, or are not the known ones.
    """
    if settings.data_dir:
        texts = read_files("data_dir", settings.data_dir, FILES, SHA256, OR_BY_NAME)
    else:
        texts = {split: text_of_rows(rows) for split, rows in _fetch().items()}
        check_digests(texts)
    found = {split: len(text.split()) + text.count("\n") for split, text in texts.items()}
    if found != TOKENS:  # the bytes are right, so the way of counting words is not
        raise ConfigError(f"WikiText-2: expected token counts {TOKENS}, found {found}")
    return texts


def text_of_rows(rows: list[str]) -> str:
    """The original file from the hub's rows: each row is a line, and a line of one space is stored as ''."""
    return "".join(row or " \n" for row in rows)


def check_digests(texts: dict[str, str]) -> None:
    """Raises ConfigError naming every split whose text is not the known one."""
    found = {split: hashlib.sha256(text.encode("utf-8")).hexdigest() for split, text in texts.items()}
    wrong = [
        f"{split}: wrong sha256: expected {SHA256[split]}, found {found[split]}"
        for split in SHA256
        if found.get(split) != SHA256[split]
    ]
    if wrong:
        raise ConfigError(wrong, where="WikiText-2 as fetched")


def _fetch() -> dict[str, list[str]]:
    files = f"{', '.join(FILES.values())} (or the same names with .xz)"
    with fetching("dataset=wikitext2", "Salesforce/wikitext, wikitext-2-v1", files):
        import datasets

        loaded = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-v1")
        return {split: list(loaded[split]["text"]) for split in SHA256}
