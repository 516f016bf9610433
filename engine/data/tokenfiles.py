"""Token files that are too large to be one: written piece by piece, read as one array of shape (tokens,).

A split of at most SHARD_TOKENS tokens is SPLIT.bin; of a larger one each shard has so many, the last fewer:
SPLIT.0000.bin, SPLIT.0001.bin and so on. It must not know what the tokens are of.
"""

import hashlib
from pathlib import Path

import numpy as np

SHARD_TOKENS = 1 << 27  # 256 MiB in uint16


class Writer:
    """Writes one split; no more than a shard is open, and no more than what is added at a time is held."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype):
        self.directory, self.split, self.dtype = directory, split, dtype
        self.shards: list[dict] = []
        self._all, self._file = hashlib.sha256(), None
        self.tokens = 0

    def add(self, ids: np.ndarray) -> None:
        """Append token ids of shape (tokens,)."""
        ids = ids.astype(self.dtype)
        self._all.update(ids.tobytes())
        self.tokens += len(ids)
        while len(ids):
            if self._file is None:
                self._open()
            part = ids[: SHARD_TOKENS - self.shards[-1]["tokens"]]
            self._file.write(part.tobytes())
            self._sha256.update(part.tobytes())
            self.shards[-1]["tokens"] += len(part)
            ids = ids[len(part) :]
            if self.shards[-1]["tokens"] == SHARD_TOKENS:
                self._close()

    def done(self) -> dict:
        """Close the files; tokens, sha256_tokens of all, and the shards with theirs, for meta.json."""
        if not self.shards:
            self._open()
        if self._file is not None:
            self._close()
        if len(self.shards) == 1:
            (self.directory / self.shards[0]["file"]).rename(self.directory / f"{self.split}.bin")
            self.shards[0]["file"] = f"{self.split}.bin"
        return {"tokens": self.tokens, "sha256_tokens": self._all.hexdigest(), "shards": self.shards}

    def _open(self) -> None:
        name = f"{self.split}.{len(self.shards):04}.bin"
        self._file, self._sha256 = (self.directory / name).open("wb"), hashlib.sha256()
        self.shards.append({"file": name, "tokens": 0})

    def _close(self) -> None:
        self._file.close()
        self._file = None
        self.shards[-1]["sha256"] = self._sha256.hexdigest()


class TokenFiles:
    """Several arrays of shape (tokens,) as one that is read by slices and by arrays of positions."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts, self.dtype = parts, parts[0].dtype
        self.ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self.ends[-1]),)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: slice | np.ndarray) -> np.ndarray:
        """What a plain array gives; positions must be from 0 to the length."""
        if isinstance(at, slice):
            return self._slice(*at.indices(len(self)))
        at = np.asarray(at)
        if at.size and not 0 <= at.min() <= at.max() < len(self):
            raise IndexError(f"positions {at.min()} to {at.max()} of {len(self)} tokens")
        which = np.searchsorted(self.ends, at, side="right")
        found = np.empty(at.shape, self.dtype)
        for number in np.unique(which):
            here = which == number
            start = self.ends[number] - len(self.parts[number])
            found[here] = self.parts[number][at[here] - start]
        return found

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """All of it in memory."""
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)

    def _slice(self, first: int, last: int, step: int) -> np.ndarray:
        assert step == 1, step
        starts = self.ends - [len(part) for part in self.parts]
        cut = [
            part[max(first - start, 0) : max(last - start, 0)]
            for part, start in zip(self.parts, starts.tolist(), strict=True)
        ]
        return np.concatenate(cut)
