"""GPT: a decoder-only transformer. What it computes, not how it is spread over devices or memory.

Pre-norm (GPT-2) has a last layer norm before the head, post-norm has none. The parts are in block.py, attention.py,
latent.py, mlp.py and positions.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.models import reciprocal
from engine.models.attention import Cache
from engine.models.block import INIT_STD, Block, as_operand, draw_weights
from engine.models.positions import Rotary, Sinusoids
from engine.objectives import NextToken

TASK = "engine.tasks.next_token"


class Layout(NamedTuple):
    """What tokens (B, T) are besides their ids; None: nothing.

    types (B, T): ids whose embeddings are added. positions (B, T): where each stands. mask (B, 1, T, T): False for
    what a token does not see, of what follows it too.
    """

    types: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    mask: torch.Tensor | None = None


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
        self.dropout, self.token_dropout = nn.Dropout(s.dropout), s.token_dropout
        self.layers = nn.ModuleList(Block(s, rotary) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.width, bias=s.bias) if s.norm_placement == "pre" else nn.Identity()
        self.output_dropout = nn.Dropout(s.output_dropout)
        self.head = None if s.tie_embeddings else nn.Linear(s.width, rows, bias=False)
        self.reciprocal_window = s.reciprocal_window if s.attention == "flex" else None
        self.stream_in_bf16 = s.residual_precision == "bf16"
        self.stream_dtype: torch.dtype | None = None  # of the stream, as last seen before the last norm
        self.loss = NextToken(vocabulary_size)
        self.gradient_sums = None  # the trainer installs the run's, if it has any
        self.add_heads(s)
        draw_weights(self, seed, dict.fromkeys(("token_embedding.weight", "head.weight"), vocabulary_size))

    def add_heads(self, s) -> None:
        """What a model that builds on this one has besides, before weights are drawn."""

    @property
    def head_weight(self) -> nn.Parameter:
        """The output head's weight (rows ≥ V, C)."""
        return self.token_embedding.weight if self.head is None else self.head.weight

    def features(
        self,
        tokens: torch.Tensor,
        caches: Sequence[Cache] | None = None,
        layout: Layout | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Tokens (B, T) → (what the head reads (B, T, C), norms); under autocast in its dtype.

        With caches, one a block, the tokens follow those that the caches have seen. layout: what tokens are besides
        their ids, and where they stand if not one after another.
        """
        start = caches[0].length if caches else 0
        x = self.embedded(tokens, layout)  # (B, T, C)
        if self.training and self.token_dropout:
            x = x * (torch.rand(tokens.shape, device=tokens.device) >= self.token_dropout)[..., None]
        if self.position_embedding is not None:
            places = torch.arange(start, start + tokens.size(1), device=tokens.device)
            if layout is not None and layout.positions is not None:
                places = layout.positions
            x = x + self.position_embedding(places)
        x = self.dropout(x.bfloat16() if self.stream_in_bf16 else x)
        norms, masks = [], self._masks(tokens) if self.training and not caches else None
        if layout is not None and layout.mask is not None:
            masks = layout.mask
        for i, block in enumerate(self.layers):
            x = block(x, caches[i]) if caches else block(x) if masks is None else block(x, None, masks)
            if i in self.norm_layers:
                norms.append(x.detach().float().square().mean().sqrt())
        self.stream_dtype = x.dtype
        return self.output_dropout(as_operand(self.norm(x))), norms

    def embedded(self, tokens: torch.Tensor, layout: Layout | None) -> torch.Tensor:
        """(B, T) → (B, T, C), without positions."""
        return self.token_embedding(tokens)

    def _masks(self, tokens: torch.Tensor) -> tuple | None:
        """What the kernels of attention = flex need to know of the sequences; None for other kernels."""
        if self.reciprocal_window is None:
            return None
        return reciprocal.masks(tokens.size(1), self.reciprocal_window, tokens.device)

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


def build(settings, vocabulary_size: int, norm_layers: tuple[int, ...] = (), classes: int = 0) -> GPT:
    """A GPT with weights drawn from torch's global generator: seed it first. It has no classes."""
    return GPT(settings, vocabulary_size, norm_layers)
