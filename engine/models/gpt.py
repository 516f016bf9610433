"""GPT: a decoder-only transformer. What it computes, not how it is spread over devices or memory.

Pre-norm follows GPT-2 (Radford et al. 2019): x + f(LN(x)), with a last layer norm before the head. Post-norm
follows Vaswani et al. 2017: LN(x + f(x)), without one. The parts are in attention.py, latent.py, mlp.py and
positions.py.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.models.attention import Cache, MultiHead
from engine.models.latent import Latent
from engine.models.mlp import MLP
from engine.models.positions import Rotary, Sinusoids
from engine.objectives import NextToken

INIT_STD = (
    0.02  # of all matrices and embeddings; projections into the residual stream are scaled down (GPT-2)
)


class Block(nn.Module):
    """One transformer layer with its two residual branches. The stream keeps the dtype it comes in."""

    def __init__(self, s, rotary: nn.Module | None):
        super().__init__()
        self.norm_placement = s.norm_placement
        self.norm1 = nn.LayerNorm(s.width, bias=s.bias)
        self.attention = (Latent if s.attention_form == "latent" else MultiHead)(s, rotary)
        self.norm2 = nn.LayerNorm(s.width, bias=s.bias)
        self.mlp = MLP(s.width, s.activation, bias=s.bias)
        self.dropout = nn.Dropout(s.dropout)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:  # (B, T, C)
        if self.norm_placement == "pre":
            x = x + self.dropout(self.attention(self.norm1(x), cache)).to(x.dtype)
            return x + self.dropout(self.mlp(self.norm2(x))).to(x.dtype)
        # Under autocast a norm gives fp32, which here would widen the stream.
        x = self.norm1(x + self.dropout(self.attention(x, cache))).to(x.dtype)
        return self.norm2(x + self.dropout(self.mlp(x))).to(x.dtype)


class GPT(nn.Module):
    """Token ids (B, T) → logits (B, T, V), or with targets (B, T) their summed loss, in nats; and the output RMS of
    the blocks in `norm_layers`.

    `loss` is a module (hidden (B, T, C), head_weight, targets) → scalar; the trainer installs the run's.
    Rows of the vocabulary beyond V are padding: zero, and never predicted.

    The norms are computed here, outside the blocks, so that activation checkpointing and torch.compile
    see plain tensors and nothing is computed twice.
    """

    def __init__(self, s, vocabulary_size: int, norm_layers: tuple[int, ...] = ()):
        super().__init__()
        # Before torch's own initial weights draw as many numbers as there are elements.
        seed = torch.randint(2**31, (), device="cpu").item()
        self.context, self.norm_layers, self.vocabulary_size = s.context, norm_layers, vocabulary_size
        rows = -(-vocabulary_size // s.pad_vocabulary_to) * s.pad_vocabulary_to
        self.token_embedding = nn.Embedding(rows, s.width)
        self.position_embedding = {
            "learned": lambda: nn.Embedding(s.context, s.width),
            "sinusoidal": lambda: Sinusoids(s.context, s.width, rms=INIT_STD),
            "rotary": lambda: None,
        }[s.positions]()
        rotated = s.latent_width if s.attention_form == "latent" else s.width // s.heads
        rotary = Rotary(s.context, rotated) if s.positions == "rotary" else None
        self.dropout = nn.Dropout(s.dropout)
        self.layers = nn.ModuleList(Block(s, rotary) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.width, bias=s.bias) if s.norm_placement == "pre" else nn.Identity()
        self.head = None if s.tie_embeddings else nn.Linear(s.width, rows, bias=False)
        self.stream_in_bf16 = s.residual_precision == "bf16"
        self.stream_dtype: torch.dtype | None = None  # of the stream, as last seen before the last norm
        self.loss = NextToken(vocabulary_size)
        self.gradient_sums = None  # the trainer installs the run's, if it has any
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Draw every parameter from a generator of its own, made from `seed` and its name.

        So a weight is the same in every model that has it, whatever else the models have: paired seeds start alike.
        """
        into_stream = INIT_STD / math.sqrt(2 * len(self.layers))
        for name, p in self.named_parameters():
            if p.dim() == 1:
                (nn.init.zeros_ if name.endswith("bias") else nn.init.ones_)(p)
                continue
            std = into_stream if name.endswith(("attention.out.weight", "mlp.out.weight")) else INIT_STD
            if p.dim() == 3:  # a map within each head: what it maps keeps its variance
                std = p.size(1) ** -0.5
            real = self.vocabulary_size if name in ("token_embedding.weight", "head.weight") else p.size(0)
            nn.init.normal_(p[:real], std=std, generator=_generator(seed, name))
            p[real:] = 0.0  # padding

    @property
    def head_weight(self) -> nn.Parameter:
        """The output head's weight (rows ≥ V, C)."""
        return self.token_embedding.weight if self.head is None else self.head.weight

    def features(
        self, tokens: torch.Tensor, caches: Sequence[Cache] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Tokens (B, T) → (the stream after the last norm (B, T, C), norms); under autocast in its dtype.

        With caches, one a block, the tokens follow those that the caches have seen.
        """
        start = caches[0].length if caches else 0
        x = self.token_embedding(tokens)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(start, start + tokens.size(1), device=tokens.device))
        x = self.dropout(x.bfloat16() if self.stream_in_bf16 else x)
        norms = []
        for i, block in enumerate(self.layers):
            x = block(x, caches[i]) if caches else block(x)
            if i in self.norm_layers:
                norms.append(x.detach().float().square().mean().sqrt())
        self.stream_dtype = x.dtype
        return _as_operand(self.norm(x)), norms

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        gradient_scale: torch.Tensor | None = None,
    ):
        """gradient_scale: multiplies the loss's gradients, not the loss; then call backward() on it itself."""
        hidden, norms = self.features(tokens)
        if targets is None:
            return self.logits(hidden), norms
        return self.loss(hidden, self.head_weight, targets, gradient_scale), norms

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, V)."""
        return F.linear(hidden, self.head_weight)[..., : self.vocabulary_size]


def _as_operand(x: torch.Tensor) -> torch.Tensor:
    """What autocast makes of `x` when a matrix product reads it: a norm gives fp32, twice the memory."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def build(settings, vocabulary_size: int, norm_layers: tuple[int, ...] = ()) -> GPT:
    """A GPT with weights drawn from torch's global generator: seed it first."""
    return GPT(settings, vocabulary_size, norm_layers)
