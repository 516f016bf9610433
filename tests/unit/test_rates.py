"""The ledger's line about the learning rate: what the groups really had, also where the schedule ends at 0."""

from types import SimpleNamespace

import pytest
import torch
from engine_runs import ledger

from engine import rates
from engine.config import resolve

# 0.5 and 1 of the peak, then 1, 0.75, 0.5, 0.25 and 0 of it, in steps 0 to 6.
TO_0 = {"lr": 0.01, "schedule": "linear", "min_lr_fraction": 0.0, "warmup_steps": 2, "steps": 7}
SCALES = [0.5, 1, 1, 0.75, 0.5, 0.25, 0]


def seen(peaks, first: int = 0, kind=float, **changes) -> rates.Seen:
    """After every step from `first` on; peaks: of group → step → the peak that it had, or one for all steps."""
    optimizer = SimpleNamespace(param_groups=[{"name": name, "lr": kind(0.0)} for name in peaks])
    found = rates.Seen(resolve({**TO_0, **changes}, "test"), optimizer)
    for step in range(first, 7):
        for group in optimizer.param_groups:
            peak = peaks[group["name"]]
            rate = (peak[step] if isinstance(peak, list) else peak) * SCALES[step]
            if kind is float:
                group["lr"] = rate
            else:
                group["lr"].fill_(rate)  # as engine.step_graph has it
        found.add(step)
    return found


def line(*arguments, **options) -> tuple[str, bool]:
    found = seen(*arguments, **options).line(6)
    return found.in_effect, found.agrees


def test_the_peak_is_told_where_the_schedule_ends_at_0(lab):
    run = lab.train(**TO_0)
    found = ledger(run)["lr"]
    assert (found["requested"], found["in_effect"], found["agrees"]) == ("0.01", "0.01", True)
    assert found["how"] == (
        "param_groups at step 1, where the schedule has 1 of its peak, and at step 6, where it has 0"
    )


def test_another_peak_disagrees():
    both = {"decay": 0.01, "no_decay": 0.01}
    assert line(both) == ("0.01", True)
    assert line({"decay": 0.02, "no_decay": 0.02}) == ("0.02", False)
    assert line(both | {"no_decay": 0.02}) == ("0.01 and 0.02", False)
    assert line({"decay": 0.0}) == ("0", False)  # never trained


def test_rates_that_leave_the_schedule_later_disagree():
    found = seen({"decay": 0.01})
    found.optimizer.param_groups[0]["lr"] = 0.0025
    assert (found.line(6).in_effect, found.line(6).agrees) == ("0.01 and 0.0025 where it should be 0", False)
    assert found.line(5).agrees
    assert (found.line(4).in_effect, found.line(4).agrees) == ("0.01 and 0.005", False)


def test_a_group_with_a_rate_of_its_own():
    muon = {"optimizer": "muon", "muon_lr": 0.05}
    assert line({"matrices": 0.05, "decay": 0.01}, **muon) == ("0.01", True)
    assert line({"matrices": 0.01, "decay": 0.01}, **muon) == ("0.002 and 0.01", False)
    assert seen({"matrices": 0.05}, **muon).line(6).how.endswith("; times 5 in the group matrices")


def test_a_process_that_resumed_looks_at_its_own_steps(lab, interrupt):
    first_half = [0.01] * 4
    assert line({"decay": [*first_half, 0.01, 0.01, 0.01]}, first=4) == ("0.01", True)
    assert line({"decay": [*first_half, 0.02, 0.02, 0.02]}, first=4) == ("0.02", False)
    interrupt(5, checkpoint_interval=4, **TO_0)
    assert ledger(lab.train(checkpoint_interval=4, **TO_0))["lr"]["how"] == (
        "param_groups at step 4, where the schedule has 0.5 of its peak, the most from step 4 on, and at step 6, "
        "where it has 0"
    )


def test_a_process_that_only_took_steps_at_0_says_that_it_saw_no_peak():
    assert line({"decay": 0.02}, first=6) == ("not seen: 0 of it in every step of this process", True)
    found = seen({"decay": 0.02}, first=6)
    found.optimizer.param_groups[0]["lr"] = 0.01
    assert not found.line(6).agrees


def test_rates_that_are_tensors_are_kept_and_not_read_while_steps_are_taken():
    graph = {"step_graph": True, "kind": torch.tensor}
    assert line({"decay": 0.01, "no_decay": 0.01}, **graph) == ("0.01", True)
    assert line({"decay": 0.02, "no_decay": 0.01}, **graph) == ("0.02 and 0.01", False)
    unreadable = seen({"decay": 0.01}, kind=lambda _: torch.zeros((), device="meta"), step_graph=True)
    with pytest.raises(RuntimeError, match="meta tensors"):
        unreadable.line(6)


@pytest.mark.parametrize(
    ("graph", "off", "found"),
    [
        (False, 1e-8, ("0.0100000001", False)),
        (True, 1e-8, ("0.01", True)),
        (True, 1e-5, ("0.0100001", False)),
    ],
)
def test_only_a_learning_rate_that_is_a_tensor_may_be_rounded(graph, off, found):
    """To the 24 bits of fp32; any other must be the schedule's own number."""
    assert line({"decay": 0.01 * (1 + off)}, step_graph=graph) == found
