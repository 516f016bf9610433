"""Bytes of tensors, counted by hand; and which blocks ran twice."""

from collections import Counter

import pytest
import torch
import torch.nn as nn

from engine.config import Memory, resolve
from engine.memory import Recomputation, StepMemory, TensorBytes, apply_activation_checkpointing
from engine.models.gpt import build
from engine.split import local


def test_storages_are_counted_once_and_until_they_are_freed():
    given = torch.zeros(100)  # 400 bytes
    with TensorBytes([given, given[:10]]) as count:
        assert count.current == 400
        a = given + 1
        assert count.current == 800
        view = a[20:].view(8, 10)  # the same storage
        a.add_(1)  # in place
        assert count.current == 800
        b = torch.empty(30, dtype=torch.float64)  # made, not computed: 240 bytes
        assert count.current == 1040
        del a
        assert count.current == 1040  # the view holds it
        del view
        assert count.current == 640
        pair = torch.zeros(10).max(0)  # 40 bytes, freed; then 4 of the value and 8 of the index
        assert count.current == 652
        del b, pair
        assert count.current == 400
    assert count.peak == 1040


def test_what_a_backward_pass_needs_is_alive_until_it_ran():
    x = torch.zeros(1000, requires_grad=True)
    with TensorBytes([x]) as count:
        total = x.exp().exp().sum()  # both results are saved: 2 × 4000 bytes, and 4 of the sum
        assert count.current == 4000 + 8000 + 4
        total.backward()
        del total
        assert count.current == 4000 + 4000  # the gradient
    assert count.peak >= 4000 + 8000 + 4000


def test_nothing_is_counted_outside():
    count = TensorBytes([])
    with count:
        kept = torch.zeros(10)
    other = torch.zeros(1000)
    assert count.current == 40 and kept.sum() + other.sum() == 0
    del kept
    assert count.current == 0


def test_a_storage_that_changes_its_size_is_counted_as_it_is():
    """FSDP2 frees and fills the memory of its parameters in place."""
    a = torch.zeros(100)
    with TensorBytes([a]) as count:
        a.untyped_storage().resize_(0)
        assert count.current == 0
        a.untyped_storage().resize_(1000)
        assert count.current == 1000
        del a
        assert count.current == 0
    assert count.peak == 1000


class Layers(nn.Module):
    """Two layers of x → exp(x), of which the second can be recomputed in the backward pass."""

    def __init__(self, recompute: bool):
        super().__init__()
        self.scale, self.recompute = nn.Parameter(torch.ones(())), recompute
        self.layers = nn.ModuleList([Exponential(), Exponential()])

    def forward(self, x):
        x = self.layers[0](x * self.scale)
        if self.recompute:
            return torch.utils.checkpoint.checkpoint(self.layers[1], x, use_reentrant=False)
        return self.layers[1](x)


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


class OneForward:
    """Stands in for a Step: one forward and backward pass on each micro-batch."""

    after_forward = None

    def __init__(self, model):
        self.model = model

    def __call__(self, micro_batches):
        for x in micro_batches:
            loss = self.model(x).sum()
            if self.after_forward:
                self.after_forward()
            loss.backward()


@pytest.mark.parametrize(("recompute", "blocks", "floats"), [(False, 0, 2001), (True, 1, 1001)])
def test_a_measured_step_by_hand(recompute, blocks, floats):
    """Kept after the forward pass: both exponentials (or the first), and the loss."""
    model = Layers(recompute)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step, micro_batches = OneForward(model), [torch.zeros(1000), torch.zeros(1000)]
    memory = StepMemory(model, optimizer, torch.device("cpu"), compiled=False)
    with memory.measured(step, micro_batches):
        step(micro_batches)
    assert memory.recomputed_blocks == blocks
    assert memory.activation_bytes == 4 * floats
    assert memory.peak_bytes >= memory.activation_bytes + 4  # and the parameter
    assert step.after_forward is None


def test_what_cannot_be_measured_is_none():
    model = Layers(recompute=False)
    memory = StepMemory(model, torch.optim.SGD(model.parameters()), torch.device("cpu"), compiled=True)
    step = OneForward(model)
    with memory.measured(step, [torch.zeros(10)]):
        step([torch.zeros(10)])
    assert (memory.peak_bytes, memory.activation_bytes, memory.recomputed_blocks) == (None, None, None)


def test_calls_are_counted_until_it_stops():
    model = Layers(recompute=False)
    count = Recomputation(model)
    model(torch.zeros(3))
    model.layers[1](torch.zeros(3))
    count.stop()
    model(torch.zeros(3))
    assert count.calls == [1, 2]


def test_optimizer_state_counts_as_held():
    weight = nn.Parameter(torch.zeros(1000))
    model = nn.Module()
    model.weight, model.layers = weight, nn.ModuleList()
    optimizer = torch.optim.AdamW(model.parameters())
    weight.grad = torch.zeros(1000)
    optimizer.step()
    weight.grad = None
    memory = StepMemory(model, optimizer, torch.device("cpu"), compiled=False)
    with memory.measured(OneForward(model), []):
        pass
    assert memory.peak_bytes == 3 * 4000 + 4  # weight, two moments, the step count
    assert local(weight) is weight


class Names(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that run inside, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def recomputed(mode: str, bias: bool) -> Counter:
    """What a backward pass of two layers runs beyond that without checkpointing, by kind of operation."""
    settings = resolve({"layers": 2, "heads": 2, "width": 16, "context": 8, "bias": bias}, "test")
    found = []
    for each in ("none", mode):
        model = build(settings.model, 17)
        apply_activation_checkpointing(model, Memory(activation_checkpointing=each), width=16, dropout=0.0)
        loss = model(torch.zeros(2, 8, dtype=torch.long))[0].sum()
        with Names() as names:
            loss.backward()
        found.append(names.counts)
    again = found[1] - found[0]
    products = again["mm"] + again["addmm"]
    kernels = again["_scaled_dot_product_flash_attention_for_cpu"]
    return Counter(products=products, kernels=kernels, gelu=again["gelu"], norms=again["native_layer_norm"])


@pytest.mark.parametrize("bias", [True, False])
def test_selective_checkpointing_keeps_what_is_dear(bias):
    """A block has four products. The last one is in nobody's backward pass, so it never runs again; of the others,
    only the one that ends in the residual stream is not kept. Biased products are `addmm`, others `mm`."""
    assert recomputed("full", bias) == Counter(products=2 * 3, kernels=2, gelu=2, norms=4)
    assert recomputed("selective", bias) == Counter(products=2, gelu=2, norms=4)
