"""One optimizer step: accumulation and ignored targets change nothing, norms and clipping are as by hand.

Also what must not change a step's numbers at all: activation checkpointing.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from engine_runs import column, ledger, read_json, untimed

from engine.build import build_model
from engine.config import resolve
from engine.data.batches import IGNORED
from engine.parallel import Ranks
from engine.step import Step

VOCABULARY = 61
ONE = Ranks(0, 1, torch.device("cpu"))


class GradientKeeper:
    """Stands in for an optimizer: keeps the gradients it is given, and applies none of them."""

    def __init__(self, model):
        self.model, self.param_groups = model, [{"lr": 0.0}, {"lr": 0.0}]

    def step(self):
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters()}

    def zero_grad(self, set_to_none):
        assert set_to_none
        for p in self.model.parameters():
            p.grad = None


def step_of(norm_layers: tuple[int, ...] = (), **changes) -> Step:
    """A step on a fresh small model, always with the same weights, whose gradients are kept."""
    c = resolve(
        {
            "layers": 2,
            "heads": 2,
            "width": 32,
            "context": 8,
            "device": "cpu",
            "clip_norm": 0.0,
            "steps": 10,
            "activation_norm_layers": norm_layers,
        }
        | changes,
        "test",
    )
    model = build_model(c, VOCABULARY, ONE)
    return Step(
        model,
        GradientKeeper(model),
        ONE,
        training=c.training,
        schedule=c.schedule,
        gradient_norm_layers=c.logging.gradient_norm_layers,
        lr=c.optimizer.lr,
    )


def batch(rows: int = 4, ignored: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets; of row i the last ignored[i] targets do not count."""
    draw = torch.Generator().manual_seed(3)
    inputs, targets = (torch.randint(VOCABULARY, (rows, 8), generator=draw) for _ in range(2))
    for row, n in enumerate(ignored):
        targets[row, 8 - n :] = IGNORED
    return inputs, targets


def in_micro_batches(inputs, targets, sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def assert_same_gradients(left: Step, right: Step) -> None:
    for name, gradient in left.optimizer.gradients.items():
        torch.testing.assert_close(gradient, right.optimizer.gradients[name], rtol=1e-5, atol=1e-7, msg=name)


# --- gradient and loss


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [3, 1]])
@pytest.mark.parametrize("ignored", [(), (8, 5, 0, 0), (0, 0, 7, 8)])
def test_accumulation_is_the_big_batch(sizes, ignored):
    """Also with targets that do not count, and unequally many of them in the micro-batches."""
    whole, parts = step_of(), step_of()
    one = whole(0, in_micro_batches(*batch(ignored=ignored), [4]))
    many = parts(0, in_micro_batches(*batch(ignored=ignored), sizes))
    assert_same_gradients(whole, parts)
    assert many["train_loss"].item() == pytest.approx(one["train_loss"].item(), rel=1e-6)
    assert many["grad_norm"].item() == pytest.approx(one["grad_norm"].item(), rel=1e-5)
    assert many["targets"].item() == one["targets"].item() == 32 - sum(ignored)


