"""Self-attention: by one of torch's kernels, or written out; and what a layer keeps of earlier tokens."""

import math
import os
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.errors import ConfigError

KERNELS = {"cpu": ("flash", "math"), "cuda": ("flash", "cudnn", "efficient", "math")}
NOT_OF_SDPA = ("manual", "flex")  # written out, and torch's flex_attention


def kernel_problems(
    name: str, device: torch.device | str, *, precision: str, dropout: float, masked: bool = False
) -> list[str]:
    """Why attention = `name` cannot run on `device` in this precision with this dropout, before anything is built.

    masked: padding is left out.
    """
    kind = torch.device(device).type
    available = KERNELS[kind]
    checks = [
        (
            name == "flex" and kind == "cpu",
            "attention = 'flex': has no backward pass on a CPU; set attention = 'manual'",
        ),
        (
            name not in ("sdpa", *NOT_OF_SDPA, *available),
            f"attention = {name!r}: a {kind} device has no such kernel; it has {', '.join(available)}, and sdpa "
            "(torch's choice) and manual",
        ),
        (
            kind == "cuda" and name in ("flash", "cudnn") and precision == "fp32",
            f"attention = {name!r}: multiplies in 16 bits only; set precision = 'bf16', or attention = 'efficient'",
        ),
        (
            kind == "cpu" and name == "flash" and dropout > 0,
            f"attention = 'flash': has no dropout on a CPU (dropout = {dropout}); set attention = 'math'",
        ),
        (
            kind == "cuda" and name == "flash" and masked,
            "attention = 'flash': takes no padding mask on a GPU; set attention = 'efficient'",
        ),
    ]
    return [message for broken, message in checks if broken]


def select_attention(name: str, device: torch.device | str) -> None:
    """Let `scaled_dot_product_attention` use kernel `name` alone; `sdpa`, `manual` and `flex` leave torch its choice.

    A switch of the whole process, which eager code obeys at every call and torch.compile when it traces: call it
    once, before training. Raises ConfigError for a kernel that the device does not have. Where the device has the
    kernel but it cannot take the tensors, torch raises at the first call: see `kernel_problems`.
    """
    if problems := kernel_problems(name, device, precision="bf16", dropout=0.0):
        raise ConfigError(problems)
    # torch's cache of compiled graphs is not keyed by these switches: it would bring back another run's kernel.
    own = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")
    torch.compiler.config.cache_key_tag = f"{own} attention={name}".strip()
    is_kernel = name not in ("sdpa", *NOT_OF_SDPA)
    for kernel, switch in {
        "flash": torch.backends.cuda.enable_flash_sdp,
        "cudnn": torch.backends.cuda.enable_cudnn_sdp,
        "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
        "math": torch.backends.cuda.enable_math_sdp,
    }.items():
        switch(kernel == name or not is_kernel)


class Cache:
    """What one layer keeps of the tokens before: tensors by name, (..., tokens, features)."""

    def __init__(self):
        self.kept: dict[str, torch.Tensor] = {}

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.kept["k"].size(-2) if self.kept else 0

    def extend(self, last: int | None = None, **new: torch.Tensor) -> list[torch.Tensor]:
        """Each of `new` behind what is kept under its name; of that, keep the `last` tokens (None: all)."""
        whole = {n: torch.cat([self.kept[n], x], -2) if n in self.kept else x for n, x in new.items()}
        self.kept |= {
            n: x if last is None else x[..., max(x.size(-2) - last, 0) :, :] for n, x in whole.items()
        }
        return list(whole.values())


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    implementation: str,
    dropout: float,
    cached: bool = False,
    causal: bool = True,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ / √d) v: q (B, H, n, d) of the last n of t tokens, k and v (B, H or 1, t, ·).

    k and v of one head are for all heads of q. In 16 bits the kernels that can read them so do, and nothing is
    repeated for each head; the others see them repeated, as views.

    causal: a token sees none that follow it. cached: earlier tokens may be among k and v; if not, n = t, which is
    not asked: sizes may be symbols. mask (B, 1, 1 or n, t): False for what no token, or each, does not see; of
    attention that is not causal, but for what the mask itself says.
    """
    assert not (causal and mask is not None)  # SDPA takes one or the other
    if implementation == "manual":
        return manual_attention(q, k, v, dropout, causal=causal, mask=mask)
    is_causal = causal and (not cached or q.size(-2) == k.size(-2))
    assert (
        is_causal or not causal or q.size(-2) == 1
    )  # SDPA's causal mask is for n = t; a last token sees all
    options = {"attn_mask": mask, "is_causal": is_causal, "dropout_p": dropout}
    if k.size(1) != q.size(1):
        # torch's efficient kernel cannot, and in 32 bits nor can any fused one.
        if implementation != "efficient" and q.dtype in (torch.bfloat16, torch.float16):
            return F.scaled_dot_product_attention(q, k, v, **options, enable_gqa=True)
        k, v = (x.expand(-1, q.size(1), -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, **options)


def manual_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: float,
    *,
    causal: bool = True,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same written out; the scores exist whole, as (B, H, n, t)."""
    scores = products(q, k) / math.sqrt(q.size(-1))
    return weigh(scores, v, dropout, causal=causal, mask=mask)


