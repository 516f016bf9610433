"""SPAM in whole runs: what they tell of it, resuming, memory, and settings that are refused."""

import pytest
import torch
from engine_runs import assert_same_weights, column, ledger, read_json, rows, untimed, weights

from engine import plan
from engine.config import resolve
from engine.errors import ConfigError
from engine.optimizers import spam

SPIKY = {
    "optimizer": "spam",
    "spam_threshold": 20.0,
    "spam_reset_steps": 3,
    "spam_warmup_steps": 2,
    "spam_first_warmup": True,
    "spam_grace_steps": 0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "fp16", "micro_batch_size": 2},
        {"precision": "bf16", "loss_kernel": "fused", "gradient_sums": "fused", "spam_density": 0.5},
        {"on_divergence": "skip", "optimizer_offload": True, "activation_checkpointing": "full"},
    ],
    ids=str,
)
def test_a_run_tells_its_counters_over_time_and_in_all(lab, changes):
    run = lab.train(**SPIKY, **changes)
    assert disagreeing_of(run) == []
    cut = column(run, "clipped_coordinates")
    assert len(cut) == 6 and cut[0] == cut[3] == 0 and sum(cut) > 0  # nothing to compare with after a reset
    assert column(run, "optimizer_resets") == [0, 0, 0, 1, 1, 1]
    assert column(run, "update_factor") == pytest.approx([0.5, 1, 1, 0.5, 1, 1])
    metrics = read_json(run / "metrics.json")
    assert metrics["clipped_coordinates"] == sum(cut)
    assert metrics["clipped_fraction"] == pytest.approx(sum(cut) / 6 / metrics["parameters"])
    largest = column(run, "largest_square_ratio")
    assert metrics["largest_square_ratio"] == max(largest) and largest[0] == 0
    assert all((n > 0) == (ratio > 20) for n, ratio in zip(cut, largest, strict=True))
    assert metrics["optimizer_resets"] == 1 and "optimizer_spikes" not in metrics
    assert 3 < metrics["optimizer_memory_multiple"] < 3.01  # weights, two moments, two counts a parameter


def disagreeing_of(run) -> list[str]:
    return [what for what, line in ledger(run).items() if not line["agrees"]]


def test_a_run_of_another_optimizer_has_no_such_columns(lab):
    run = lab.train()
    assert not {"clipped_coordinates", "update_factor"} & set(rows(run / "steps.csv")[0])
    metrics = read_json(run / "metrics.json")
    assert "clipped_fraction" not in metrics and 3 < metrics["optimizer_memory_multiple"] < 3.01


def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(lab, interrupt):
    settings = {**SPIKY, "spam_density": 0.5, "checkpoint_interval": 2}
    whole = lab.train(run="whole", **settings)
    interrupt(5, run="cut", **settings)
    again = lab.train(run="cut", **settings)
    assert untimed(again / "steps.csv") == untimed(whole / "steps.csv")
    assert_same_weights(weights(again), weights(whole))
    same = ("clipped_fraction", "largest_square_ratio", "optimizer_resets", "optimizer_memory_multiple")
    assert all(read_json(again / "metrics.json")[k] == read_json(whole / "metrics.json")[k] for k in same)
    assert disagreeing_of(again) == []


def test_the_memory_plan_is_what_a_real_run_measures(lab):
    sizes = {"layers": 2, "heads": 2, "width": 128, "context": 16, "batch_size": 4, "steps": 4}
    run = lab.train(**sizes, optimizer="spam")
    planned = plan.estimate(lab.config(**sizes, optimizer="spam"), 256, "cpu", 1)
    assert planned.peak / 2**30 == pytest.approx(read_json(run / "metrics.json")["peak_memory_gib"], rel=0.02)
    adamw = plan.estimate(lab.config(**sizes), 256, "cpu", 1)
    assert planned.optimizer == pytest.approx(adamw.optimizer, rel=0.01)


def test_on_a_gpu_an_update_makes_nothing_beside_the_state():
    sizes = {"layers": 2, "heads": 2, "width": 128, "context": 16, "batch_size": 4}
    peaks = [
        plan.estimate(resolve({**sizes, "optimizer": name}, "test"), 256, "cuda", 1).peak
        for name in ("adamw", "spam")
    ]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_settings_that_would_do_nothing_are_refused():
    with pytest.raises(ConfigError, match="spam_density = 0.5: would do nothing with optimizer = adamw"):
        resolve({"spam_density": 0.5}, "test")
    with pytest.raises(ConfigError, match="spam_density = 0: must be a number > 0 and ≤ 1"):
        resolve({"optimizer": "spam", "spam_density": 0}, "test")


def test_a_grace_that_a_reset_always_renews_and_a_first_warm_up_of_no_steps_are_refused():
    values = {"optimizer": "spam", "spam_reset_steps": 20, "spam_warmup_steps": 0}
    with pytest.raises(
        ConfigError, match="spam_grace_steps = 20: nothing would ever be cut, .* set it to < 20"
    ):
        resolve(values, "test")
    resolve({**values, "spam_reset_steps": 21}, "test")
    with pytest.raises(
        ConfigError, match="spam_first_warmup = true: would do nothing with spam_warmup_steps"
    ):
        resolve({**values, "spam_reset_steps": 0, "spam_first_warmup": True}, "test")


def test_a_warm_up_that_a_reset_always_cuts_short_is_refused():
    """As long as the interval it is at full size in the last update before each reset."""
    values = {"optimizer": "spam", "spam_reset_steps": 100, "spam_warmup_steps": 101}
    with pytest.raises(ConfigError, match="spam_warmup_steps = 101: updates would never .* set it to ≤ 100"):
        resolve(values, "test")
    for change in ({"spam_warmup_steps": 100}, {"spam_reset_steps": 0}):
        resolve({**values, **change}, "test")
    factors = spam.advanced(
        torch.tensor([99.0, 100.0]),
        torch.tensor([99.0, 100.0]),
        {
            "reset_steps": 100,
            "warmup_steps": 100,
            "first_warmup": True,
            "grace_steps": 20,
            "threshold": 5000.0,
            "betas": (0.9, 0.999),
        },
        None,
    )[0][:, 4]
    assert factors[0] == 1 > factors[1]
