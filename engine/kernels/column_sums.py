"""Sums of a matrix's columns, added to fp32 totals, in Triton: the gradient of a bias, read from memory once.

A compiler's sum over so many rows reads them again for whatever it fuses with the sum. The sums of a part of the rows
are written down and added up in order, without atomic operations: two runs have the same bits.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 32, 128  # of a tile, which a program reads at once
PROGRAMS = 1024  # that read at the same time, roughly: enough to keep a GPU's memory busy
WARPS = 4  # of a program
COLUMNS_ADDED = 32  # by one program of the second kernel


def add_(total: torch.Tensor, rows: torch.Tensor) -> None:
    """total (n,) fp32 += the sum of rows (m, n) over m, summed in fp32; on a GPU."""
    rows = rows.contiguous()
    m, n = rows.shape
    grid, each = spread(m, n, ROWS, COLUMNS, PROGRAMS)
    partial = total.new_empty(grid[1], n)
    _sum_part[grid](rows, partial, m, n, each, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS)
    add_parts_(total, partial)


def spread(m: int, n: int, rows: int, columns: int, programs: int) -> tuple[tuple[int, int], int]:
    """How to share (m, n) among so many programs, roughly: the grid (across, parts), and the tiles of each part."""
    across = triton.cdiv(n, columns)
    tiles = triton.cdiv(m, rows)
    each = triton.cdiv(tiles, max(1, programs // across))
    return (across, triton.cdiv(tiles, each)), each


def add_parts_(total: torch.Tensor, partial: torch.Tensor) -> None:
    """total (n,) += the sum of partial (parts, n) over its parts, in their order."""
    parts, n = partial.shape
    _add_parts[(triton.cdiv(n, COLUMNS_ADDED),)](
        partial, total, parts, n, PARTS=triton.next_power_of_2(parts), COLUMNS=COLUMNS_ADDED
    )


@triton.jit
def _sum_part(rows, partial, m, n, each, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """partial[p] = the sum of the p-th `each` tiles of rows (m, n)."""
    column, part = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(each):
        row = (part * each + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < m)[:, None] & (column < n)[None, :]
        at = row.to(tl.int64)[:, None] * n + column[None, :]  # m · n may be above 2³¹
        sums += tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(partial + part * n + column, tl.sum(sums, 0), mask=column < n)


@triton.jit
def _add_parts(partial, total, parts, n, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """total (n,) += the sum of partial (parts, n) over its parts."""
    column, part = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & (column < n)[None, :]
    sums = tl.sum(tl.load(partial + part[:, None] * n + column[None, :], mask=inside, other=0.0), 0)
    before = tl.load(total + column, mask=column < n, other=0.0)
    tl.store(total + column, before + sums, mask=column < n)
