"""A step as one CUDA graph, as far as a CPU can tell: what is refused, the learning rates, and the ledger's line.

That a replayed step is the step is shown on a GPU: tests/gpu/test_step_graph_gpu.py.
"""

import pytest
import torch

from engine.config import resolve
from engine.errors import ConfigError
from engine.step_graph import EAGER_STEPS, StepGraph, check, lines

ON = {"step_graph": True}


class Counted:
    """A graph that replayed so many steps."""

    def __init__(self, replays: int):
        self.replays = replays


def test_the_learning_rates_are_tensors_that_stay_where_they_are():
    """Also after a checkpoint has put other groups in their place."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [w], "lr": 0.5} for w in weights], fused=True)
    graph = StepGraph(dict, optimizer, torch.device("cpu"))
    kept = [group["lr"] for group in optimizer.param_groups]
    assert [float(lr) for lr in kept] == [0.5, 0.5]
    optimizer.load_state_dict(optimizer.state_dict())
    graph.set_rates([0.25, 0.125])
    found = [group["lr"] for group in optimizer.param_groups]
    assert all(a is b for a, b in zip(found, kept, strict=True)) and [float(lr) for lr in found] == [
        0.25,
        0.125,
    ]


def test_a_learning_rate_that_is_a_tensor_gives_the_same_update():
    def updated(lr) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 8))
        weight.grad = torch.linspace(0.5, 2, 8)
        torch.optim.AdamW([weight], lr=lr, weight_decay=0.1, fused=True).step()
        return weight.detach()

    torch.testing.assert_close(updated(torch.tensor(0.01)), updated(0.01), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("replays", "steps", "agrees"), [(7, 10, True), (6, 10, False), (0, 2, True)])
def test_a_step_that_was_not_replayed_is_told_by_the_ledger(replays, steps, agrees):
    (line,) = lines(Counted(replays), True, steps)
    assert line.in_effect == f"{replays} of {steps} steps replayed" and line.agrees == agrees


def test_one_that_is_missing_or_not_asked_for_is_told_and_none_is_no_line():
    assert not lines(None, True, 10)[0].agrees and not lines(Counted(7), False, 10)[0].agrees
    assert lines(None, False, 10) == [] and EAGER_STEPS == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processes": 2}, "not with processes = 2: it is of one process"),
        (
            {"optimizer": "adamw8bit"},
            "not with optimizer = 'adamw8bit': it can be one of adamw, adam, sgd, muon",
        ),
        ({"optimizer_offload": True}, "not with optimizer_offload = True"),
        ({"precision": "fp16"}, "not with precision = 'fp16': the host reads its loss scale; use bf16"),
        (
            {"precision": "bf16", "loss_kernel": "fused", "gradient_sums": "fused"},
            "not with gradient_sums = 'fused'",
        ),
        ({"precision": "bf16", "float8": True}, "not with float8 = True: not tried"),
        ({"first_length": 8, "lengthening_steps": 4}, "not with first_length = 8"),
        ({"activation_checkpointing": "full"}, "not with activation_checkpointing = 'full'"),
        (
            {"compile": "model", "compile_mode": "reduce-overhead"},
            "not with compile_mode = 'reduce-overhead'",
        ),
        ({"noise_scale_interval": 5, "micro_batch_size": 4}, "not with noise_scale_interval = 5"),
        ({"profile_steps": 2}, "not with profile_steps = 2: there are no parts; use 0"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match="step_graph = true") as error:
        resolve({**ON, **changes}, "test")
    assert message in str(error.value)


def test_it_is_for_one_gpu():
    assert check(False, "cpu", 8) == [] and check(True, "cuda", 1) == []
    assert check(True, "cpu", 1) == ["step_graph = true: would do nothing on a CPU; it needs a GPU"]
    assert check(True, "cuda", 2) == ["step_graph = true: is of one process, and 2 were launched"]


def test_a_run_on_a_cpu_is_refused_before_it_computes(lab):
    with pytest.raises(ConfigError, match="step_graph = true: would do nothing with device = 'cpu'"):
        lab.train(**ON)
