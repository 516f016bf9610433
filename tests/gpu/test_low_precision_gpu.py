"""8-bit moments, offloaded state, loss scale and float8 where they matter: on a GPU.

Needs bitsandbytes and torchao for the tests of theirs.
"""

import importlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from engine_runs import assert_same_weights

from engine import float8, optimizers
from engine.checkpoint import Checkpoints
from engine.config import Optimizer, resolve
from engine.loss_scale import LossScale
from engine.models import gpt
from engine.offload import offload
from engine.optimizers import ON_DEVICE_ONLY, OPTIMIZERS
from engine.optimizers.groups import decay_groups
from engine.optimizers.observe import state_tensors
from engine.parallel import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

MIB = 2**20
CHUNK = 10 * MIB
STATE_BYTES = {"adamw": 8, "adam": 8, "sgd": 4, "adamw8bit": 2}  # a parameter, but for what is small
STATE_BYTES |= {"spam": 8, "adamwspam_legacy": 12}
STATE_BYTES["adamwprune"] = 8
STATE_BYTES["muon"] = 8  # of what is no matrix of a block: see test_muon_gpu.py


def wide_model(seed: int = 1) -> nn.Sequential:
    """4 MiB of weights in fp32, four times."""
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))).cuda()


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    settings = Optimizer(optimizer=name, lr=1e-2)
    return importlib.import_module(OPTIMIZERS[name]).build(decay_groups(model, 0.1), settings)


def advance(model: nn.Module, optimizer, steps: int, seed: int = 0) -> None:
    draw = torch.Generator("cuda").manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw, device="cuda")
        optimizer.step()
        optimizer.zero_grad()


def allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def assert_same_state(left: nn.Module, left_optimizer, right: nn.Module, right_optimizer) -> None:
    assert_same_weights(left.state_dict(), right.state_dict())
    for p, q in zip(left.parameters(), right.parameters(), strict=True):
        for key, value in left_optimizer.state[p].items():
            found = torch.as_tensor(right_optimizer.state[q][key]).cpu()
            assert torch.equal(torch.as_tensor(value).cpu(), found), key


class no_waiting:
    """Any wait of the host for the GPU inside is an error."""

    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


no_warning_of_the_mode = pytest.mark.filterwarnings("ignore:Synchronization debug mode")


# --- state in host memory


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ON_DEVICE_ONLY])
def test_offload_frees_the_states_bytes_and_changes_no_bit(name):
    plain, moved = wide_model(), wide_model()
    plain_optimizer, moved_optimizer = optimizer_of(plain, name), optimizer_of(moved, name)
    offload(moved_optimizer, chunk_bytes=CHUNK)
    grown = []
    for model, optimizer in ((plain, plain_optimizer), (moved, moved_optimizer)):
        before = allocated() - sum(t.nbytes for t in state_tensors(optimizer) if t.is_cuda)
        advance(model, optimizer, 3)
        grown.append(allocated() - before)
    parameters = sum(p.numel() for p in plain.parameters())
    assert grown[0] >= STATE_BYTES[name] * parameters
    assert grown[1] < 0.01 * grown[0] + 64 * 1024  # bitsandbytes' two maps stay on the device
    assert_same_state(plain, plain_optimizer, moved, moved_optimizer)
    line = {
        x.what: x
        for x in optimizers.lines(Optimizer(optimizer=name, optimizer_offload=True), moved_optimizer)
    }
    assert line["optimizer_offload"].agrees and line["optimizer_offload"].in_effect == "cpu, pinned"


def test_only_a_chunk_is_on_the_gpu_during_a_step():
    model = wide_model()
    optimizer = offload(optimizer_of(model, "adamw"), chunk_bytes=CHUNK)
    advance(model, optimizer, 1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    assert optimizer.offload.chunks == 4 and optimizer.offload.largest_bytes <= CHUNK
    assert 8 * MIB <= torch.cuda.max_memory_allocated() - before <= CHUNK
    assert allocated() == before


@no_warning_of_the_mode
def test_the_host_does_not_wait_for_the_copies():
    model = wide_model()
    optimizer = offload(optimizer_of(model, "adamw"), chunk_bytes=CHUNK)
    advance(model, optimizer, 1)
    with no_waiting():
        advance(model, optimizer, 3)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("on_host", [False, True])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, monkeypatch, name, on_host):
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    checkpoints = Checkpoints("name", Ranks(0, 1, torch.device("cuda", 0)))
    (model, optimizer), (other, resumed) = (
        (m, optimizer_of(m, name)) for m in (wide_model(1), wide_model(2))
    )
    if on_host:
        offload(optimizer, chunk_bytes=CHUNK)
        offload(resumed, chunk_bytes=CHUNK)
    advance(model, optimizer, 3)
    checkpoints.save(3, model, optimizer, tmp_path, {})
    advance(model, optimizer, 2, seed=5)
    assert checkpoints.restore(other, resumed, tmp_path, {}) == 3
    if on_host:
        assert all(t.is_pinned() for t in state_tensors(resumed))
    advance(other, resumed, 2, seed=5)
    assert_same_state(model, optimizer, other, resumed)


