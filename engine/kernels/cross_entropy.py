"""Softmax statistics of rows of logits, and the gradient of cross-entropy written over them, in Triton.

One program takes one row: a first pass over it finds its largest logit and the sum of exponentials, a second one
overwrites it. Programs are large, so that few rows are under way at a time: they are meant to fit into the L2 cache,
where the second pass then finds its row (two or three rows of 100 KB on each of an H200's 132 multiprocessors: 26 to
40 MB of 50).
"""

import torch
import triton
import triton.language as tl

from engine import parallel
from engine.data.batches import IGNORED

MAX_BLOCK = 8192  # columns that a program takes at a time
COLUMNS_PER_WARP = 512  # 16 a thread: two loads of 16 bytes in bf16


def statistics_and_gradient_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocabulary,
    *,
    write: bool,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same as engine.losses.statistics_and_gradient_, for tensors on a GPU."""
    group, targets = vocabulary.group, targets.contiguous()
    statistics = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    _launch(logits, targets, statistics, vocabulary, scale, read=True, write=write and group is None)
    if group is not None:
        own = statistics[0].clone()
        parallel.largest(statistics[0], group)
        statistics[1].mul_((own - statistics[0]).exp_())
        parallel.summed(statistics[1:], group)
        if write:
            _launch(logits, targets, statistics, vocabulary, scale, read=False, write=True)
    return statistics


def _launch(logits, targets, statistics, vocabulary, scale, *, read: bool, write: bool) -> None:
    rows, columns = logits.shape
    first, classes = vocabulary.part(columns)
    block = min(MAX_BLOCK, max(32, triton.next_power_of_2(columns)))
    _rows[(rows,)](
        logits,
        targets,
        statistics,
        statistics if scale is None else scale,
        rows,
        logits.stride(0),
        first,
        SIZE=vocabulary.size,
        CLASSES=classes,
        COLUMNS=columns,
        IGNORED=IGNORED,
        BLOCK=block,
        READ=read,
        WRITE=write,
        SCALED=scale is not None,
        num_warps=max(1, block // COLUMNS_PER_WARP),
    )


@triton.jit
def _rows(
    logits,  # (rows, COLUMNS), rows `stride` apart
    targets,  # (rows,) int64, classes of the whole vocabulary
    statistics,  # (3, rows) fp32: largest logit, sum of exp(logit - largest), target's logit
    gradient_scale,  # one fp32 number; read only if SCALED
    rows,
    stride,
    first,  # class of column 0
    SIZE: tl.constexpr,  # classes of the whole vocabulary
    CLASSES: tl.constexpr,  # columns that are classes; those behind are padding
    COLUMNS: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
    READ: tl.constexpr,  # fill the statistics; otherwise take them as given
    WRITE: tl.constexpr,  # overwrite the logits with their gradient
    SCALED: tl.constexpr,  # times gradient_scale
):
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    target = tl.load(targets + index).to(tl.int32)
    column = target - first  # of the target; outside 0 … CLASSES - 1 if it is ignored or not in this part
    if READ:
        # Loaded before the passes: once one warp writes the gradient, the logit may be gone for the others.
        is_here = (column >= 0) & (column < CLASSES)
        target_logit = tl.load(row + column, mask=is_here, other=0.0).to(tl.float32)
        largest, total = _largest_and_sum(row, CLASSES, COLUMNS, BLOCK)
        tl.store(statistics + index, largest)
        tl.store(statistics + rows + index, total)
        tl.store(statistics + 2 * rows + index, target_logit)
    else:
        largest = tl.load(statistics + index)
        total = tl.load(statistics + rows + index)
    if WRITE:
        is_class = (target >= 0) & (target < SIZE)
        scale = tl.where(is_class, 1.0 / total, float("nan"))
        scale = tl.where(target == IGNORED, 0.0, scale)
        one = 1.0
        if SCALED:
            one = tl.load(gradient_scale)
            scale = scale * one
        _write_gradient(row, column, largest, scale, one, CLASSES, COLUMNS, BLOCK)


@triton.jit
def _largest_and_sum(row, CLASSES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit x of a row, and the sum of exp(x - largest), in one pass.

    The sum is kept apart for each lane, so that a block costs one reduction, not two.
    """
    WHOLE: tl.constexpr = CLASSES // BLOCK * BLOCK  # columns in whole blocks of classes need no mask
    lanes = tl.arange(0, BLOCK)
    largest = -3.0e38  # finite: a part without any class must not give inf - inf
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, WHOLE, BLOCK):
        x = tl.load(row + start + lanes, eviction_policy="evict_last").to(tl.float32)
        largest, sums = _with_block(largest, sums, x)
    if WHOLE < CLASSES:
        x = _masked(row, WHOLE + lanes, CLASSES, COLUMNS)
        largest, sums = _with_block(largest, sums, x)
    return largest, tl.sum(sums, axis=0)


@triton.jit
def _with_block(largest, sums, x):
    """Online softmax (Milakov and Gimelshein 2018): take the block x into the largest logit and the sums."""
    new = tl.maximum(largest, tl.max(x, axis=0))
    return new, sums * tl.exp(largest - new) + tl.exp(x - new)


@triton.jit
def _masked(row, columns, CLASSES: tl.constexpr, COLUMNS: tl.constexpr):
    """The logits of `columns`, -inf where there is no class.

    The mask of the load ends at COLUMNS, which is a round number where the vocabulary is padded: a mask that
    ended inside a vector would make Triton load single elements.
    """
    x = tl.load(row + columns, mask=columns < COLUMNS, other=-float("inf")).to(tl.float32)
    return tl.where(columns < CLASSES, x, -float("inf"))


@triton.jit
def _write_gradient(
    row, column, largest, scale, one, CLASSES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """Overwrite a row of logits with one * (softmax - onehot(column)); one * softmax is exp(x - largest) * scale.

    The stores are streamed: they must not drive the rows of other programs out of the L2 cache.
    """
    WHOLE: tl.constexpr = CLASSES // BLOCK * BLOCK
    lanes = tl.arange(0, BLOCK)
    for start in range(0, WHOLE, BLOCK):
        columns = start + lanes
        x = tl.load(row + columns, eviction_policy="evict_first").to(tl.float32)
        p = tl.exp(x - largest) * scale
        tl.store(row + columns, tl.where(columns == column, p - one, p), cache_modifier=".cs")
    for start in range(WHOLE, COLUMNS, BLOCK):
        columns = start + lanes
        x = _masked(row, columns, CLASSES, COLUMNS)
        p = tl.exp(x - largest) * scale
        gradient = tl.where(columns == column, p - one, p)
        tl.store(row + columns, gradient, mask=columns < COLUMNS, cache_modifier=".cs")
