"""Latent attention with the reciprocal term in fused kernels (torch's flex_attention), which keep no T × T scores.

A kernel takes one product a pair, and a pair within the window has two. Both are one of vectors twice as long:

    ⟨q_i, k_j⟩ + α ⟨q_j, k_i⟩ = ⟨(q_i, α k_i), (k_j, q_j)⟩

So the keys of a row are divided in two: those within the window, i - j ≤ W, a narrow band with the long vectors; and
those before it, plain latent attention, which is causal again once its rows are counted from W + 1. Each part gives
the softmax over its own keys and log Σ exp of its scores; the whole is their mean, weighted by softmax over the two.

Only inside a compiled graph are these kernels fused: elsewhere Latent.scores writes the scores out. Which keys a row
has is said by masks, made outside the blocks: torch cannot trace their making where activations are recomputed.
"""

import functools
import math

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention


def masks(length: int, window: int, device: torch.device) -> tuple[BlockMask, BlockMask | None]:
    """For sequences of so many tokens: the keys of each row within the window, and those before it, if any are."""
    # What is traced goes into the graph; the tensors of one that was cached would be of another trace.
    return (_made if torch.compiler.is_compiling() else _kept)(length, window, device)


def _made(length: int, window: int, device: torch.device) -> tuple[BlockMask, BlockMask | None]:
    def near(_b, _h, i, j):
        return (i >= j) & (i - j <= window)

    def before(_b, _h, i, j):  # of rows counted from window + 1
        return i >= j

    rest = length - window - 1
    return (
        create_block_mask(near, None, None, length, length, device=device),
        create_block_mask(before, None, None, rest, rest, device=device) if rest > 0 else None,
    )


_kept = functools.cache(_made)


def fused(q, k, v, mask: BlockMask, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One part, q (B, H, n, d), k and v (B, H or 1, n, ·): softmax(scale q kᵀ) v, and its log Σ exp in fp32."""
    y, more = flex_attention(
        q,
        k,
        v,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.size(1) != k.size(1),
        return_aux=AuxRequest(lse=True),
    )
    return y, more.lse


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    alpha: float,
    window: int,
    masks: tuple[BlockMask, BlockMask | None],
) -> torch.Tensor:
    """What `weigh(Latent.scores(q, k, q), v)` is: q (B, H, T, L), k and v (B, 1, T, L) → (B, H, T, L).

    masks: of this length and window.
    """
    (near, before), heads, scale = masks, q.size(1), 1 / math.sqrt(q.size(-1))
    wide_k = k.expand(-1, heads, -1, -1)
    long_q, long_k = torch.cat([q, alpha * wide_k], -1), torch.cat([wide_k, q], -1)
    # A kernel lays out a gradient as its input is, so this one must not be a view that repeats a head.
    wide_v = v.expand(-1, heads, -1, -1).contiguous()
    y, lse = fused(long_q, long_k, wide_v, near, scale)
    if before is None:
        return y
    first = window + 1  # the first row that has keys before its window
    far, far_lse = fused(q[..., first:, :], k[..., :-first, :], v[..., :-first, :], before, scale)
    total = torch.logaddexp(lse[..., first:], far_lse)
    shares = (torch.exp(part - total)[..., None] for part in (lse[..., first:], far_lse))
    both = sum(share * part for share, part in zip(shares, (y[..., first:, :], far), strict=True))
    return torch.cat([y[..., :first, :], both.to(y.dtype)], -2)
