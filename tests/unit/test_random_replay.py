"""Selective checkpointing that keeps an operation which draws random numbers: the same masks, so the same gradients.

On a GPU that operation is an SDPA kernel with dropout (tests/gpu/test_gpu.py); on a CPU no kept one draws, so one is
made here.
"""

from pathlib import Path

import pytest
import torch
from engine_runs import ledger, rows
from torch import nn

from engine import memory
from engine.config import Memory, resolve
from engine.memory import apply_activation_checkpointing
from engine.random_replay import Draws, lines


@torch.library.custom_op("plumbline_test::draw", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` where a coin says so, and the coins."""
    coins = (torch.rand_like(x) < 0.5).to(x.dtype)
    return x * coins, coins


draw.register_autograd(
    lambda ctx, dy, _: dy * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)


class Block(nn.Module):
    """Draws by an operation that is kept, and then by two that are not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 64))

    def forward(self, x):
        x = nn.functional.dropout(x * self.weight * torch.rand(64), 0.5)
        kept, _ = draw(x.exp())
        return nn.functional.dropout(kept.tanh() * self.weight, 0.5) + x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x.sum()


def trained(mode: str, monkeypatch) -> tuple[list[torch.Tensor], int, Draws | None]:
    """Losses and gradients of two steps, how often the kept operation drew again, and what was counted."""
    drawn = []
    monkeypatch.setattr(memory, "kept_operations", lambda: ({}, {torch.ops.plumbline_test.draw.default}))
    model = Model()
    settings = Memory(activation_checkpointing=mode)
    draws = apply_activation_checkpointing(model, settings, width=64, dropout=0.5)
    torch.manual_seed(1)
    found = []
    for _ in range(2):
        loss = model(torch.ones(4, 64))
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
        ) as again:
            loss.backward()
        drawn += [e for e in again.events() if e.name == "aten::rand_like"]
        found += [loss.detach(), *(block.weight.grad.clone() for block in model.layers)]
    return found, len(drawn), draws


def test_gradients_are_those_of_the_masks_of_the_forward_pass(monkeypatch):
    expected, *_ = trained("none", monkeypatch)
    whole, again, _ = trained("full", monkeypatch)
    found, kept, draws = trained("selective", monkeypatch)
    assert again == 2 * 3 and kept == 0  # so that a state that nobody replays would be three draws behind
    for one, other in ((found, expected), (whole, expected)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert draws == Draws(forward=2 * 3 * 4, replayed=2 * 3 * 4)  # steps × blocks × operations that draw


def test_the_record_of_the_defect_has_its_rows_figures():
    record = Path(__file__).resolve().parents[2] / "records" / "checkpointing-dropout-h200"
    page, runs = (record / "README.md").read_text(encoding="utf-8"), sorted(record.glob("*-1"))
    for run in runs:
        first = rows(run / "steps.csv")[0]
        assert f"`{float(first['grad_norm']):.4f}` ({run.name.removesuffix('-1')})" in page
        assert f"`{float(first['train_loss']):.4f}`" in page
    assert len(runs) == 9


def test_without_replay_they_would_not_be(monkeypatch):
    """What this is for: the second dropout of each block would have the mask of the kept operation."""
    monkeypatch.setattr(memory, "replayed", lambda pair, _: pair)
    expected, *_ = trained("none", monkeypatch)
    found, *_ = trained("selective", monkeypatch)
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[3], expected[3])


def test_the_ledger_counts_the_draws(lab):
    settings = {"activation_checkpointing": "selective", "dropout": 0.1, "micro_batch_size": 2, "steps": 4}
    line = ledger(lab.train(run="replays", **settings))["random_replay"]
    # of attention and of both branches, × layers × micro-batches × steps
    assert line["agrees"] and line["in_effect"] == "48 of 48 draws replayed"


def test_a_replay_that_is_off_is_told_by_the_ledger(lab, monkeypatch):
    monkeypatch.setattr(memory, "replayed", lambda pair, _: pair)
    line = ledger(lab.train(activation_checkpointing="selective", dropout=0.1, steps=3))["random_replay"]
    assert not line["agrees"] and line["in_effect"] == "0 of 0 draws replayed"


@pytest.mark.parametrize(
    ("changes", "draws", "agrees"),
    [
        ({}, Draws(9, 9), [True]),
        ({}, Draws(9, 8), [False]),
        ({}, None, [False]),
        ({"dropout": 0.0}, None, []),
        ({"compile": "blocks"}, None, []),
        ({"activation_checkpointing": "full"}, None, []),
    ],
)
def test_the_line_is_of_runs_that_must_replay(changes, draws, agrees):
    config = resolve({"activation_checkpointing": "selective", "dropout": 0.1} | changes, "test")
    assert [line.agrees for line in lines(draws, config)] == agrees
