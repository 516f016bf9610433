"""Optimizers: formulas against scalars by hand, the 8-bit one, its missing library, and what the ledger says.

Every optimizer of the registry needs a reference here.
"""

import importlib
import math
import sys
from importlib.metadata import version

import pytest
import torch
import torch.nn as nn
from engine_runs import assert_same_weights, column, ledger
from test_adamwspam_legacy import AsDescribed
from test_spam import scalar

from engine import optimizers
from engine.checkpoint import Checkpoints
from engine.config import Optimizer
from engine.errors import ConfigError
from engine.optimizers import OPTIMIZERS, missing_library, observe
from engine.optimizers.groups import decay_groups
from engine.parallel import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))
GRADIENTS = (0.5, -0.25, 2.0)
FALLING = (2.0, -0.25, 0.1)  # AMSGrad's largest second moment is not the newest


def built(name: str, model: nn.Module, **settings) -> torch.optim.Optimizer:
    settings = Optimizer(optimizer=name, **settings)
    build = importlib.import_module(OPTIMIZERS[name]).build
    return build(decay_groups(model, settings.weight_decay), settings)


def advance(model: nn.Module, optimizer, steps: int, seed: int = 0) -> None:
    """Steps with random gradients, always the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
        optimizer.zero_grad()


def linear(seed: int = 1) -> nn.Linear:
    """8,192 weights, whose moments can be 8-bit, and 64 biases, whose cannot."""
    torch.manual_seed(seed)
    return nn.Linear(128, 64)


# --- formulas


def adamw(x: float, decay: float, s: Optimizer) -> float:
    m = v = largest = 0.0
    for t, g in enumerate(GRADIENTS, 1):
        x -= s.lr * decay * x
        m = s.beta1 * m + (1 - s.beta1) * g
        v = s.beta2 * v + (1 - s.beta2) * g * g
        largest = max(largest, v) if s.amsgrad else v
        x -= s.lr * (m / (1 - s.beta1**t)) / (math.sqrt(largest / (1 - s.beta2**t)) + s.epsilon)
    return x


def adam(x: float, decay: float, s: Optimizer) -> float:
    m = v = largest = 0.0
    for t, gradient in enumerate(GRADIENTS, 1):
        g = gradient + decay * x
        m = s.beta1 * m + (1 - s.beta1) * g
        v = s.beta2 * v + (1 - s.beta2) * g * g
        largest = max(largest, v) if s.amsgrad else v
        x -= s.lr * (m / (1 - s.beta1**t)) / (math.sqrt(largest / (1 - s.beta2**t)) + s.epsilon)
    return x


def sgd(x: float, decay: float, s: Optimizer) -> float:
    m = 0.0
    for gradient in GRADIENTS:
        g = gradient + decay * x
        m = s.momentum * m + g
        x -= s.lr * (g + s.momentum * m if s.nesterov else m)
    return x


def spam(x: float, decay: float, s: Optimizer) -> float:
    return scalar(x, GRADIENTS, decay, s)[-1]["w"]


def adamwspam_legacy(x: float, decay: float, s: Optimizer) -> float:
    """Its norms matter from the eleventh update on."""
    one = AsDescribed(x, decay, s)
    for g in GRADIENTS:
        one.step(g)
    return one.w


REFERENCES = {
    "spam": spam,
    "adamwspam_legacy": adamwspam_legacy,
    "adamw": adamw,
    "adam": adam,
    "adamw8bit": adamw,
    "sgd": sgd,
    "adamwprune": adamw,
}
REFERENCES["muon"] = adamw  # of what is no matrix of a block; of those in test_muon.py
ADAM = {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3}


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, {} if name == "sgd" else ADAM) for name in OPTIMIZERS]
    + [("sgd", {"momentum": 0.0}), ("sgd", {"nesterov": True, "momentum": 0.7})],
)
def test_three_steps_are_those_of_the_formula(name, changes):
    """Of a weight that decays and a bias that does not; adamw8bit keeps 32 bits for tensors so small."""
    settings = {"lr": 0.1, "weight_decay": 0.3, **changes}
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1.5)
    nn.init.constant_(model.bias, -0.7)
    optimizer = built(name, model, **settings)
    for g in GRADIENTS:
        for p in model.parameters():
            p.grad = torch.full_like(p, g)
        optimizer.step()
    expected = [
        REFERENCES[name](x, decay, Optimizer(optimizer=name, **settings))
        for x, decay in ((1.5, 0.3), (-0.7, 0.0))
    ]
    assert [model.weight.item(), model.bias.item()] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_amsgrad_divides_by_the_largest_second_moment_so_far(name, monkeypatch):
    monkeypatch.setitem(globals(), "GRADIENTS", FALLING)
    with_it, without = {**ADAM, "amsgrad": True}, ADAM
    moved = []
    for changes in (with_it, without):
        test_three_steps_are_those_of_the_formula(name, changes)
        moved.append(REFERENCES[name](1.5, 0.3, Optimizer(optimizer=name, lr=0.1, **changes)))
    assert abs(moved[0] - moved[1]) > 1e-3


# --- 8-bit moments


def test_eight_bit_updates_are_those_of_adamw_to_the_precision_of_its_moments():
    models, lr = (linear(), linear()), 1e-2
    for name, model in zip(("adamw", "adamw8bit"), models, strict=True):
        advance(model, built(name, model, lr=lr), 10)
    error = (models[0].weight - models[1].weight).abs() / (10 * lr)
    assert 0 < error.mean() < 0.01 and error.max() < 0.1
    torch.testing.assert_close(models[1].bias, models[0].bias, rtol=1e-5, atol=1e-6)  # moments in 32 bits


def test_the_host_does_not_wait_after_every_parameter_and_nothing_else_changes(monkeypatch):
    import bitsandbytes

    own, theirs = linear(), linear()
    theirs_optimizer = bitsandbytes.optim.AdamW8bit(decay_groups(theirs, 0.1), lr=1e-3, betas=(0.9, 0.95))
    advance(theirs, theirs_optimizer, 3)
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", lambda _: pytest.fail("the host waits"))
    advance(own, built("adamw8bit", own, lr=1e-3), 3)
    assert_same_weights(own.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_brings_every_state_tensor_back_bit_for_bit(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    checkpoints = Checkpoints("name", ONE)
    model, other = linear(1), linear(2)
    optimizer, resumed = built(name, model), built(name, other)
    advance(model, optimizer, 3)
    checkpoints.save(3, model, optimizer, tmp_path, {})
    assert checkpoints.restore(other, resumed, tmp_path, {}) == 3
    for _ in range(2):  # as loaded, and after more steps
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q) and optimizer.state[p].keys() == resumed.state[q].keys()
            for key, value in optimizer.state[p].items():
                found = resumed.state[q][key]
                assert torch.equal(torch.as_tensor(found), torch.as_tensor(value)), key
                assert getattr(found, "dtype", None) == getattr(value, "dtype", None)
        for m, o in ((model, optimizer), (other, resumed)):
            advance(m, o, 2, seed=5)
    if name == "adamw8bit":
        assert optimizer.state[model.weight]["state1"].dtype == torch.uint8


def test_sharded_parameters_are_refused_by_name(one_rank):
    from torch.distributed.fsdp import fully_shard

    model = linear()
    fully_shard(model, mesh=one_rank)
    with pytest.raises(ConfigError, match="cannot update sharded parameters; use data_parallel = 'ddp'"):
        built("adamw8bit", model)


@pytest.fixture
def one_rank():
    """The device mesh of a process group of this process alone."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# --- a missing library


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as Python marks what cannot be imported


