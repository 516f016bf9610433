"""A plain PyTorch loop, written as the persona chatbot was that the study persona is about.

Every candidate stands behind a copy of the context, all padded to the longest row; attention sees padding, whose
places are behind all others; the language-model head makes logits of every token of every candidate, of which the
loss uses those of one. fp16 autocast with a gradient scaler, a compiled model, AdamW without clipping, dropout 0.1.
Rows come through the workers of a DataLoader. The loss stays on the device.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Meter
from benchmarks.task import Task
from engine.config import resolve
from engine.data.choices import Choices
from engine.data.prepare import open_tokens

WORKERS = 4  # of the loader
FIRST_SCALE = 2.0**10  # of fp16 losses, as that system had it
DROPOUT = 0.1
NO_LABEL = -100


class PaddedRows(Dataset):
    """Of each row ids, types and labels (candidates, T), the places of last tokens (candidates,), and the gold."""

    def __init__(self, rows: Choices):
        self.rows, self.lengths = rows, rows.lengths()
        self.longest = int((self.lengths[:, 0] + self.lengths[:, 1:].max(1)).max())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, ...]:
        count, gold = self.rows.candidates, int(self.rows.labels[number])
        before, *widths = self.lengths[number].tolist()
        start = int(self.rows.ends[number * (1 + count)]) - before
        ids = torch.full((count, self.longest), self.rows.pad)
        types, labels = ids.clone(), torch.full_like(ids, NO_LABEL)
        place = start + before
        for i, width in enumerate(widths):
            for found, array in ((ids, self.rows.tokens), (types, self.rows.types)):
                found[i, :before] = torch.from_numpy(array[start : start + before].astype("int64"))
                found[i, before : before + width] = torch.from_numpy(
                    array[place : place + width].astype("int64")
                )
            place += width
        true = slice(before + 1, before + widths[gold])  # without its speaker
        labels[gold, true] = ids[gold, true]
        return ids, types, labels, before + torch.tensor(widths) - 1, torch.tensor(gold)


class Layer(nn.Module):
    """A pre-norm GPT-2 block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C) → (B, T, C)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=DROPOUT if self.training else 0.0
        )
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.norm2(x)), approximate="tanh")))


class TwoHeads(nn.Module):
    """GPT-2 with a head tied to its embedding and one of a single number: the sum of both means over two."""

    def __init__(self, m, vocabulary: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, m.width), nn.Embedding(m.context, m.width)
        self.layers = nn.ModuleList(Layer(m.width, m.heads) for _ in range(m.layers))
        self.norm, self.choice, self.dropout = (
            nn.LayerNorm(m.width),
            nn.Linear(m.width, 1),
            nn.Dropout(DROPOUT),
        )
        for name, p in self.named_parameters():
            if p.dim() > 1:
                narrow = name.endswith(("out.weight", "narrow.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * m.layers) if narrow else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids, types, labels, last, gold) -> torch.Tensor:
        """ids, types, labels (B, candidates, T), last (B, candidates), gold (B,) → the loss, a scalar."""
        rows, count, length = ids.shape
        x = self.tokens(ids.flatten(0, 1)) + self.tokens(types.flatten(0, 1))
        x = self.dropout(x + self.positions(torch.arange(length, device=ids.device)))
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)  # (B · candidates, T, C)
        logits = F.linear(x, self.tokens.weight)
        following = labels.flatten(0, 1)[:, 1:].flatten()
        said = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), following, ignore_index=NO_LABEL)
        ends = x[torch.arange(rows * count, device=ids.device), last.flatten()]
        scores = self.choice(self.dropout(ends)).view(rows, count)
        return (said + F.cross_entropy(scores.float(), gold)) / 2


def measure(task: Task) -> dict:
    config = resolve(task.settings, "benchmark")
    size, m, t = task.size, config.model, config.training
    device, meter = torch.device(size.device), Meter(size.device, size.warmup)
    torch.manual_seed(config.run.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    rows = PaddedRows(open_tokens(task.tokens).train)
    model = TwoHeads(m, task.vocabulary).to(device)
    step = torch.compile(model) if device.type == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, enabled=device.type == "cuda")
    batches, accumulation = forever(loader(rows, size.micro_batch, device)), size.accumulation
    meter.start()
    for number in range(size.total_steps):
        for group in optimizer.param_groups:
            group["lr"] = size.lr * min(1, (number + 1) / size.lr_warmup_steps)
        total = torch.zeros((), device=device)
        for _ in range(accumulation):
            batch = [x.to(device, non_blocking=True) for x in next(batches)]
            with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                loss = step(*batch) / accumulation
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        meter.step_done(total)
    return meter.result(
        parameters=sum(p.numel() for p in model.parameters()),
        padded_to=rows.longest,
        batch_size=t.batch_size,
    )


def loader(rows: PaddedRows, micro_batch: int, device: torch.device) -> DataLoader:
    return DataLoader(
        rows,
        batch_size=micro_batch,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS if device.type == "cuda" else 0,
        pin_memory=device.type == "cuda",
        persistent_workers=device.type == "cuda",
    )


def forever(batches: DataLoader):
    """One epoch after another."""
    while True:
        yield from batches
