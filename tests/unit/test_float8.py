"""Float8 Linears: which ones, how far from bf16, and what stops a run that cannot have them.

Without such a GPU torchao rounds to float8 and multiplies in fp32 (emulate); tests/gpu has the real products.
"""

import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from engine import float8
from engine.config import resolve
from engine.models import gpt

VOCABULARY = 61
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def model(**changes) -> gpt.GPT:
    settings = {"layers": 2, "heads": 2, "width": 32, "context": 16, **changes}
    torch.manual_seed(1)
    return gpt.build(resolve(settings, "test").model, VOCABULARY)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (4, 16), generator=draw) for _ in range(2))


def loss_of(m: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = m(inputs)[0]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def classes(m: gpt.GPT) -> set[str]:
    return {type(x).__name__ for x in m.layers.modules() if isinstance(x, nn.Linear)}


# --- what is converted


def test_the_linears_of_the_blocks_are_converted_and_nothing_else():
    m = model(tie_embeddings=False)
    parameters, names = list(m.parameters()), list(m.state_dict())
    float8.convert(m, emulate=True)
    assert classes(m) == {"Float8Linear"} and type(m.head) is nn.Linear
    assert list(m.state_dict()) == names
    assert all(p is q for p, q in zip(m.parameters(), parameters, strict=True))
    (line,) = float8.lines(m, True)
    assert (line.in_effect, line.agrees) == ("8 of 8 linear layers of the blocks", True)


def test_a_size_that_the_hardware_does_not_take_stays_as_it_was_and_disagrees():
    m = model(width=40, heads=2)  # 40 and 120 are no multiples of 16, and 160 comes with 40
    float8.convert(m, emulate=True)
    assert classes(m) == {"Linear"}
    (line,) = float8.lines(m, True)
    assert (line.in_effect, line.agrees) == ("0 of 8 linear layers of the blocks", False)


def test_the_ledger_shows_float8_that_is_off_or_that_nobody_asked_for():
    m = model()
    assert float8.lines(m, False) == []
    assert [line.agrees for line in float8.lines(m, True)] == [False]
    float8.convert(m, emulate=True)
    assert [line.agrees for line in float8.lines(m, False)] == [False]


# --- what it computes


def test_loss_and_gradients_are_those_of_bf16_to_float8_precision():
    """e5m2, for gradients, has 2 bits of mantissa: a rounding error of up to 1/8 a number."""
    exact, rounded = model(), model()
    float8.convert(rounded, emulate=True)
    losses = [loss_of(m, *batch()) for m in (exact, rounded)]
    for loss in losses:
        loss.backward()
    assert losses[0] != losses[1] and losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)
    for (name, p), q in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        error = (p.grad - q.grad).norm() / p.grad.norm()
        assert 0 < error < 0.2, (name, error)


def test_training_follows_bf16():
    found = []
    for convert in (False, True):
        m = model()
        if convert:
            float8.convert(m, emulate=True)
        optimizer = torch.optim.AdamW(m.parameters(), lr=3e-3)
        losses = []
        for step in range(20):
            loss = loss_of(m, *batch(step % 2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append(losses)
    assert found[0][-1] < 0.8 * found[0][0]
    assert found[1] == pytest.approx(found[0], rel=0.01)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_block_has_no_graph_break():
    plain, compiled = model(), model()
    for m in (plain, compiled):
        float8.convert(m, emulate=True)
    for block in compiled.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    losses = [loss_of(m, *batch()) for m in (plain, compiled)]
    losses[1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert all(p.grad.isfinite().all() for p in compiled.parameters())


# --- what stops it


def test_nothing_is_checked_where_it_is_not_wanted(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert float8.check(False, CPU, 7) == []


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert float8.check(True, CUDA, 32) == [
        "float8 = true: needs torchao, which is not installed: pip install torchao"
    ]


def test_a_cpu_has_no_float8_products():
    assert float8.check(True, CPU, 32) == ["float8 = true: needs a GPU, and this run is on the CPU"]


@pytest.mark.parametrize(
    ("capability", "tokens", "problems"),
    [
        ((8, 9), 32, []),
        ((9, 0), 0, []),
        ((9, 0), 40, ["float8 = true: a micro-batch has 40 tokens; must be a multiple of 16"]),
        (
            (8, 6),
            16,
            ["float8 = true: needs a GPU of compute capability ≥ 8.9; NVIDIA RTX A6000 has 8.6"],
        ),
    ],
)
def test_the_gpu_and_the_batch_must_have_it(monkeypatch, capability, tokens, problems):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA RTX A6000")
    assert float8.check(True, CUDA, tokens) == problems
