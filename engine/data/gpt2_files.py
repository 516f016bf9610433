"""The two files of GPT-2's byte-pair encoding (modified MIT): from a directory, or by name. Only the known bytes."""

import hashlib
from pathlib import Path

from engine.data.hub import fetching
from engine.data.textdir import read_files
from engine.errors import ConfigError

HUB = "openai-community/gpt2"
AT_HUB = {
    "encoder.json": "vocab.json",
    "vocab.bpe": "merges.txt",
}  # OpenAI's names, and the hub's of the same
SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def read(directory: str) -> dict[str, str]:
    """The text of both by OpenAI's names; an empty `directory`: by name from the hub.

    Raises ConfigError when they are missing, cannot be fetched or are not the known ones.
    """
    if directory:
        named = {name: name for name in SHA256}
        return read_files(
            "tokenizer_dir", directory, named, SHA256, "; or leave it empty to fetch it by name"
        )
    contents = {name: _fetch(other) for name, other in AT_HUB.items()}
    wrong = [
        f"{AT_HUB[name]}: wrong sha256: expected {SHA256[name]}, found {found}"
        for name, content in contents.items()
        if (found := hashlib.sha256(content).hexdigest()) != SHA256[name]
    ]
    if wrong:
        raise ConfigError(wrong, where=f"{HUB} as fetched")
    return {name: content.decode("utf-8") for name, content in contents.items()}


def _fetch(name: str) -> bytes:
    files = (
        "GPT-2's encoder.json and vocab.bpe (or the same names with .xz; they are the vocab.json and merges.txt of "
        f"{HUB})"
    )
    with fetching("tokenizer=gpt2", HUB, files, setting="tokenizer_dir"):
        import huggingface_hub  # comes with `datasets`

        return Path(huggingface_hub.hf_hub_download(HUB, name)).read_bytes()
