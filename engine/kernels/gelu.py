"""Exact GELU of 16-bit numbers in Triton, and its gradient together with the sums of that gradient's columns.

What comes out of the gradient is also what the bias of the layer before is trained by: summed here while it is in
registers, it is not read from memory again.
"""

import math

import torch
import triton
import triton.language as tl

from engine.kernels import column_sums
from engine.models.mlp import ERF_A, ERF_P

BLOCK = 2048  # elements of a program of the forward pass
ROWS, COLUMNS = 16, 128  # of a tile of the gradient, which a program reads at once
PROGRAMS = 2112  # that make the gradient at the same time, roughly: 16 for each of 132 multiprocessors
WARPS = 4  # of a program

# As in engine.models.mlp.shared_gelu: in terms of t = 1 / (1 + SCALE |x|), and of e^(-x²/2) as a power of two.
SCALE = tl.constexpr(ERF_P / math.sqrt(2))
HALF_LOG2_E = tl.constexpr(0.5 / math.log(2))
DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))  # of the normal distribution at 0
A1, A2, A3, A4, A5 = (tl.constexpr(a) for a in ERF_A)


def forward(x: torch.Tensor) -> torch.Tensor:
    """x Φ(x), of any shape."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _forward[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return y


def gradient_(x: torch.Tensor, gradient: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The gradient for x (…, n) from that for x Φ(x); total (n,) fp32 += the sums of its columns."""
    x, gradient = x.contiguous(), gradient.contiguous()
    result, n = torch.empty_like(x), x.size(-1)
    grid, each = column_sums.spread(x.numel() // n, n, ROWS, COLUMNS, PROGRAMS)
    partial = total.new_empty(grid[1], n)
    _gradient[grid](
        x, gradient, result, partial, x.numel() // n, n, each, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
    )
    column_sums.add_parts_(total, partial)
    return result


@triton.jit
def _normal(x):
    """Φ(x), and e^(-x²/2)."""
    exponential = tl.exp2(-HALF_LOG2_E * x * x)
    t = 1.0 / (1.0 + SCALE * tl.abs(x))
    tail = 0.5 * exponential * t * (A1 + t * (A2 + t * (A3 + t * (A4 + t * A5))))
    return tl.where(x > 0, 1.0 - tail, tail), exponential


@triton.jit
def _forward(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    phi, _ = _normal(value)
    tl.store(y + at, (value * phi).to(y.dtype.element_ty), mask=at < size)


@triton.jit
def _gradient(x, gradient, result, partial, m, n, each, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """result (m, n), and partial[p] = the sum of its p-th `each` tiles, of what was written."""
    column, part = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(each):
        row = (part * each + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < m)[:, None] & (column < n)[None, :]
        at = row.to(tl.int64)[:, None] * n + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        phi, exponential = _normal(value)
        slope = phi + value * exponential * DENSITY
        written = (tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * slope).to(
            result.dtype.element_ty
        )
        tl.store(result + at, written, mask=inside)
        sums += written.to(tl.float32)
    tl.store(partial + part * n + column, tl.sum(sums, 0), mask=column < n)
