"""Random numbers that follow from a text, whatever else was drawn before. It imports no torch."""

import hashlib

import numpy as np


class Words:
    """Random numbers that follow from a text alone, from a counter-based generator's raw words."""

    def __init__(self, text: str):
        key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype="<u8").astype(np.uint64)
        self._generator = np.random.Philox(key=key)

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1."""
        return int(self._generator.random_raw()) % limit