def test_the_loss_is_the_mean_over_the_targets_that_count():
    step, reference = step_of(), step_of()
    inputs, targets = batch(ignored=(3, 0, 8, 1))
    measured = step(0, in_micro_batches(inputs, targets, [2, 2]))
    logits, _ = reference.model(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    loss.backward()
    reference.optimizer.step()
    assert measured["train_loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradients(step, reference)


def test_gradients_do_not_leak_into_the_next_step():
    step, fresh = step_of(), step_of()
    step(0, [batch()])
    assert all(p.grad is None for p in step.model.parameters())
    step(1, [batch()])
    fresh(1, [batch()])
    assert_same_gradients(step, fresh)


# --- norm and clipping


def test_the_gradient_norm_is_over_all_parameters():
    step = step_of()
    measured = step(0, [batch()])
    squares = [g.double().square().sum().item() for g in step.optimizer.gradients.values()]
    assert len(squares) > 20 and measured["grad_norm"].item() == pytest.approx(
        math.sqrt(sum(squares)), rel=1e-5
    )


def test_clipping_scales_every_gradient_and_reports_the_norm_before():
    free, clipped = step_of(), step_of(clip_norm=0.25)
    before, reported = free(0, [batch()])["grad_norm"].item(), clipped(0, [batch()])["grad_norm"].item()
    assert before > 0.5 and reported == before
    for name, gradient in clipped.optimizer.gradients.items():
        torch.testing.assert_close(
            gradient, free.optimizer.gradients[name] * (0.25 / before), rtol=1e-4, atol=1e-9
        )


def test_a_norm_below_the_limit_is_left_alone():
    free, limited = step_of(), step_of(clip_norm=1e4)
    free(0, [batch()])
    limited(0, [batch()])
    for name, gradient in limited.optimizer.gradients.items():
        assert torch.equal(gradient, free.optimizer.gradients[name])


# --- what else a step does and measures


def test_every_group_gets_the_scheduled_learning_rate():
    step = step_of(lr=0.4, schedule="linear", warmup_steps=2, min_lr_fraction=0.0)
    for number, expected in ((0, 0.2), (1, 0.4), (2, 0.4), (9, 0.0)):
        assert step(number, [batch()])["lr"] == pytest.approx(expected)
        assert [g["lr"] for g in step.optimizer.param_groups] == pytest.approx([expected] * 2)


def test_activation_norms_are_over_the_whole_step():
    whole, parts = (step_of(norm_layers=(0, 1)) for _ in range(2))
    one, many = whole(0, [batch()]), parts(0, in_micro_batches(*batch(), [1, 1, 1, 1]))
    assert one["activation_norms"].shape == (2,)
    torch.testing.assert_close(many["activation_norms"], one["activation_norms"])


def test_gradient_norms_of_blocks_are_those_of_their_parameters_before_clipping():
    """Of the whole gradient, from the gradients that an optimizer is given where nothing is clipped."""
    plain = step_of()
    plain(0, [batch()])
    kept = plain.optimizer.gradients
    expected = [
        math.sqrt(sum(g.square().sum().item() for n, g in kept.items() if n.startswith(f"layers.{b}.")))
        for b in (1, 0)
    ]
    step = step_of(gradient_norm_layers=(1, 0), clip_norm=0.01)
    measured = step(0, in_micro_batches(*batch(), [1, 3]))
    assert measured["gradient_norms"].tolist() == pytest.approx(expected, rel=1e-5)
    rest = sum(g.square().sum().item() for n, g in kept.items() if not n.startswith("layers."))
    assert math.sqrt(sum(e**2 for e in expected) + rest) == pytest.approx(measured["grad_norm"].item())
    assert step_of()(0, [batch()])["gradient_norms"].shape == (0,)


def test_gradient_norms_under_a_loss_scale_are_those_without():
    whole = step_of(gradient_norm_layers=(0,))(0, [batch()])["gradient_norms"]
    scaled = step_of(gradient_norm_layers=(0,), precision="fp16")
    scaled.optimizer.step = lambda: None
    assert scaled(0, [batch()])["gradient_norms"].item() == pytest.approx(whole.item(), rel=2e-2)


def test_the_host_does_not_wait_for_the_norms():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    seen = []
    for blocks in ((), (0, 1)):
        step = step_of(gradient_norm_layers=blocks)
        step(0, [batch()])
        with Reads() as reads:
            step(1, [batch()])
        seen.append(reads.count)
    assert seen[1] == seen[0]  # the stand-in for an optimizer asks whether to skip


def test_bf16_computes_logits_in_bf16_over_fp32_weights_and_gradients():
    full, half = step_of(), step_of(precision="bf16")
    losses = [step(0, [batch()])["train_loss"] for step in (full, half)]
    assert (full.model.loss.operand_dtype, half.model.loss.operand_dtype) == (torch.float32, torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert {g.dtype for g in half.optimizer.gradients.values()} == {torch.float32}
    assert losses[1].dtype == torch.float32 and losses[0] != losses[1]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-2)


def test_measuring_is_asked_for_once_a_micro_batch():
    step, calls = step_of(), []
    step.after_forward = lambda: calls.append(1)
    step(0, in_micro_batches(*batch(), [2, 2]))
    assert len(calls) == 2


# --- activation checkpointing


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.2},
        {"attention": "manual", "dropout": 0.2, "norm_placement": "post"},
        {"bias": False, "micro_batch_size": 2},
    ],
    ids=lambda c: "-".join(c) or "plain",
)
def test_activation_checkpointing_changes_memory_and_nothing_else(lab, changes):
    runs, kept = {}, {}
    for mode in ("none", "every_n", "selective", "full"):
        run = lab.train(
            run=mode, layers=3, steps=4, activation_checkpointing=mode, activation_norm_layers=[2], **changes
        )
        runs[mode] = untimed(run / "steps.csv"), (run / "model.safetensors").read_bytes()
        kept[mode] = read_json(run / "metrics.json")["activation_mib"]
        line = ledger(run)["activation_checkpointing"]
        blocks = {"none": 0, "every_n": 1, "selective": 3, "full": 3}[mode]
        assert line["agrees"] and line["in_effect"] == f"{blocks} of 3 blocks recomputed"
    assert all(run == runs["none"] for run in runs.values())  # bit for bit
    assert kept["none"] > kept["every_n"] > kept["full"] and kept["none"] > kept["selective"] > kept["full"]


def test_losses_fall(lab):
    run = lab.train(steps=30, batch_size=8, lr=1e-2)
    losses = column(run, "train_loss")
    assert losses[0] == pytest.approx(math.log(256), rel=0.05) and losses[-1] < 0.7 * losses[0]
