"""GPT: a decoder-only transformer. What it computes, not how it is spread over devices or memory.

Pre-norm follows GPT-2 (Radford et al. 2019): x + f(LN(x)), with a last layer norm before the head. Post-norm
follows Vaswani et al. 2017: LN(x + f(x)), without one. Positions are learned; the MLP is GELU (exact), 4× wide.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

INIT_STD = (
    0.02  # of all matrices and embeddings; projections into the residual stream are scaled down (GPT-2)
)


class Attention(nn.Module):
    """Causal multi-head self-attention, by SDPA or written out."""

    def __init__(self, width: int, heads: int, *, bias: bool, dropout: float, implementation: str):
        super().__init__()
        self.heads, self.dropout, self.implementation = heads, dropout, implementation
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C) → (B, T, C)
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, C/H)
        dropout = self.dropout if self.training else 0.0
        if self.implementation == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            y = manual_attention(q, k, v, dropout)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def manual_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """softmax(q kᵀ / √d, causal) v for (B, H, T, d) tensors; the scores exist whole, as (B, H, T, T)."""
    length = q.size(-2)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))  # (B, H, T, T)
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return F.dropout(weights, dropout).to(v.dtype) @ v


class MLP(nn.Module):
    def __init__(self, width: int, *, bias: bool):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.out = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.gelu(self.up(x)))


class Block(nn.Module):
    """One transformer layer with its two residual branches."""

    def __init__(self, s):
        super().__init__()
        self.norm_placement = s.norm_placement
        self.norm1 = nn.LayerNorm(s.width, bias=s.bias)
        self.attention = Attention(
            s.width, s.heads, bias=s.bias, dropout=s.dropout, implementation=s.attention
        )
        self.norm2 = nn.LayerNorm(s.width, bias=s.bias)
        self.mlp = MLP(s.width, bias=s.bias)
        self.dropout = nn.Dropout(s.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C)
        if self.norm_placement == "pre":
            x = x + self.dropout(self.attention(self.norm1(x)))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class GPT(nn.Module):
    """Token ids (B, T) → logits (B, T, V), and the output RMS of the blocks in `norm_layers`.

    The norms are computed here, outside the blocks, so that activation checkpointing and torch.compile
    see plain tensors and nothing is computed twice.
    """

    def __init__(self, s, vocabulary_size: int, norm_layers: tuple[int, ...] = ()):
        super().__init__()
        self.context, self.norm_layers = s.context, norm_layers
        self.token_embedding = nn.Embedding(vocabulary_size, s.width)
        self.position_embedding = nn.Embedding(s.context, s.width)
        self.dropout = nn.Dropout(s.dropout)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.width, bias=s.bias) if s.norm_placement == "pre" else nn.Identity()
        self.head = None if s.tie_embeddings else nn.Linear(s.width, vocabulary_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                residual = name.endswith(("attention.out.weight", "mlp.out.weight"))
                nn.init.normal_(p, std=INIT_STD / math.sqrt(2 * len(self.layers)) if residual else INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))  # (B, T, C)
        norms = []
        for i, block in enumerate(self.layers):
            x = block(x)
            if i in self.norm_layers:
                norms.append(x.detach().float().square().mean().sqrt())
        x = self.norm(x)
        logits = F.linear(x, self.token_embedding.weight) if self.head is None else self.head(x)
        return logits, norms


def build(settings, vocabulary_size: int, norm_layers: tuple[int, ...] = ()) -> GPT:
    """A GPT with weights drawn from torch's global generator: seed it first."""
    return GPT(settings, vocabulary_size, norm_layers)