def test_a_missing_library_is_an_error_with_both_ways_out(without_library):
    match = 'needs bitsandbytes, .* pip install bitsandbytes, or set optimizer_fallback = "adamw"'
    with pytest.raises(ConfigError, match=match):
        built("adamw8bit", linear())
    assert missing_library(Optimizer(optimizer="adamw")) is None


def test_the_fallback_is_used_only_where_the_library_is_missing(monkeypatch):
    settings = {"optimizer_fallback": "adamw"}
    assert type(built("adamw8bit", linear(), **settings)).__name__ == "AdamW8bit"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert type(built("adamw8bit", linear(), **settings)) is torch.optim.AdamW


def test_a_missing_library_stops_a_run_before_torch_is_imported(lab):
    code = (
        "import sys, atexit; sys.modules['bitsandbytes'] = None; sys.argv = ['engine.train', 'run.toml']\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "from engine import train; train.main()"
    )
    lab.file(optimizer="adamw8bit")
    done = lab.start("-c", code)
    assert done.returncode == 2 and done.stdout == "False\n"
    assert "error: 1 problem in run.toml:\n  - optimizer = 'adamw8bit': needs bitsandbytes" in done.stderr


def test_a_run_with_the_fallback_is_adamws_and_says_so(lab, without_library):
    settings = {"adamw": {}, "fallback": {"optimizer": "adamw8bit", "optimizer_fallback": "adamw"}}
    runs = {name: lab.train(run=name, **changes) for name, changes in settings.items()}
    assert column(runs["fallback"], "grad_norm") == column(runs["adamw"], "grad_norm")
    found = ledger(runs["fallback"])
    assert [what for what, line in found.items() if not line["agrees"]] == ["optimizer", "optimizer_state"]


