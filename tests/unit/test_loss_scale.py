"""fp16's loss scale: a sequence by hand, steps that are skipped without a trace, and losses as in fp32."""

import importlib
import math

import pytest
import torch
import torch.nn as nn
from engine_runs import column, ledger, rows
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import Optimizer
from engine.loss_scale import LossScale
from engine.offload import offload
from engine.optimizers import OPTIMIZERS
from engine.optimizers.groups import decay_groups
from engine.step import Step

CPU = torch.device("cpu")
GOOD, BAD = torch.tensor(1.5), torch.tensor(float("inf"))


class NoOptimizer:
    """Counts its steps."""

    def __init__(self):
        self.taken = 0

    def step(self):
        self.taken += 1


def model_and_optimizer(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Linear(128, 64)
    settings = Optimizer(optimizer=name, lr=1e-2)
    build = importlib.import_module(OPTIMIZERS[name]).build
    return model, build(decay_groups(model, 0.1), settings)


def set_gradients(model: nn.Module, seed: int, spoilt_by: float | None = None) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw)
    if spoilt_by is not None:
        model.weight.grad[3, 5] = spoilt_by


def norm(model: nn.Module) -> torch.Tensor:
    return nn.utils.get_total_norm([p.grad for p in model.parameters()])


def held(model: nn.Module, optimizer) -> list[torch.Tensor]:
    """Copies of the weights and of every tensor of the state."""
    states = [
        v for p in model.parameters() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)
    ]
    return [t.detach().clone() for t in (*model.parameters(), *states)]


# --- the scale


def test_the_scale_halves_at_once_and_doubles_after_2000_good_steps():
    scale, optimizer = LossScale(1024.0, CPU), NoOptimizer()
    scale.load_state_dict({**scale.state_dict(), "good_steps": torch.tensor(1998)})
    found = []
    for grad_norm in (GOOD, GOOD, GOOD, BAD, BAD, GOOD):
        scale.step(optimizer, grad_norm)
        found.append((scale.scale.item(), scale.state_dict()["good_steps"].item()))
    assert found == [(1024, 1999), (2048, 0), (2048, 1), (1024, 0), (512, 0), (512, 1)]
    assert (scale.steps, scale.skipped.item(), optimizer.taken) == (6, 2, 4)


def test_gradients_are_divided_by_the_scale_exactly():
    model, _ = model_and_optimizer("adamw")
    set_gradients(model, 3)
    expected = [p.grad / 4096 for p in model.parameters()]
    model.bias.requires_grad_(False)
    model.bias.grad = None
    LossScale(4096.0, CPU).unscale(list(model.parameters()))
    assert torch.equal(model.weight.grad, expected[0]) and model.bias.grad is None


def test_a_checkpoint_brings_the_scale_back(tmp_path):
    scale, other = LossScale(1024.0, CPU), LossScale(8.0, CPU)
    for grad_norm in (BAD, GOOD, GOOD):
        scale.step(NoOptimizer(), grad_norm)
    torch.save(scale.state_dict(), tmp_path / "scale.pt")
    place = other.scale
    other.load_state_dict(torch.load(tmp_path / "scale.pt", weights_only=True))
    assert other.state_dict() == scale.state_dict() and other.scale is place  # what the step holds on to
    assert (other.scale.item(), other.skipped.item(), other.steps) == (512, 1, 3)


# --- skipped steps


