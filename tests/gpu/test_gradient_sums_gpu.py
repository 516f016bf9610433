"""Gradients of biases on a GPU: the kernel's sums, in the same bits each time, and sooner than the compiler's."""

import pytest
import torch

from engine.gradient_sums import add_columns_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 5), (31, 129), (33, 768), (4099, 2304), (32768, 3072), (70000, 96)]
)
def test_columns_are_summed_in_fp32_in_one_order(shape, dtype):
    """Of whole numbers below 8, whose sums of up to 70,000 rows fp32 holds exactly, whatever the order."""
    draw = torch.Generator("cuda").manual_seed(1)
    rows = torch.randint(8, shape, generator=draw, device="cuda").to(dtype)
    total = torch.arange(shape[1], device="cuda", dtype=torch.float32)
    add_columns_(total, rows)
    assert torch.equal(total.double(), rows.double().sum(0) + torch.arange(shape[1], device="cuda"))


def test_rows_that_are_not_contiguous_and_the_same_bits_twice():
    rows = torch.randn(768, 5000, device="cuda").t()
    totals = torch.zeros(2, 768, device="cuda")
    for total in totals:
        add_columns_(total, rows)
    assert torch.equal(*totals)
    torch.testing.assert_close(totals[0].double(), rows.double().sum(0), rtol=1e-4, atol=1e-3)


def test_a_matrix_is_read_once():
    """GPT-2's widest, 32,768 × 3,072 in bf16. A copy also writes as much: twice the time."""
    rows = torch.randn(32768, 3072, device="cuda", dtype=torch.bfloat16)
    total, copy = torch.zeros(3072, device="cuda"), torch.empty_like(rows)
    summed, copied = (fastest(work) for work in (lambda: add_columns_(total, rows), lambda: copy.copy_(rows)))
    assert summed < copied


def fastest(work, turns: int = 20, calls: int = 10) -> float:
    """Milliseconds of the fastest of so many turns, each of several calls in one CUDA graph: no launch is counted."""
    work()  # compiles what it needs before anything is captured
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    for _ in range(turns):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
