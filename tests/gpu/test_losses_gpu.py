"""The loss on a GPU: the Triton kernel against float64, its memory and speed, and that the host never waits.

Needs pytest, torch and triton.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F

from engine import losses, parallel
from engine.data.batches import IGNORED
from engine.objectives import NextToken

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

IN_PLACE = ("fused", "chunked")
UPSTREAM = 0.37
# Relative error in the 2-norm; the GPU's exp is good to a few ulp.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LOSS_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}


def case(classes: int, rows: int, tokens: tuple[int, int] = (2, 1024), width: int = 256):
    """hidden, weight, targets; a tenth of the targets ignored, and padding rows that would win."""
    draw = torch.Generator("cuda").manual_seed(3)
    hidden = torch.randn(*tokens, width, device="cuda", generator=draw)
    weight = torch.randn(rows, width, device="cuda", generator=draw) / 8
    weight[classes:] = 50.0
    targets = torch.randint(classes, tokens, device="cuda", generator=draw)
    targets.view(-1)[::10] = IGNORED
    return hidden, weight, targets


def reference(classes: int, hidden, weight, targets):
    """Loss, and the gradients for hidden and weight, in float64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = (hidden @ weight.t())[..., :classes].flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    (UPSTREAM * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


def computed(objective: NextToken, dtype: torch.dtype, hidden, weight, targets):
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
        loss = objective(hidden, weight, targets)
    (UPSTREAM * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


# --- what it computes


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("classes", "rows"),
    [(50_257, 50_304), (50_257, 50_257), (61, 64), (8192, 8192), (8192, 16_448), (20_000, 20_000)],
    ids=str,
)
@pytest.mark.parametrize("kernel", IN_PLACE)
def test_loss_and_gradients_are_those_of_float64(kernel, classes, rows, dtype):
    objective, inputs = NextToken(classes, kernel, 600), case(classes, rows)  # 2048 = 3 × 600 + 248
    loss, *gradients = computed(objective, dtype, *inputs)
    expected = reference(classes, *inputs)
    assert objective.operand_dtype is dtype and gradients[1].dtype == torch.float32
    assert error(loss, expected[0]) <= LOSS_TOLERANCE[dtype]
    for gradient, wanted in zip(gradients, expected[1:], strict=True):
        assert error(gradient, wanted) <= TOLERANCE[dtype]
    assert gradients[0].view(-1, gradients[0].size(-1))[::10].count_nonzero() == 0
    assert gradients[1][classes:].count_nonzero() == 0
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
        assert error(objective(*inputs), expected[0]) <= LOSS_TOLERANCE[dtype]


class Part:
    """Stands in for a process group of which this process is one part; nothing is exchanged."""

    def __init__(self, rank: int):
        self._rank = rank

    def rank(self) -> int:
        return self._rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [None, 0, 1, 2], ids=["alone", "first", "padded", "only-padding"])
@pytest.mark.parametrize("write", [True, False])
def test_the_kernel_does_what_torch_does(monkeypatch, rank, write, dtype):
    """Statistics and gradient of one matrix of logits, also of a part of the vocabulary."""
    from engine.kernels import cross_entropy

    for name in ("largest", "summed"):
        monkeypatch.setattr(parallel, name, lambda tensor, _group: tensor)
    size, columns = (15_000, 10_048) if rank is not None else (10_000, 10_048)
    vocabulary = losses.Vocabulary(size, None if rank is None else Part(rank))
    draw = torch.Generator("cuda").manual_seed(4)
    logits = (3 * torch.randn(67, columns, device="cuda", generator=draw)).to(dtype)
    targets = torch.randint(size, (67,), device="cuda", generator=draw)
    targets[3], targets[5] = IGNORED, size  # the second is no class
    found, expected = logits.clone(), logits.clone()
    options = {"write": write, "scale": torch.tensor(0.37, device="cuda")}
    read = cross_entropy.statistics_and_gradient_(found, targets, vocabulary, **options)
    wanted = losses.statistics_and_gradient_(expected, targets, vocabulary, **options)
    if rank == 2:  # no class here: whatever the largest is, nothing is added to the sums
        assert read[1:].count_nonzero() == 0
        return
    torch.testing.assert_close(read, wanted, rtol=1e-5, atol=1e-5)
    if write:
        torch.testing.assert_close(
            found, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-7, equal_nan=True
        )
        assert (found[3] == 0).all() and found[5].isnan().any()
    else:
        assert torch.equal(found, logits)


