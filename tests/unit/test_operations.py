"""What really ran in a step: counted once each, compiled or not, recomputed or kept."""

import contextlib
import os
import shutil
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from engine_runs import matrix_products
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.config import Memory
from engine.memory import TensorBytes, apply_activation_checkpointing
from engine.operations import Event, Operations, ran

LAYERS = 2
CAN_COMPILE = (
    shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
)


class Block(nn.Module):
    """Two Linears around an attention: 2 products forward, 4 backward.

    It ends in what its backward pass reads, so that its recomputation runs to the end.
    """

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):  # (B, T, 32)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (x + self.out(y.transpose(1, 2).reshape(x.shape))).tanh()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x.sum()


def observed(
    checkpointing: str = "none", *, compiled: bool = False, around=contextlib.nullcontext
) -> Operations:
    """The operations of the second step of a small model."""
    model, x = Model(), torch.randn(2, 8, 32, requires_grad=True)
    settings = Memory(activation_checkpointing=checkpointing)
    apply_activation_checkpointing(model, settings, width=1, dropout=0.0)  # every product is wider, and kept
    if compiled:
        for block in model.layers:
            block.compile()
    model(x).backward()
    operations = Operations()
    with around(), operations:
        model(x).backward()
    return operations


# --- counting


def counted(*events: tuple[int, int, int, str]) -> dict:
    return dict(ran(Event(*e) for e in events))


def test_a_call_inside_a_call_of_the_same_name_is_one():
    assert counted((1, 0, 100, "mm"), (1, 10, 90, "mm"), (1, 20, 80, "empty"), (1, 100, 120, "mm")) == {
        "mm": 2,
        "empty": 1,
    }
    assert counted((1, 0, 100, "mm"), (2, 10, 90, "mm")) == {"mm": 2}  # another thread is not inside
    assert counted((1, 0, 100, "linear"), (1, 1, 99, "mm")) == {"linear": 1, "mm": 1}


def test_what_python_answered_did_not_run():
    mode = "PythonDispatchMode"
    assert counted((1, 0, 100, "mm"), (1, 10, 90, mode), (1, 20, 80, "detach")) == {"detach": 1}
    assert counted((1, 0, 100, "mm"), (1, 10, 90, mode), (1, 20, 80, "mm")) == {"mm": 1}
    two_modes = ((1, 0, 99, "mm"), (1, 1, 98, mode), (1, 2, 97, "mm"), (1, 3, 96, mode), (1, 4, 95, "mm"))
    assert counted(*two_modes) == {"mm": 1}
    # Only the call that was handed over is replaced, not the one around it.
    assert counted((1, 0, 99, "sdpa"), (1, 1, 98, "flash"), (1, 2, 97, mode)) == {"sdpa": 1}


def test_the_products_of_a_small_step_are_counted_by_hand():
    with Operations() as operations:
        w = torch.ones(4, 4, requires_grad=True)
        (torch.ones(2, 4) @ w @ w).sum().backward()
    assert operations.counts["aten::mm"] == 2 + 3  # the input needs no gradient
    assert matrix_products(operations.counts) == 5 and operations.visible
    assert matrix_products(Counter({"aten::bmm": 2, "aten::addmm": 3, "aten::matmul": 9})) == 5


def test_a_failed_step_leaves_no_profiler_behind():
    with pytest.raises(InterruptedError, match="^$"), Operations():
        raise InterruptedError
    with Operations() as operations:
        torch.ones(2) + 1
    assert operations.counts["aten::add"] == 1


# --- attention


@pytest.mark.parametrize(
    ("backend", "kernel"), [(SDPBackend.FLASH_ATTENTION, "flash"), (SDPBackend.MATH, "math")]
)
def test_the_attention_kernel_is_named(backend, kernel):
    with sdpa_kernel(backend):
        assert observed().attention_kernels == {kernel: LAYERS}


def test_attention_written_out_has_no_kernel():
    with Operations() as operations:
        q = torch.randn(1, 2, 4, 8)
        (q @ q.mT).softmax(-1) @ q
    assert operations.attention_kernels == {} and matrix_products(operations.counts) == 2


def test_a_gpus_kernels_are_named():
    operations = Operations()
    names = ["flash_attention", "cudnn_attention", "efficient_attention", "flash_attention_backward"]
    operations.counts = Counter({f"aten::_scaled_dot_product_{n}": i + 1 for i, n in enumerate(names)})
    assert operations.attention_kernels == {"flash": 1, "cudnn": 2, "efficient": 3}


RUNS_OF_ATTENTION = {"none": 1, "full": 2, "selective": 1}  # in a step, of each layer


@pytest.mark.parametrize("around", [contextlib.nullcontext, lambda: TensorBytes([])], ids=["", "memory"])
@pytest.mark.parametrize(("mode", "times"), RUNS_OF_ATTENTION.items())
def test_full_checkpointing_is_told_from_selective(mode, times, around):
    """Also under the dispatch mode that measures a CPU's memory."""
    operations = observed(mode, around=around)
    assert operations.attention_kernels == {"flash": times * LAYERS}
    forward, backward = 2 * LAYERS, 4 * LAYERS
    again = forward if mode == "full" else 0
    assert matrix_products(operations.counts) == forward + backward + again


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs a C++ compiler and Python.h")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # the compiler looks, and hides it itself
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_inside_compiled_blocks_too(mode):
    torch._dynamo.reset()
    operations = observed(mode, compiled=True)
    assert operations.attention_kernels == {"flash": RUNS_OF_ATTENTION[mode] * LAYERS}
    assert matrix_products(operations.counts) >= 6 * LAYERS
    assert any("CompiledFxGraph" in name for name in operations.counts)


# --- CUDA graphs


def test_a_replayed_graph_hides_its_operations(monkeypatch):
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: "replayed")
    replay = torch.cuda.CUDAGraph.replay
    with Operations() as operations:
        assert torch.cuda.CUDAGraph.replay("graph") == "replayed"
        torch.ones(2, 2) @ torch.ones(2, 2)  # of the optimizer, say
    assert operations.graph_replays == 1 and not operations.visible
    assert torch.cuda.CUDAGraph.replay is replay
    operations.counts["aten::_scaled_dot_product_flash_attention"] = 1
    assert operations.visible  # the graph held something else


def test_nothing_at_all_is_not_visible():
    with Operations() as operations:
        pass
    assert not operations.visible and operations.attention_kernels == {}
