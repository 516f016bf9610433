"""The checksum of a file. No torch is imported here, because data is checked before it is."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """Of the file's bytes, in hexadecimal; read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
