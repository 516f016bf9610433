"""Latent attention (MLA, DeepSeek-V2 2024): keys and values are one narrow latent each, shared by all heads.

    Q = x Wq (B, T, H, D)     kL = x Wkd, vL = x Wvd (B, T, L)     qL[h] = Q[h] A[h] (B, T, L)
    S[h, i, j] = ⟨qL[h, i], kL[j]⟩ / √L     P = softmax(S, causal)     out = concat over h of (P[h] vL) U[h], times Wo

The heads' maps A (H, D, L) and U (H, L, D) act on the queries and on the weighted sum, so keys and values are never
widened, and a cache holds 2L numbers a token and layer instead of 2C. There are no biases, whatever `bias` says.

The reciprocal term adds, for j ≤ i ≤ j + W, α ⟨qL[h, j], kL[i]⟩ / √L to S[h, i, j]: how much j would have looked for
i. It reads nothing later than i, so attention stays causal. It needs the scores written out.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.models.attention import Cache, attend, weigh


class Latent(nn.Module):
    """Causal latent attention, (B, T, C) → (B, T, C)."""

    def __init__(self, s, rotary: nn.Module | None):
        super().__init__()
        self.heads, self.head_width, self.latent_width = s.heads, s.width // s.heads, s.latent_width
        self.alpha, self.window = s.reciprocal_alpha, s.reciprocal_window
        self.dropout, self.implementation, self.rotary = s.dropout, s.attention, rotary
        self.query = nn.Linear(s.width, s.width, bias=False)
        self.down = nn.Linear(s.width, 2 * s.latent_width, bias=False)  # kL, vL
        self.query_map = nn.Parameter(torch.empty(s.heads, self.head_width, s.latent_width))  # A
        self.value_map = nn.Parameter(torch.empty(s.heads, s.latent_width, self.head_width))  # U
        self.out = nn.Linear(s.width, s.width, bias=False)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        batch, length, width = x.shape
        wide = self.query(x).view(batch, length, self.heads, self.head_width)
        q = torch.einsum("bthd,hdl->bhtl", wide, self.query_map)  # (B, H, T, L)
        k, v = self.down(x).unsqueeze(1).chunk(2, -1)  # (B, 1, T, L)
        if self.rotary is not None:
            start = cache.length if cache is not None else 0
            q, k = self.rotary(q, start), self.rotary(k, start)
        queries = q
        if cache is not None:
            k, v = cache.extend(k=k, v=v)
            if self.alpha:
                (queries,) = cache.extend(last=self.window, queries=q)
        dropout = self.dropout if self.training else 0.0
        if self.alpha:
            y = weigh(self.scores(q, k, queries), v, dropout)
        else:
            k, v = (kept.expand(-1, self.heads, -1, -1) for kept in (k, v))
            y = attend(q, k, v, implementation=self.implementation, dropout=dropout, cached=cache is not None)
        y = torch.einsum("bhtl,hld->bthd", y, self.value_map)
        return self.out(y.reshape(batch, length, width))

    def scores(self, q: torch.Tensor, k: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """S with the reciprocal term, (B, H, n, t), before the causal mask.

        q (B, H, n, L) of the last n of t tokens, k (B, 1, t, L), queries (B, H, m, L) of the last m ≥ min(n + W, t).
        """
        n, t, m = q.size(-2), k.size(-2), queries.size(-2)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.latent_width)
        if n == t:
            reciprocal = scores.transpose(-2, -1)
        else:
            reciprocal = k[..., t - n :, :] @ queries.transpose(-2, -1) / math.sqrt(self.latent_width)
            reciprocal = F.pad(reciprocal, (t - m, 0))
        near = torch.ones(n, t, dtype=torch.bool, device=q.device).triu(t - n - self.window)
        return scores + self.alpha * reciprocal.masked_fill(~near, 0.0)
