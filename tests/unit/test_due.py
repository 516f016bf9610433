"""What is due after which of ten steps, counted by hand."""

import pytest

from engine.config import resolve
from engine.due import Due


def due(**changes) -> dict[str, list[int]]:
    """The steps after which each is due."""
    settings = {"steps": 10, "log_interval": 4, "eval_interval": 5, "checkpoint_interval": 3, **changes}
    one = Due(resolve(settings, "test"))
    return {
        what: [s for s in range(10) if getattr(one, what)(s)]
        for what in ("progress", "evaluation", "checkpoint")
    }


def test_after_every_so_many_steps_and_after_the_last():
    assert due() == {"progress": [3, 7, 9], "evaluation": [4, 9], "checkpoint": [2, 5, 8]}


@pytest.mark.parametrize("interval, steps", [(0, []), (5, [4]), (10, []), (30, [])])
def test_a_checkpoint_comes_never_after_the_last_step(interval, steps):
    assert due(checkpoint_interval=interval)["checkpoint"] == steps
