"""Gradients of biases on a GPU: the kernels' sums, in the same bits each time, and sooner than the compiler's."""

import pytest
import torch

from engine.gradient_sums import add_columns_, gelu, gelu_gradient_

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


@pytest.mark.parametrize("dtype, within", [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 31, 129), (4099, 300), (32768, 3072)])
def test_gelu_and_its_gradient_with_the_sums_of_its_columns(shape, dtype, within):
    """Against torch's in fp32; `within` is the rounding of one number, and small ones near 0 by 4e-7."""
    draw = torch.Generator("cuda").manual_seed(1)
    x, upstream = (3 * torch.randn(shape, generator=draw, device="cuda").to(dtype) for _ in range(2))
    total = torch.ones(shape[-1], device="cuda")
    gradient = gelu_gradient_(x, upstream, total)
    for found, expected in (
        (gelu(x, total), torch.nn.functional.gelu(x.float())),
        (gradient, torch.ops.aten.gelu_backward(upstream.float(), x.float())),
    ):
        torch.testing.assert_close(found.float(), expected, rtol=within, atol=1e-5)
    sums = gradient.double().flatten(0, -2).sum(0)
    torch.testing.assert_close(total.double() - 1, sums, rtol=1e-4, atol=2e-3)
    again = torch.ones(shape[-1], device="cuda")
    assert torch.equal(gelu_gradient_(x, upstream, again), gradient) and torch.equal(again, total)


def test_a_gradient_of_gelu_and_its_sums_cost_less_than_it_and_a_second_reading():
    x, upstream = (torch.randn(32768, 3072, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    total = torch.zeros(3072, device="cuda")
    together = fastest(lambda: gelu_gradient_(x, upstream, total))
    apart = fastest(lambda: add_columns_(total, torch.ops.aten.gelu_backward(upstream, x)))
    assert together < apart


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