# --- the ledger


def lines(name: str, optimizer, **settings) -> dict:
    found = optimizers.lines(Optimizer(optimizer=name, **settings), optimizer)
    return {line.what: line for line in found}


def disagreeing(found: dict) -> list[str]:
    return [what for what, line in found.items() if not line.agrees]


@pytest.mark.parametrize(
    ("name", "kernel", "state"),
    [
        # Two fp32 moments, and a step count a tensor: 8 + 2·4 / 8,256.
        ("adamw", "fused", "8.00 bytes a parameter"),
        ("adam", "fused", "8.00 bytes a parameter"),
        ("adamwprune", "fused", "8.00 bytes a parameter"),
        ("sgd", "fused", "4.00 bytes a parameter"),
        # And of spam two counts a tensor; AMSGrad's moment is a third.
        ("spam", "plain", "8.00 bytes a parameter"),
        ("adamwspam_legacy", "fused", "12.00 bytes a parameter"),
        # Of 8,192 weights two bytes and two scales a block of 256, of 64 biases two fp32; two maps of 256:
        # (2·8192 + 2·4·32 + 8·64 + 2·1024) / 8256
        ("adamw8bit", f"bitsandbytes {version('bitsandbytes')}", "2.33 bytes a parameter"),
    ],
)
def test_an_honest_optimizer_agrees(name, kernel, state):
    model = linear()
    optimizer = built(name, model)
    advance(model, optimizer, 1)
    found = lines(name, optimizer)
    # By itself it clips in no order: see its own test.
    assert disagreeing(found) == (["adamwspam_legacy"] if name == "adamwspam_legacy" else [])
    assert found["optimizer"].in_effect == name
    assert found["optimizer_kernel"].in_effect == kernel
    assert found["optimizer_state"].in_effect == state
    assert found["weight_decay"].in_effect == "0.1 of matrices, 0 of vectors"
    assert found["weight_decay"].how == (
        "decay: 8192 parameters, weight decay 0.1; no_decay: 64 parameters, weight decay 0.0"
    )
    if name == "adamw8bit":
        moments = (
            "uint8 for 8192 parameters, float32 for 64 parameters (32-bit where a tensor has fewer than 4096"
        )
        assert moments in found["optimizer_state"].how


