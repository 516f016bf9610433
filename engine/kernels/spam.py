"""SPAM's update of one parameter in one pass, in Triton: seven reads and writes of fp32 an entry, as fused AdamW has.

The formula is in engine/optimizers/spam.py, whose `plain` does the same.
"""

import triton
import triton.language as tl

BLOCK = 2048  # entries that a program takes
WARPS = 8


def update_(p, g, m, v, scalars, keys, i: int, counters, rule, place) -> None:
    """The same as engine.optimizers.spam.plain, for contiguous fp32 tensors on a GPU."""
    clipped, largest, zeroed, number = counters
    _update[(triton.cdiv(p.numel(), BLOCK),)](
        p,
        g.contiguous(),
        m,
        v,
        scalars,
        scalars if keys is None else keys,
        clipped,
        largest,
        zeroed,
        i,
        number,
        p.numel(),
        float(rule.lr),
        float(rule.decay),
        float(rule.beta1),
        float(1 - rule.beta1),
        float(rule.beta2),
        float(1 - rule.beta2),
        float(rule.epsilon),
        round(rule.density * 2**32),
        *(place or (1, 1, 0, 0)),
        MASKED=place is not None,
        SCALARS=scalars.size(1),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


@triton.jit
def _mixed(x):
    """murmur3's last steps, of uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["i", "number", "lr", "decay", "first_row", "first_column", "drawn_below"])
def _update(
    p,
    g,
    m,
    v,
    scalars,  # (…, SCALARS) fp32, of which row i: applied, kept, size, root, s, threshold
    keys,  # (…,) int64, of which entry i; read only if MASKED
    clipped,  # (…,) int64 and
    largest,  # (…,) fp32 and
    zeroed,  # (…,) int64, of which entry `number` is added to
    i,
    number,
    entries,
    lr,
    decay,
    beta1,
    rest1,  # 1 - beta1
    beta2,
    rest2,
    epsilon,
    drawn_below,  # of 2³²
    columns,  # of this part, and where it is in the whole
    whole_columns,
    first_row,
    first_column,
    MASKED: tl.constexpr,
    SCALARS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    applied = tl.load(scalars + i * SCALARS)
    here = at < tl.where(applied != 0, entries, 0)  # a refused update reads and writes nothing
    kept = tl.load(scalars + i * SCALARS + 1)
    size = tl.load(scalars + i * SCALARS + 2)
    root = tl.load(scalars + i * SCALARS + 3)
    threshold = tl.load(scalars + i * SCALARS + 5)  # infinite where nothing is cut
    gradient = tl.load(g + at, mask=here, other=0.0)
    first = tl.load(m + at, mask=here, other=0.0)
    second = tl.load(v + at, mask=here, other=0.0)
    first = tl.where(kept != 0, first, 0.0)
    second = tl.where(kept != 0, second, 0.0)
    # Observed, not believed: the ledger compares this with how many were due.
    without = tl.sum((here & (kept == 0) & (first == 0) & (second == 0)).to(tl.int32), axis=0)
    if without > 0:
        tl.atomic_add(zeroed + number, without.to(tl.int64), sem="relaxed")
    if MASKED:
        place = (at // columns + first_row) * whole_columns + at % columns + first_column
        key = tl.load(keys + i).to(tl.uint32)
        hashed = _mixed(_mixed(place.to(tl.uint32)) ^ key)
        gradient = tl.where(hashed.to(tl.int64) < drawn_below, gradient, 0.0)
    fresh = second == 0
    limit = tl.where(fresh, float("inf"), tl.sqrt(threshold * second))
    cut = tl.where(gradient > limit, limit, tl.where(gradient < -limit, -limit, gradient))
    compared = (second != 0) & (threshold != float("inf"))
    ratio = tl.where(compared, gradient * gradient / tl.where(fresh, 1.0, second), 0.0)
    count = tl.sum((cut != gradient).to(tl.int32), axis=0)
    if count > 0:
        tl.atomic_add(clipped + number, count.to(tl.int64), sem="relaxed")
    tl.atomic_max(largest + number, tl.minimum(tl.max(ratio, axis=0), 3.0e38), sem="relaxed")
    first = beta1 * first + rest1 * cut
    second = beta2 * second + rest2 * cut * cut
    weight = tl.load(p + at, mask=here, other=0.0)
    weight = weight * decay - lr * size * first / (tl.sqrt(second) / root + epsilon)
    tl.store(p + at, weight, mask=here)
    tl.store(m + at, first, mask=here)
    tl.store(v + at, second, mask=here)
