"""The learning rate, step by step, against numbers worked out by hand."""

import math

import pytest

from engine.schedule import lr_scale


def scales(steps: int, **changes) -> list[float]:
    settings = {"schedule": "cosine", "warmup_steps": 0, "min_lr_fraction": 0.1, "steps": steps} | changes
    return [lr_scale(step, **settings) for step in range(steps)]


def test_linear_warm_up_then_linear_decay():
    assert scales(9, schedule="linear", warmup_steps=4, min_lr_fraction=0.2) == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    )


def test_cosine_without_warm_up():
    # 0.1 + 0.9 × (1 + cos(π k/4)) / 2 for k = 0 … 4
    root = math.sqrt(0.5)
    assert scales(5) == pytest.approx([1.0, 0.1 + 0.45 * (1 + root), 0.55, 0.1 + 0.45 * (1 - root), 0.1])


def test_cosine_after_warm_up_is_half_way_in_the_middle():
    found = scales(7, warmup_steps=2, min_lr_fraction=0.0)
    assert found[:3] == [0.5, 1.0, 1.0] and found[4] == pytest.approx(0.5) and found[-1] == pytest.approx(0.0)


def test_constant_keeps_the_peak_after_warm_up():
    assert scales(5, schedule="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_warm_up_may_take_every_step():
    assert scales(4, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0]


def test_a_run_of_one_step_trains_at_the_peak():
    assert scales(1) == [1.0]
    assert scales(1, warmup_steps=1) == [1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 18])
def test_decay_never_rises_and_ends_at_its_minimum(schedule, warmup):
    found = scales(20, schedule=schedule, warmup_steps=warmup, min_lr_fraction=0.05)
    assert found[:warmup] == sorted(found[:warmup]) and found[warmup:] == sorted(found[warmup:], reverse=True)
    assert max(found) == 1.0 and found[-1] == pytest.approx(0.05)