def test_momentum_of_zero_has_no_state():
    model = linear()
    optimizer = built("sgd", model, momentum=0.0)
    advance(model, optimizer, 1)
    found = lines("sgd", optimizer, momentum=0.0)
    assert disagreeing(found) == []
    assert disagreeing(lines("sgd", optimizer)) == ["optimizer_state"]  # had momentum been asked for
    assert found["optimizer_state"].in_effect == "0.00 bytes a parameter"
    assert found["optimizer_offload"].in_effect == "no state"


def test_amsgrad_that_is_off_disagrees():
    model = linear()
    optimizer = built("adamw", model, amsgrad=True)
    advance(model, optimizer, 1)
    found = lines("adamw", optimizer, amsgrad=True)
    assert disagreeing(found) == []
    assert found["amsgrad"].in_effect == "largest second moments of 2 of 2 parameters"
    assert found["optimizer_state"].in_effect == "12.00 bytes a parameter"
    plain = built("adamw", model)
    advance(model, plain, 1)
    assert disagreeing(lines("adamw", plain, amsgrad=True)) == ["amsgrad"]
    assert "amsgrad" not in lines("adamw", plain)


def test_the_memory_multiple_is_of_the_tensors_that_are_there():
    """8,256 weights; of AdamW two moments and two counts, of SGD nothing without momentum."""
    model = linear()
    adamw, sgd = built("adamw", model), built("sgd", model, momentum=0.0)
    assert observe.memory_multiple(adamw) == 1  # no step was taken
    advance(model, adamw, 1)
    assert observe.memory_multiple(adamw) == (3 * 8256 + 2) / 8256
    assert observe.memory_multiple(sgd) == 1
    mask, scores = torch.ones(64, 128, dtype=torch.bool), torch.ones(64, 128)
    assert observe.memory_multiple(adamw, [mask, scores, mask]) == (3 * 8256 + 2 + 2048 + 8192) / 8256


def test_the_fallback_is_on_record(without_library):
    model, settings = linear(), {"optimizer_fallback": "adamw"}
    optimizer = built("adamw8bit", model, **settings)
    advance(model, optimizer, 1)
    found = lines("adamw8bit", optimizer, **settings)
    assert disagreeing(found) == ["optimizer", "optimizer_state"]
    assert (
        found["optimizer"].in_effect == "adamw" and "bitsandbytes is not installed" in found["optimizer"].how
    )


def test_moments_that_are_not_eight_bit_disagree():
    model = linear()
    optimizer = built("adamw8bit", model)
    optimizer.args.min_8bit_size = 10_000
    advance(model, optimizer, 1)
    assert disagreeing(lines("adamw8bit", optimizer)) == ["optimizer_state"]


@pytest.mark.parametrize(
    ("flags", "used"), [({"fused": False}, "torch's choice"), ({"foreach": True}, "foreach")]
)
def test_an_optimizer_that_is_not_fused_disagrees(flags, used):
    model = linear()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), **flags)
    advance(model, optimizer, 1)
    found = lines("adamw", optimizer)
    assert disagreeing(found) == ["optimizer_kernel"] and found["optimizer_kernel"].in_effect == used


def test_decay_of_the_wrong_parameters_disagrees():
    model = linear()
    optimizer = torch.optim.AdamW(
        [{"params": list(model.parameters()), "name": "all"}], weight_decay=0.1, fused=True
    )
    advance(model, optimizer, 1)
    found = lines("adamw", optimizer)
    assert disagreeing(found) == ["weight_decay"]
    assert found["weight_decay"].in_effect == "0.1 of matrices, 0.1 of vectors"


def test_a_run_with_eight_bit_moments_agrees_on_every_line(lab):
    lines = ledger(lab.train(optimizer="adamw8bit", width=64))
    assert [what for what, line in lines.items() if not line["agrees"]] == []
    assert lines["optimizer"]["in_effect"] == "adamw8bit"
