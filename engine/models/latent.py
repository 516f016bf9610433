"""Latent attention (MLA, DeepSeek-V2 2024): keys and values are one narrow latent each, shared by all heads.

    Q = x Wq (B, T, H, D)     kL = x Wkd, vL = x Wvd (B, T, L)     qL[h] = Q[h] A[h] (B, T, L)
    S[h, i, j] = ⟨qL[h, i], kL[j]⟩ / √L     P = softmax(S, causal)     out = concat over h of (P[h] vL) U[h], times Wo

The heads' maps A (H, D, L) and U (H, L, D) act on the queries and on the weighted sum, so keys and values are never
widened, and a cache holds 2L numbers a token and layer instead of 2C. A and Wq stay two factors: E² + H·D·L products
a token, where their product would cost E·H·L, more as soon as L > D. There are no biases, whatever `bias` says.

latent_query = shared: one query latent for all heads, qL = x Wqs with Wqs (E, L), so one attention for all heads.
latent_value = shared: one U (L, D) for all heads.

The reciprocal term adds, for j ≤ i ≤ j + W, α ⟨qL[h, j], kL[i]⟩ / √L to S[h, i, j]: how much j would have looked for
i. It reads nothing later than i, so attention stays causal. Its scores are written out here;
engine/models/reciprocal.py has them in fused kernels.
"""

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.models import reciprocal
from engine.models.attention import Cache, attend, columns_of_heads, products, weigh

SHARED = "shared"


class Latent(nn.Module):
    """Causal latent attention, (B, T, C) → (B, T, C)."""

    def __init__(self, s, rotary: nn.Module | None):
        super().__init__()
        self.heads, self.head_width, self.latent_width = s.heads, s.width // s.heads, s.latent_width
        self.alpha, self.window = s.reciprocal_alpha, s.reciprocal_window
        self.dropout, self.implementation, self.rotary = s.dropout, s.attention, rotary
        own_queries, own_values = s.latent_query != SHARED, s.latent_value != SHARED
        self.query = nn.Linear(s.width, s.width if own_queries else s.latent_width, bias=False)
        self.down = nn.Linear(s.width, 2 * s.latent_width, bias=False)  # kL, vL
        maps = torch.empty(s.heads, self.head_width, s.latent_width)
        self.query_map = nn.Parameter(maps) if own_queries else None  # A
        self.value_map = nn.Parameter(
            torch.empty(s.heads if own_values else 1, s.latent_width, self.head_width)
        )  # U
        self.out = nn.Linear(s.width, s.width, bias=False)

    def forward(
        self, x: torch.Tensor, cache: Cache | None = None, masks: tuple | None = None
    ) -> torch.Tensor:
        """masks: of reciprocal.masks, where the kernels of attention = flex are to be used."""
        batch, length, width = x.shape
        q, k, v = self.latents(x, cache.length if cache is not None else 0)
        queries = q
        if cache is not None:
            k, v = cache.extend(k=k, v=v)
            if self.alpha:
                (queries,) = cache.extend(last=self.window, queries=q)
        dropout = self.dropout if self.training else 0.0
        if not self.alpha:
            y = attend(q, k, v, implementation=self.implementation, dropout=dropout, cached=cache is not None)
        elif masks is not None and torch.compiler.is_compiling():
            y = reciprocal.attend(q, k, v, alpha=self.alpha, window=self.window, masks=masks)
        else:
            y = weigh(self.scores(q, k, queries), v, dropout)
        return self.out(self.widened(y).reshape(batch, length, width))

    def widened(self, y: torch.Tensor) -> torch.Tensor:
        """y U: y (B, H, T, L), or (B, 1, T, L) where all heads weigh alike → (B, T, H, D)."""
        return torch.einsum("bhtl,hld->bthd", y, self.value_map)

    def latents(self, x: torch.Tensor, start: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (B, H, T, L), or (B, 1, T, L) if shared, k and v (B, 1, T, L) of x, whose first token is at `start`."""
        q = self.query(x)
        if self.query_map is None:
            q = q.unsqueeze(1)
        else:
            wide = q.view(*x.shape[:2], self.heads, self.head_width)
            q = torch.einsum("bthd,hdl->bhtl", wide, self.query_map)
        k, v = self.down(x).unsqueeze(1).chunk(2, -1)
        if self.rotary is not None:
            q, k = self.rotary(q, start), self.rotary(k, start)
        return q, k, v

    def scores(self, q: torch.Tensor, k: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """S with the reciprocal term, (B, H, n, t), before the causal mask.

        q (B, H, n, L) of the last n of t tokens, k (B, 1, t, L), queries (B, H, m, L) of the last m ≥ min(n + W, t).
        """
        n, t, m = q.size(-2), k.size(-2), queries.size(-2)
        scores = products(q, k) / math.sqrt(self.latent_width)
        if n == t:
            mirrored = scores.transpose(-2, -1)
        else:
            mirrored = k[..., t - n :, :] @ queries.transpose(-2, -1) / math.sqrt(self.latent_width)
            mirrored = F.pad(mirrored, (t - m, 0))
        near = torch.ones(n, t, dtype=torch.bool, device=q.device).triu(t - n - self.window)
        return scores + self.alpha * mirrored.masked_fill(~near, 0.0)

    def weights_of_heads(self) -> list[tuple[nn.Parameter, Callable]]:
        """The weights of which each head has its own part, with how a tensor of that shape is divided: (H, n)."""
        own = [self.query.weight, self.query_map] if self.query_map is not None else []
        own += [self.value_map] if len(self.value_map) == self.heads else []
        rows = [(weight, lambda w: w.reshape(self.heads, -1)) for weight in own]
        return [*rows, (self.out.weight, lambda w: columns_of_heads(w, self.heads))]

    def looked_at(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For x (B, T, C), fp32 and before the mask: ⟨q, k⟩ / √L, and S, which softmax is taken of; (B, H, T, T)."""
        q, k, _ = (part.float() for part in self.latents(x))
        with torch.autocast(x.device.type, enabled=False):
            plain = products(q, k) / math.sqrt(self.latent_width)
            return plain, self.scores(q, k, q) if self.alpha else plain
