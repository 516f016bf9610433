"""A plain PyTorch loop, written as the text classifier was that the study agnews is about.

Each word is hashed, character by character, whenever its row is loaded, in the workers of a DataLoader; torch's own
encoder layers, which see padding; eager, fp32, Adam. The loss stays on the device, so no step waits for it.
"""

import importlib
import math

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Meter
from benchmarks.task import Task
from engine.config import Config, resolve
from engine.data import LABELLED

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


def measure(task: Task) -> dict:
    config = resolve(task.settings, "benchmark")
    source = importlib.import_module(LABELLED[config.data.dataset]).load(config.data)
    torch.manual_seed(config.run.seed)
    m, device, meter = config.model, task.size.device, Meter(task.size.device, task.size.warmup)
    model = Encoder(m, config.data.vocab_size, len(source.classes)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optimizer.lr)
    batches = forever(loader(source.train, config, device))
    meter.start()
    for _ in range(task.size.total_steps):
        ids, labels = (x.to(device, non_blocking=True) for x in next(batches))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids), labels)
        loss.backward()
        optimizer.step()
        meter.step_done(loss)
    return meter.result(parameters=sum(p.numel() for p in model.parameters()))


def loader(rows, config: Config, device: str) -> DataLoader:
    return DataLoader(
        HashedRows(rows, config.data.vocab_size, config.model.context),
        batch_size=config.training.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        pin_memory=device == "cuda",
        persistent_workers=True,
    )


def forever(batches: DataLoader):
    """One epoch after another."""
    while True:
        yield from batches
