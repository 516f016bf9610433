"""Optimizer state in host memory: the same numbers bit for bit, and never more on the device than a chunk.

There is no second kind of memory here, so a stand-in copies what is moved to "the device", and ruins it once
it has been moved back: state that was used in the wrong place would show.
"""

import functools
import importlib

import pytest
import torch
import torch.nn as nn
from engine_runs import assert_same_weights, column, ledger

from engine import optimizers
from engine.checkpoint import Checkpoints
from engine.config import Optimizer
from engine.offload import offload
from engine.optimizers import ON_DEVICE_ONLY, OPTIMIZERS
from engine.optimizers.groups import decay_groups
from engine.parallel import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))
CHUNK = 200_000  # bytes: of the model below at most one matrix and some biases


class Device:
    """Stands in for a GPU's memory."""

    def __init__(self):
        self.alive: dict[int, torch.Tensor] = {}
        self.largest_bytes = self.fetched = 0

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copy = tensor.clone()
        self.alive[copy.data_ptr()] = copy
        self.fetched += 1
        self.largest_bytes = max(self.largest_bytes, sum(t.nbytes for t in self.alive.values()))
        return copy

    def to_host(self, tensor: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
        if buffer is None:
            return tensor.clone()
        buffer.copy_(tensor)
        del self.alive[tensor.data_ptr()]
        tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
        return buffer


def small_model(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 64), nn.Linear(64, 128, bias=False))


def optimizer_of(model: nn.Module, name: str = "adamw", **settings) -> torch.optim.Optimizer:
    settings = Optimizer(optimizer=name, lr=1e-2, **settings)
    build = importlib.import_module(OPTIMIZERS[name]).build
    return build(decay_groups(model, 0.1), settings)


def offloaded(optimizer, chunk_bytes: int = CHUNK) -> tuple[torch.optim.Optimizer, Device]:
    device = Device()
    return (
        offload(optimizer, chunk_bytes=chunk_bytes, to_host=device.to_host, to_device=device.to_device),
        device,
    )


def advance(model: nn.Module, optimizer, steps: int, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
        optimizer.zero_grad()


def assert_same_state(left: nn.Module, left_optimizer, right: nn.Module, right_optimizer) -> None:
    """Weights and every tensor of the state, bit for bit."""
    assert_same_weights(left.state_dict(), right.state_dict())
    for p, q in zip(left.parameters(), right.parameters(), strict=True):
        assert left_optimizer.state[p].keys() == right_optimizer.state[q].keys()
        for key, value in left_optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right_optimizer.state[q][key])), key


# --- the same numbers


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ON_DEVICE_ONLY])
def test_offload_changes_no_bit(name):
    plain, moved = small_model(), small_model()
    plain_optimizer, (moved_optimizer, device) = (
        optimizer_of(plain, name),
        offloaded(optimizer_of(moved, name)),
    )
    for model, optimizer in ((plain, plain_optimizer), (moved, moved_optimizer)):
        advance(model, optimizer, 4)
    assert_same_state(plain, plain_optimizer, moved, moved_optimizer)
    assert device.fetched > 0


def test_the_groups_keep_their_settings_and_their_parameters():
    model = small_model()
    optimizer, _ = offloaded(optimizer_of(model))
    before = [list(map(id, g["params"])) for g in optimizer.param_groups]
    advance(model, optimizer, 2)
    assert [list(map(id, g["params"])) for g in optimizer.param_groups] == before
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    weights = [p.detach().clone() for p in model.parameters()]
    advance(model, optimizer, 1)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_parameters_without_a_gradient_are_left_alone():
    plain, moved = small_model(), small_model()
    optimizers_ = optimizer_of(plain), offloaded(optimizer_of(moved))[0]
    for model, optimizer in zip((plain, moved), optimizers_, strict=True):
        for turn in range(3):
            for i, p in enumerate(model.parameters()):
                p.grad = None if i == turn else torch.full_like(p, 0.1 * (i + 1))
            optimizer.step()
    assert_same_state(plain, optimizers_[0], moved, optimizers_[1])


