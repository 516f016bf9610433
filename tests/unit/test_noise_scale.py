"""Gradient noise scale and coherence: by hand, and that measuring them changes no bit of a run."""

import math

import pytest
import torch
from engine_runs import assert_same_weights, column, ledger, read_json, rows, untimed, weights

from engine.config import resolve
from engine.errors import ConfigError
from engine.noise_scale import NoiseScale, estimates

ON = {"batch_size": 8, "micro_batch_size": 2, "noise_scale_interval": 2}


def values(run, name: str) -> list[float]:
    return [float(row[name]) for row in rows(run / NoiseScale.FILE)]


def test_the_estimates_by_hand():
    """Gradients (3, 0) and (1, 0) of one sample each, (2, 0) of both: |G_b|² = (9 + 1) / 2, |G_B|² = 4."""
    found = estimates([9.0, 1.0], 4.0, 1, 2)
    assert found["gradient_square"] == (2 * 4 - 1 * 5) / (2 - 1) == 3
    assert found["noise"] == (5 - 4) / (1 / 1 - 1 / 2) == 2
    assert found["noise_scale"] == 2 / 3
    assert found["coherence"] == 4 / 5
    assert (found["small_batch"], found["large_batch"]) == (1, 2)


def test_like_gradients_have_no_noise_and_opposite_ones_no_signal():
    same, opposite = estimates([4.0, 4.0], 4.0, 2, 4), estimates([4.0, 4.0], 0.0, 2, 4)
    assert (same["noise"], same["noise_scale"], same["coherence"]) == (0, 0, 1)
    assert opposite["coherence"] == 0 and opposite["gradient_square"] < 0
    assert math.isnan(estimates([0.0, 0.0], 0.0, 1, 2)["coherence"])


def test_the_estimates_are_right_on_average():
    """Of samples drawn around (1, 2) with variance 3 in each of two places: |G|² = 5, S = 6."""
    draw = torch.Generator().manual_seed(0)
    gradient, noise = 0.0, 0.0
    for _ in range(4000):
        g = torch.tensor([1.0, 2.0]) + math.sqrt(3) * torch.randn(
            4, 2, 2, generator=draw
        )  # 4 parts of 2 samples
        parts = g.mean(1)
        found = estimates(parts.square().sum(1).tolist(), parts.mean(0).square().sum().item(), 2, 8)
        gradient, noise = gradient + found["gradient_square"] / 4000, noise + found["noise"] / 4000
    assert (gradient, noise) == (pytest.approx(5, rel=0.03), pytest.approx(6, rel=0.03))


def test_a_run_measures_what_autograd_says_of_each_micro_batch(lab, monkeypatch):
    """Each micro-batch's gradient by itself, from a plain pass through a copy of the model."""
    seen, own = [], NoiseScale.squares

    def also(self, micro_batches):
        expected = []
        for inputs, targets in micro_batches:
            loss, _ = self.step.model(inputs, targets)
            gradients = torch.autograd.grad(loss / targets.numel(), self.step.parameters)
            expected.append(sum(g.square().sum().item() for g in gradients))
        found = own(self, micro_batches)
        seen.append((found.tolist(), expected))
        return found

    monkeypatch.setattr(NoiseScale, "squares", also)
    run = lab.train(**ON)
    assert len(seen) == 3 and all(found == pytest.approx(expected, rel=1e-4) for found, expected in seen)
    assert values(run, "small_square_norm") == pytest.approx([sum(f) / 4 for f, _ in seen])
    assert values(run, "step") == [1, 3, 5] and values(run, "tokens_seen") == [2 * 128, 4 * 128, 6 * 128]
    assert values(run, "small_batch") == [2] * 3 and values(run, "large_batch") == [8] * 3
    norms = column(run, "grad_norm")
    assert values(run, "large_square_norm") == pytest.approx([norms[i] ** 2 for i in (1, 3, 5)])


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.3},
        {"precision": "bf16", "loss_kernel": "fused", "gradient_sums": "fused"},
        {"activation_checkpointing": "full", "optimizer": "muon"},
        {"precision": "fp16"},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_measuring_changes_no_bit_of_the_run(lab, changes):
    runs = [lab.train(run=f"n{n}", **{**ON, **changes, "noise_scale_interval": n}) for n in (0, 2)]
    assert untimed(runs[0] / "steps.csv") == untimed(runs[1] / "steps.csv")
    assert_same_weights(weights(runs[0]), weights(runs[1]))
    assert [what for what, line in ledger(runs[1]).items() if not line["agrees"]] == []
    assert ledger(runs[1])["noise_scale_interval"]["in_effect"] == "3 steps measured"
    assert not (runs[0] / NoiseScale.FILE).exists() and "noise_scale_interval" not in ledger(runs[0])
    assert "noise_scale_seconds" in read_json(runs[1] / "metrics.json")
    assert all(0.2 < c < 1.0001 for c in values(runs[1], "coherence"))


def test_the_gradient_of_fused_sums_and_of_fp16_is_that_of_autograd(lab):
    kinds = {
        "plain": {"precision": "bf16", "loss_kernel": "fused"},
        "sums": {"precision": "bf16", "loss_kernel": "fused", "gradient_sums": "fused"},
        "fp16": {"precision": "fp16"},
    }
    found = {k: values(lab.train(run=k, **ON, **c), "small_square_norm") for k, c in kinds.items()}
    assert found["sums"] == pytest.approx(found["plain"], rel=5e-2)
    assert found["fp16"] == pytest.approx(found["plain"], rel=5e-2)


def test_a_resumed_run_has_every_row_once(lab, interrupt):
    settings = {**ON, "steps": 8, "checkpoint_interval": 3}
    whole = lab.train(run="whole", **settings)
    interrupt(5, run="cut", **settings)
    again = lab.train(run="cut", **settings)
    assert (
        rows(again / NoiseScale.FILE) == rows(whole / NoiseScale.FILE)
        and len(rows(whole / NoiseScale.FILE)) == 4
    )
    assert ledger(again)["noise_scale_interval"]["agrees"]


def test_the_ledger_tells_a_step_that_was_not_measured():
    noise = NoiseScale(None, 2, 8)
    noise.measured = 2
    assert [line.agrees for line in (noise.lines(0, 5)[0], noise.lines(0, 6)[0], noise.lines(2, 6)[0])] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"micro_batch_size": 0},
            "noise_scale_interval = 2: compares the micro-batches of a step, and there is one",
        ),
        ({"micro_batch_size": 8}, "set micro_batch_size to half of batch_size or less"),
        ({"noise_scale_interval": 7, "steps": 6}, "noise_scale_interval = 7: must be ≤ steps = 6"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        resolve({**ON, **changes}, "test")
    assert message in str(caught.value)


def test_a_rank_with_one_micro_batch_is_refused():
    from engine.build import check
    from engine.parallel import Ranks

    with pytest.raises(ConfigError, match="micro_batch_size = 4 is all that each of 2 has in a step"):
        check(resolve({**ON, "micro_batch_size": 4}, "test"), Ranks(0, 2, torch.device("cpu")))
