"""A plain PyTorch loop, written as the classifier of system 004 was: each word hashed, character by character, whenever
its row is loaded; torch's own encoder layers on padded rows, padding seen; eager, fp32, Adam, nothing prefetched ahead
of the DataLoader's workers.
"""

import math

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Meter
from benchmarks.task import Task
from engine.config import resolve

WORKERS = 4  # of the loader, as many as that system had cores


class HashedRows(Dataset):
    """(ids (T,), label) of a row, made anew each time."""

    def __init__(self, rows: list[tuple[str, int]], vocabulary: int, context: int):
        self.rows, self.vocabulary, self.context = rows, vocabulary, context

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        text, label = self.rows[number]
        ids = [1 + fnv1a(word) % (self.vocabulary - 1) for word in text.lower().split()[: self.context]]
        return torch.tensor(ids + [0] * (self.context - len(ids))), label


def fnv1a(word: str) -> int:
    """The 32-bit FNV-1a hash of a word's characters."""
    value = 0x811C9DC5
    for character in word:
        value = ((value ^ ord(character)) * 0x01000193) & 0xFFFFFFFF
    return value


class Encoder(nn.Module):
    """torch's post-norm encoder, the mean over all positions, and a linear layer."""

    def __init__(self, m, vocabulary: int, classes: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, m.width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(
            m.width, m.heads, m.mlp_width, dropout=0.1, activation="relu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, m.layers, enable_nested_tensor=False)
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(m.width, classes)
        angles = torch.arange(m.context)[:, None] * torch.exp(
            torch.arange(0, m.width, 2) * (-math.log(10_000) / m.width)
        )
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], -1).flatten(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T) → (B, classes)
        x = self.embedding(ids) + self.positions[: ids.size(1)]
        return self.head(self.dropout(self.encoder(x).mean(1)))