# --- 8-bit moments


@no_warning_of_the_mode
def test_the_host_does_not_wait_for_eight_bit_kernels_whose_numbers_stay_bitsandbytes_own(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    own, theirs = wide_model(), wide_model()
    own_optimizer = optimizer_of(own, "adamw8bit")
    theirs_optimizer = bitsandbytes.optim.AdamW8bit(decay_groups(theirs, 0.1), lr=1e-2, betas=(0.9, 0.95))
    for seed in (1, 2):
        advance(theirs, theirs_optimizer, 2, seed)
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", lambda _: pytest.fail("the host waits"))
    advance(own, own_optimizer, 2, 1)
    with no_waiting():
        advance(own, own_optimizer, 2, 2)
    assert_same_state(own, own_optimizer, theirs, theirs_optimizer)


# --- loss scale


@no_warning_of_the_mode
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("on_host", [False, True])
def test_a_step_that_is_not_finite_is_skipped_on_the_gpu(name, on_host):
    model = wide_model()
    optimizer = optimizer_of(model, name)
    if on_host:
        offload(optimizer, chunk_bytes=CHUNK)
    scale = LossScale(1024.0, torch.device("cuda"))
    parameters = list(model.parameters())

    def step(spoilt: bool):
        for p in parameters:
            p.grad = torch.full_like(p, 2.0)
        if spoilt:
            parameters[0].grad[:1] = float("inf")
        scale.unscale(parameters)
        scale.step(optimizer, nn.utils.get_total_norm([p.grad for p in parameters]))

    def held():
        torch.cuda.synchronize()
        states = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
        return [t.detach().clone() for t in (*parameters, *states)]

    step(spoilt=True)  # before there is any state
    step(spoilt=False)
    assert parameters[0].isfinite().all()
    before = held()
    with no_waiting():
        step(spoilt=True)
    assert all(torch.equal(a, b) for a, b in zip(before, held(), strict=True))
    with no_waiting():
        step(spoilt=False)
    assert not torch.equal(before[0], parameters[0])
    assert (scale.scale.item(), scale.skipped.item(), scale.steps) == (256, 2, 4)


# --- float8


@pytest.fixture
def hopper():
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < float8.CAPABILITY:
        pytest.skip("needs float8 products")


def small_gpt() -> gpt.GPT:
    settings = {"layers": 4, "heads": 4, "width": 256, "context": 128}
    torch.manual_seed(1)
    return gpt.build(resolve(settings, "test").model, 256).cuda()


def trained(model: gpt.GPT, steps: int = 20) -> list[float]:
    """Losses on one batch, over and over."""
    draw = torch.Generator("cuda").manual_seed(1)
    inputs, targets = (torch.randint(256, (8, 128), generator=draw, device="cuda") for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    for _ in range(steps):
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(inputs)[0]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore")  # torchao's and the compiler's own
@pytest.mark.parametrize("compiled", [False, True])
def test_float8_trains_beside_bf16(hopper, compiled):
    """Within 5 % of bf16's loss at each of 20 steps, in which it falls to a third on one batch."""
    assert float8.check(True, torch.device("cuda", 0), 8 * 128) == []
    model, reference = small_gpt(), small_gpt()
    float8.convert(model)
    if compiled:
        for block in model.layers:
            block.compile(fullgraph=True)
    losses, expected = trained(model), trained(reference)
    assert expected[-1] < 0.5 * expected[0]
    assert losses == pytest.approx(expected, rel=0.05) and losses != expected
    (line,) = float8.lines(model, True)
    assert line.agrees and line.in_effect == "16 of 16 linear layers of the blocks"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trained(model, 1)
    assert "aten::_scaled_mm" in {event.key for event in profile.key_averages()}


def test_a_size_that_float8_does_not_take_is_refused_before_it_fails(hopper):
    assert "must be a multiple of 16" in float8.check(True, torch.device("cuda", 0), 8 * 129)[0]