@pytest.mark.parametrize("spoilt_by", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_leaves_no_trace(name, spoilt_by):
    """The first step of all too, before which some optimizers have no state."""
    spoilt, spoilt_optimizer = model_and_optimizer(name)
    clean, clean_optimizer = model_and_optimizer(name)
    scale, clean_scale = LossScale(64.0, CPU), LossScale(64.0, CPU)
    for seed in (1, 2):
        before = [p.detach().clone() for p in spoilt.parameters()]
        set_gradients(spoilt, 9, spoilt_by)
        scale.step(spoilt_optimizer, norm(spoilt))
        assert all(torch.equal(p, b) for p, b in zip(spoilt.parameters(), before, strict=True))
        for model, optimizer, s in ((spoilt, spoilt_optimizer, scale), (clean, clean_optimizer, clean_scale)):
            set_gradients(model, seed)
            s.step(optimizer, norm(model))
        pairs = zip(held(spoilt, spoilt_optimizer), held(clean, clean_optimizer), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert (scale.skipped.item(), clean_scale.skipped.item(), scale.steps) == (2, 0, 4)
    assert not hasattr(spoilt_optimizer, "found_inf")


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_is_also_skipped_with_its_state_in_host_memory(name):
    model, optimizer = model_and_optimizer(name)
    offload(optimizer, chunk_bytes=1)
    scale = LossScale(64.0, CPU)
    set_gradients(model, 1)
    scale.step(optimizer, norm(model))
    before = held(model, optimizer)
    set_gradients(model, 2, float("inf"))
    scale.step(optimizer, norm(model))
    assert all(torch.equal(a, b) for a, b in zip(before, held(model, optimizer), strict=True))


class HostReads(TorchDispatchMode):
    """Counts values that the host reads, for each of which it would wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "reads"), [*((name, 0) for name in OPTIMIZERS if name != "adamw8bit"), ("adamw8bit", 1)]
)
def test_the_host_reads_nothing_unless_the_optimizer_cannot_skip_by_itself(name, reads):
    model, optimizer = model_and_optimizer(name)
    scale = LossScale(64.0, CPU)
    set_gradients(model, 1)
    grad_norm = norm(model)
    with HostReads() as seen:
        scale.unscale(list(model.parameters()))
        scale.step(optimizer, grad_norm)
    assert seen.count == reads


# --- the ledger and a whole run


def test_the_ledger_tells_the_scale_and_what_was_skipped():
    scale = LossScale(65536.0, CPU)
    for grad_norm in (BAD, GOOD, BAD):
        scale.step(NoOptimizer(), grad_norm)
    (line,) = scale.lines(65536.0)
    assert (line.what, line.requested, line.in_effect, line.agrees) == (
        "loss_scale",
        "65536 at first",
        "16384, 2 of 3 steps skipped",
        True,
    )


@pytest.mark.parametrize("norms", [(), (BAD, BAD)])
def test_a_run_that_takes_no_step_disagrees(norms):
    scale = LossScale(2.0, CPU)
    for grad_norm in norms:
        scale.step(NoOptimizer(), grad_norm)
    assert not scale.lines(2.0)[0].agrees


def test_fp16_trains_as_fp32_does(lab):
    settings = {"steps": 20, "lr": 3e-3, "batch_size": 8}
    full, half = (lab.train(run=p, precision=p, **settings) for p in ("fp32", "fp16"))
    losses = [column(run, "train_loss") for run in (full, half)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3) and losses[1] != losses[0]
    line = ledger(half)["loss_scale"]
    assert line["agrees"] and line["in_effect"] == "65536, 0 of 20 steps skipped"


def test_a_scale_that_is_too_large_is_halved_until_it_fits(lab):
    run = lab.train(precision="fp16", loss_scale=2.0**40, steps=40, lr=3e-3)
    skipped = sum(not math.isfinite(n) for n in column(run, "grad_norm"))
    losses, line = column(run, "train_loss"), ledger(run)["loss_scale"]
    assert 0 < skipped < 40 and all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
    assert len(set(losses[:skipped])) > 1 or skipped == 1  # other batches, the same weights
    assert line["agrees"] and line["in_effect"] == f"{2 ** (40 - skipped)}, {skipped} of 40 steps skipped"


def test_an_interrupted_fp16_run_ends_bit_for_bit_like_one_that_was_not(lab, monkeypatch):
    settings = {"precision": "fp16", "loss_scale": 2.0**30, "steps": 24, "checkpoint_interval": 5}

    def outcome(run) -> tuple:
        norms = [row["grad_norm"] for row in rows(run / "steps.csv")]  # as text, in which nan equals nan
        return norms, ledger(run)["loss_scale"], (run / "model.safetensors").read_bytes()

    expected, step = outcome(lab.train(**settings)), Step.__call__
    assert not math.isfinite(float(expected[0][0])) and math.isfinite(float(expected[0][-1]))

    def stop(self, number, micro_batches):
        if number == 12:
            raise InterruptedError
        return step(self, number, micro_batches)

    with monkeypatch.context() as patched:
        patched.setattr(Step, "__call__", stop)
        with pytest.raises(InterruptedError, match="^$"):
            lab.train(**settings)
    assert outcome(lab.train(**settings)) == expected
