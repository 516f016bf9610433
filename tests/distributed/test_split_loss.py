"""Two processes that split the vocabulary have the loss and the gradients of one that has it whole.

Over gloo on the CPU; they meet at a file, so no port is needed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from engine_runs import REPOSITORY
from split_loss import HEADS, PROCESSES, UPSTREAM, WAYS, inputs

from engine.data.batches import IGNORED
from engine.objectives import KERNELS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What each process wrote."""
    directory = tmp_path_factory.mktemp("split_loss")
    command = [sys.executable, str(Path(__file__).with_name("split_loss.py"))]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    started = [
        subprocess.Popen([*command, str(rank), str(directory)], env=environment, stderr=subprocess.PIPE)
        for rank in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=120)[1].decode() for process in started]
    finally:
        for process in started:  # one that waits for a failed one would wait for long
            process.kill()
    assert [process.returncode for process in started] == [0] * PROCESSES, said
    return [torch.load(directory / f"{rank}.pt") for rank in range(PROCESSES)]


def of_one_process(head: str):
    """Loss, and the gradients for hidden and the whole weight, in float64."""
    classes, _ = HEADS[head]
    hidden, weight, targets = inputs(*HEADS[head])
    hidden, weight = (t.double().requires_grad_() for t in (hidden, weight))
    logits = (hidden @ weight.t())[..., :classes].flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    (UPSTREAM * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_loss_and_gradients_are_those_of_one_process(written, kernel, head, way):
    one, two = (process["cases"][kernel, head, way] for process in written)
    loss, hidden, weight = of_one_process(head)
    tolerance = 6e-3 if way == "bf16" else 1e-6
    assert torch.equal(one["loss"], two["loss"]) and error(one["loss"], loss) <= tolerance
    if way == "no_grad":
        assert one["hidden"] is None and one["weight"] is None
        return
    assert torch.equal(one["hidden"], two["hidden"])  # complete on each process, bit for bit the same
    assert error(one["hidden"], hidden) <= tolerance
    gradient = one["weight"] if way == "dtensor" else torch.cat([one["weight"], two["weight"]])
    assert error(gradient, weight) <= tolerance
    assert gradient[HEADS[head][0] :].count_nonzero() == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_ledger_shows_a_process_own_part_of_the_vocabulary(written, kernel):
    for process in written:
        line = process["cases"][kernel, "padded", "plain"]["line"]
        assert line["agrees"] and line["in_effect"].startswith(kernel)
        assert line["in_effect"].endswith(f"largest logits {8 if kernel == 'chunked' else 33} × 32")


def test_a_head_that_does_not_split_evenly_is_refused(written):
    for process in written:
        assert process["refusal"] == "(63, 16) does not split evenly over 2 processes"
