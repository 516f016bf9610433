"""How a run's attention looks at each evaluation, on a few fixed sequences: attention.csv, a column a layer.

    entropy        mean over heads and rows of -Σ_j P_ij log P_ij, in nats: 0 sees one token, log(i + 1) all alike
    reciprocity    mean over heads of the Pearson correlation of S_ij and S_ji over the pairs 0 < i - j ≤ W: whether
                   two tokens look for each other. S is ⟨q, k⟩ / √d before the mask, without the reciprocal term,
                   which would make its two sides alike whatever was learned
    weakest_head   the head whose weights' updates stand out of their noise the least, and by how much
                   (engine/head_snr.py)

Scores are written out, which training does not do: in a pass of their own, a sequence at a time, uncompiled. They are
those of all kinds of attention; a module of attention says what they are (`looked_at`).
"""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn as nn

from engine import compiling, parallel
from engine.config import Config
from engine.errors import ConfigError
from engine.head_snr import head_snr
from engine.ledger import Line
from engine.side_table import SideTable
from engine.step import autocast

WHAT = ("entropy", "reciprocity", "weakest_head", "weakest_head_snr")


class Layer:
    """Sums over the sequences seen by one layer's attention."""

    def __init__(self, window: int):
        self.window, self.entropy, self.rows = window, 0.0, 0
        self.sums: torch.Tensor | float = 0.0  # of x, y, x², y², xy of every pair, (H, 5)
        self.pairs = 0

    def add(self, plain: torch.Tensor, scores: torch.Tensor) -> None:
        """plain (B, H, T, T): what reciprocity is of; scores: what softmax is taken of, before the mask."""
        length = scores.size(-1)
        seen = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
        log_p = scores.masked_fill(~seen, float("-inf")).log_softmax(-1)
        self.entropy += -(log_p.exp() * log_p.masked_fill(~seen, 0.0)).sum(dtype=torch.float64).item()
        self.rows += scores[..., 0].numel()
        near = seen.tril(-1).triu(-self.window)
        x, y = (part[..., near].double() for part in (plain, plain.transpose(-2, -1)))  # (B, H, pairs)
        self.sums = self.sums + torch.stack([x, y, x * x, y * y, x * y], -1).sum((0, 2))
        self.pairs += x.size(0) * x.size(2)

    def figures(self) -> dict[str, float | None]:
        """entropy, and reciprocity, which is None where no score differs from another."""
        x, y, xx, yy, xy = (self.sums / self.pairs).unbind(-1)
        deviations = ((xx - x * x).clamp(min=0) * (yy - y * y).clamp(min=0)).sqrt()
        correlation = ((xy - x * y) / deviations).mean().item()
        return {
            "entropy": self.entropy / self.rows,
            "reciprocity": correlation if math.isfinite(correlation) else None,
        }


class AttentionMetrics(SideTable):
    """Measures one run. Every rank makes the same calls, and the first writes the rows."""

    FILE = "attention.csv"

    def __init__(self, config: Config, validation, ranks: parallel.Ranks):
        """validation: the tokens of that split. Raises ConfigError where there are too few for the sequences."""
        self.config, self.ranks, self.count = config, ranks, config.logging.attention_sequences
        self.measured = 0  # evaluations, in this process
        self.columns = ["step", "tokens_seen"]
        self.columns += [f"{what}_{i}" for what in WHAT for i in range(config.model.layers)]
        self._rows: list[dict] = []
        if not self.count:
            return
        length = config.model.context
        if self.count * length > len(validation):
            raise ConfigError(
                f"attention_sequences = {self.count}: needs {self.count} × {length} validation tokens, and there are "
                f"{len(validation)}"
            )
        sample = torch.as_tensor(validation[: self.count * length].astype("int64"))
        self.sample = sample.view(self.count, length)

    def take_rows(self) -> list[dict]:
        rows, self._rows = self._rows, []
        return rows

    def note(self, step: int, tokens_seen: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Measure `model`, as the run has it, spread and compiled, for a row of `step`."""
        if self.count:
            self.measured += 1
            where = {"step": step, "tokens_seen": tokens_seen}
            row = where | self._measure(model, optimizer)
            if self.ranks.is_first:
                self._rows.append(row)

    def _measure(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float | None]:
        inner, was_training = parallel.unwrapped(model), model.training
        layers = [Layer(self.config.logging.reciprocity_window) for _ in inner.layers]
        model.eval()
        with torch.no_grad(), _watched(inner, layers), compiling.eager(self.config.compile.compile):
            for sequence in self.sample.split(1):
                with autocast(self.config.eval_precision, self.ranks.device):
                    model(sequence.to(self.ranks.device))
        model.train(was_training)
        row: dict[str, float | None] = {}
        for i, (layer, block) in enumerate(zip(layers, inner.layers, strict=True)):
            found = layer.figures()
            snr = head_snr(block.attention, optimizer.state)
            if snr is not None and not snr.isnan().all():  # a head without weights has nothing to compare
                snr = snr.nan_to_num(nan=torch.inf)
                found |= {"weakest_head": int(snr.argmin()), "weakest_head_snr": snr.min().item()}
            row |= {f"{what}_{i}": value for what, value in found.items()}
        return row

    def lines(self, evaluations: int) -> list[Line]:
        """The ledger's line, after so many evaluations in this process."""
        if not self.count:
            return []
        return [
            Line(
                "attention_sequences",
                f"{self.count} at each evaluation",
                f"{self.count} at {self.measured} of {evaluations} evaluations",
                "passes in which the scores of every layer were written out",
                self.measured == evaluations,
            )
        ]


@contextlib.contextmanager
def _watched(model: nn.Module, layers: list[Layer]) -> Iterator[None]:
    """Inside, each layer's attention is looked at before it runs: where weights are sharded they are whole then."""

    def look(layer: Layer):
        return lambda attention, given: layer.add(*attention.looked_at(given[0]))

    pairs = zip(model.layers, layers, strict=True)
    handles = [block.attention.register_forward_pre_hook(look(layer)) for block, layer in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