def test_rows_beyond_2_to_the_31_elements_are_reached():
    """45,000 × 50,304 logits: offsets need 64 bits."""
    from engine.kernels import cross_entropy

    logits = torch.zeros(45_000, 50_304, device="cuda", dtype=torch.bfloat16)
    targets = torch.full((45_000,), 7, device="cuda")
    read = cross_entropy.statistics_and_gradient_(logits, targets, losses.Vocabulary(50_257), write=True)
    assert (read[1] == 50_257).all()
    assert logits[-1, 7].item() == pytest.approx(1 / 50_257 - 1, rel=1e-2)
    assert (
        logits[-1, 8].item() == pytest.approx(1 / 50_257, rel=1e-2)
        and logits[-1, 50_257:].count_nonzero() == 0
    )


def test_chunks_add_the_weights_gradient_in_fp32():
    """1024 chunks of the same 8 tokens: in bf16 the sum would stop growing at 256 times a summand."""
    hidden, weight, targets = case(61, 64, tokens=(1, 1))
    targets.fill_(9)
    hidden, targets = hidden.expand(1, 8192, -1).contiguous(), targets.expand(1, 8192).contiguous()
    found = computed(NextToken(61, "chunked", 8), torch.bfloat16, hidden, weight, targets)
    assert error(found[2], reference(61, hidden, weight, targets)[2]) <= TOLERANCE[torch.bfloat16]


# --- what it costs


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("kernel", IN_PLACE)
def test_the_host_never_waits_for_the_gpu(kernel):
    objective, (hidden, weight, targets) = NextToken(50_257, kernel, 600), case(50_257, 50_304)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = objective(hidden, weight, targets)
        (UPSTREAM * loss).backward()
        with torch.no_grad():
            objective(hidden, weight, targets)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_mib(kernel: str, chunk: int) -> float:
    """Memory that one forward and backward pass of 8192 tokens in bf16 takes beyond its inputs."""
    objective, (hidden, weight, targets) = NextToken(50_257, kernel, chunk), case(50_257, 50_304, (8, 1024))
    hidden = hidden.bfloat16().requires_grad_()
    weight.requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        loss = objective(hidden, weight, targets)
    (UPSTREAM * loss).backward()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def test_memory_is_that_of_the_logits_that_exist():
    peak_mib("chunked", 512)  # cuBLAS takes its workspace at the first product
    peak_mib("fused", 512)
    logits = 8192 * 50_304 * 2 / 2**20
    rest = 50_304 * 256 * (2 + 4) / 2**20 + 8192 * 256 * 2 / 2**20 + 16  # bf16 weight, gradients, statistics
    assert peak_mib("fused", 512) < logits + rest
    assert peak_mib("chunked", 512) < logits / 16 + rest
    assert peak_mib("full", 512) > 3 * logits  # bf16, fp32, and a gradient


def milliseconds(work, repeats: int = 10) -> float:
    """The median time of `work` on the device, after it has run twice."""
    times = []
    for _ in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[2:])


def test_the_kernel_is_near_memory_bandwidth():
    """At most twice the time of one read and one write of the logits; a second read would make 1.5."""
    from engine.kernels import cross_entropy

    logits = torch.randn(32_768, 50_304, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(50_257, (32_768,), device="cuda")
    vocabulary = losses.Vocabulary(50_257)
    plain = milliseconds(logits.neg_)
    kernel = milliseconds(
        lambda: cross_entropy.statistics_and_gradient_(logits, targets, vocabulary, write=True)
    )
    print(f"kernel {kernel:.3f} ms, read and write {plain:.3f} ms, ratio {kernel / plain:.2f}")
    assert kernel < 2 * plain