def test_a_step_that_fails_leaves_the_groups_whole(monkeypatch):
    model = small_model()
    optimizer, _ = offloaded(optimizer_of(model))
    before = [list(g["params"]) for g in optimizer.param_groups]

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no memory left")

    advance(model, optimizer, 1)
    monkeypatch.setattr(optimizer.offload, "_to_device", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        advance(model, optimizer, 1)
    for group, params in zip(optimizer.param_groups, before, strict=True):
        assert len(group["params"]) == len(params)


def test_sharded_parameters_stay_sharded(one_rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    models = small_model(), small_model()
    for model in models:
        for layer in [*model, model]:
            fully_shard(layer, mesh=one_rank)
    plain, (moved, device) = optimizer_of(models[0]), offloaded(optimizer_of(models[1]))
    for model, optimizer in zip(models, (plain, moved), strict=True):
        for step in range(3):
            model(torch.full((4, 128), 0.1 * (step + 1))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert device.fetched > 0 and device.alive == {}
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
        assert isinstance(moved.state[q]["exp_avg"], DTensor)
        assert moved.state[q]["exp_avg"].placements == q.placements
        assert torch.equal(plain.state[p]["exp_avg"].to_local(), moved.state[q]["exp_avg"].to_local())


@pytest.fixture
def one_rank():
    """The device mesh of a process group of this process alone."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# --- in chunks


def test_only_a_chunk_is_on_the_device_and_nothing_between_steps():
    model = small_model()
    optimizer, device = offloaded(optimizer_of(model))
    advance(model, optimizer, 1)
    whole = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    for _ in range(3):
        advance(model, optimizer, 1)
        assert device.alive == {}
    # Two fp32 moments of the matrices: 131,072, 65,536 and 65,536 bytes; of the biases 1,024 and 512; and a
    # step count each. By group: 131,072 + 65,536 | 65,536 + 1,024 + 512, so two chunks of ≤ 200,000.
    assert optimizer.offload.chunks == 2
    assert device.largest_bytes == optimizer.offload.largest_bytes == 131_072 + 65_536 + 2 * 4
    assert whole == 3 * 4 + 131_072 + 2 * 65_536 + 1_024 + 512 + 2 * 4
    assert device.largest_bytes < whole


@pytest.mark.parametrize(("chunk_bytes", "chunks"), [(1, 5), (131_072, 3), (10**9, 1)])
def test_a_tensor_with_more_than_a_chunk_is_a_chunk_of_its_own(chunk_bytes, chunks):
    plain, moved = small_model(), small_model()
    optimizer, _ = offloaded(optimizer_of(moved), chunk_bytes)
    plain_optimizer = optimizer_of(plain)
    advance(plain, plain_optimizer, 2)
    advance(moved, optimizer, 2)
    assert optimizer.offload.chunks == chunks
    assert_same_state(plain, plain_optimizer, moved, optimizer)


def test_amsgrads_third_tensor_counts():
    """12 bytes a parameter of 16,384, 8,192 and 8,192, and biases: 196,608 | 98,304 + 98,304 | 2,304 of ≤ 197,000."""
    model = small_model()
    optimizer, device = offloaded(optimizer_of(model, amsgrad=True), 197_000)
    advance(model, optimizer, 2)
    assert optimizer.offload.chunks == 3 and device.largest_bytes <= 197_000


def test_host_memory_is_used_again_step_after_step():
    model = small_model()
    optimizer, _ = offloaded(optimizer_of(model))
    advance(model, optimizer, 1)
    places = {t.data_ptr() for state in optimizer.state.values() for t in state.values()}
    advance(model, optimizer, 2)
    assert {t.data_ptr() for state in optimizer.state.values() for t in state.values()} == places


def test_state_that_exists_already_is_moved_at_once():
    model = small_model()
    optimizer = optimizer_of(model)
    advance(model, optimizer, 1)
    on_device = [t for state in optimizer.state.values() for t in state.values()]
    offload(optimizer, to_host=lambda tensor, buffer: tensor.clone())
    held = [t for state in optimizer.state.values() for t in state.values()]
    assert all(torch.equal(a, b) and a is not b for a, b in zip(on_device, held, strict=True))


# --- checkpoints


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ON_DEVICE_ONLY])
def test_a_resumed_run_continues_bit_for_bit_with_its_state_in_host_memory(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    checkpoints = Checkpoints("name", ONE)
    model, other = small_model(1), small_model(2)
    optimizer, _ = offloaded(optimizer_of(model, name))
    advance(model, optimizer, 3)
    checkpoints.save(3, model, optimizer, tmp_path, {})
    advance(model, optimizer, 2, seed=5)
    resumed, device = offloaded(optimizer_of(other, name))
    moved = []
    whole = device.to_host
    monkeypatch.setattr(resumed.offload, "_to_host", lambda t, b: moved.append(b is None) or whole(t, b))
    assert checkpoints.restore(other, resumed, tmp_path, {}) == 3
    # Loading put every tensor on the parameter's device: all must have been moved from there.
    tensors = [t for state in resumed.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert moved[-len(tensors) :] == [True] * len(tensors) and device.alive == {}
    advance(other, resumed, 2, seed=5)
    assert_same_state(model, optimizer, other, resumed)


def test_the_host_waits_before_it_reads_the_state(monkeypatch):
    model = small_model()
    optimizer, _ = offloaded(optimizer_of(model))
    waited = []
    monkeypatch.setattr(optimizer.offload, "_wait", lambda: waited.append(1))
    advance(model, optimizer, 2)
    assert waited == []
    optimizer.state_dict()
    assert waited == [1]


# --- the ledger and a whole run


def test_the_ledger_tells_where_the_state_is():
    def place(optimizer, wanted: bool):
        settings = Optimizer(optimizer_offload=wanted)
        return {line.what: line for line in optimizers.lines(settings, optimizer)}["optimizer_offload"]

    model = small_model()
    optimizer = optimizer_of(model)
    advance(model, optimizer, 1)
    assert place(optimizer, False).agrees and not place(optimizer, True).agrees
    offloaded(optimizer)
    advance(model, optimizer, 1)
    line = place(optimizer, True)
    assert (line.requested, line.in_effect, line.agrees) == ("host memory", "cpu", True)
    assert line.how.endswith("updated in chunks: 2 in the last step, of at most 0.2 MiB")
    assert not place(optimizer, False).agrees


def test_a_run_with_offload_is_the_run_without(lab, monkeypatch):
    monkeypatch.setattr("engine.build.offload", functools.partial(offload, chunk_bytes=1))
    runs = [lab.train(run=f"offload_{on}", optimizer_offload=on, clip_norm=0.5) for on in (False, True)]
    for name in ("train_loss", "grad_norm"):
        assert column(runs[0], name) == column(runs[1], name)
    assert (runs[0] / "model.safetensors").read_bytes() == (runs[1] / "model.safetensors").read_bytes()
    line = ledger(runs[1])["optimizer_offload"]
    assert line["agrees"] and line["requested"] == "host memory"