def weigh(
    scores: torch.Tensor,
    v: torch.Tensor,
    dropout: float,
    *,
    causal: bool = True,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scores) v: scores (B, H, n, t) of the last n of t tokens, v (B, H or 1, t, d); masks as in `attend`."""
    n, t = scores.shape[-2:]
    if causal:
        future = torch.ones(n, t, dtype=torch.bool, device=scores.device).triu(1 + t - n)
        scores = scores.masked_fill(future, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return _rows_times(F.dropout(scores.softmax(-1), dropout).to(v.dtype), v)


def products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """⟨q_i, k_j⟩ for all i and j: q (B, H, n, d), k (B, H or 1, t, d) → (B, H, n, t)."""
    return _rows_times(q, k.transpose(-2, -1))


def _rows_times(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """rows (B, H, n, m) @ matrix (B, H or 1, m, d). One matrix for all heads is not repeated for each."""
    if matrix.size(1) == rows.size(1):
        return rows @ matrix
    return (rows.flatten(1, 2) @ matrix.squeeze(1)).unflatten(1, rows.shape[1:3])


def columns_of_heads(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The columns of an output projection (C, H·d) that read each head: (H, C·d)."""
    return weight.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1)


class MultiHead(nn.Module):
    """Multi-head attention. Rows of `qkv` are ordered (head, 3, d), so that a part of them is a part of the heads:
    under tensor parallelism this module has fewer heads, and `out` as many columns less."""

    def __init__(self, s, rotary: nn.Module | None, causal: bool = True):
        super().__init__()
        self.causal = causal
        self.head_width, self.dropout, self.implementation = s.width // s.heads, s.dropout, s.attention
        self.rotary = rotary
        self.qkv = nn.Linear(s.width, 3 * s.width, bias=s.bias)
        self.out = nn.Linear(s.width, s.width, bias=s.bias)

    def forward(
        self, x: torch.Tensor, cache: Cache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:  # (B, T, C) → (B, T, C)
        batch, length, _ = x.shape
        q, k, v = self.heads_of(x, cache.length if cache is not None else 0)
        if cache is not None:
            k, v = cache.extend(k=k, v=v)
        dropout = self.dropout if self.training else 0.0
        y = attend(
            q,
            k,
            v,
            implementation=self.implementation,
            dropout=dropout,
            cached=cache is not None,
            causal=self.causal and mask is None,
            mask=mask,
        )
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))

    def heads_of(self, x: torch.Tensor, start: int = 0) -> list[torch.Tensor]:
        """q, k, v (B, H, T, d) of x, whose first token is at `start`."""
        qkv = self.qkv(x).view(*x.shape[:2], -1, 3, self.head_width)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
        if self.rotary is not None:
            q, k = self.rotary(q, start), self.rotary(k, start)
        return [q, k, v]

    def weights_of_heads(self) -> list[tuple[nn.Parameter, Callable]]:
        """The weights of which each head has its own part, with how a tensor of that shape is divided: (H, n)."""
        heads = self.out.weight.size(1) // self.head_width
        return [
            (self.qkv.weight, lambda w: w.reshape(heads, -1)),
            (self.out.weight, lambda w: columns_of_heads(w, heads)),
        ]

    def looked_at(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For x (B, T, C), fp32 and before the mask: ⟨q, k⟩ / √d, and what softmax is taken of, here the same."""
        q, k, _ = (part.float() for part in self.heads_of(x))
        with torch.autocast(x.device.type, enabled=False):
            scores = products(q, k) / math.sqrt(self.head_width)
        return scores, scores
