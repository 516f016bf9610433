"""What only a GPU can show of runtime settings, of the operations that ran, and of where a step's time goes."""

import gzip
import json
import os
import statistics
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from engine_runs import REPOSITORY, column, ledger, matrix_products, read_json
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine import runtime
from engine.config import Memory, Runtime
from engine.memory import apply_activation_checkpointing
from engine.operations import Operations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (*runtime.ALLOCATOR_VARIABLES, "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def line(what: str, settings: Runtime):
    (found,) = (x for x in runtime.lines(settings, DEVICE, runtime.Collector(0)) if x.what == what)
    return found


# --- TF32


def error_of_a_product() -> float:
    """The largest error of an fp32 product of 1024 × 1024 normal numbers, against float64."""
    a, b = torch.randn(2, 1024, 1024, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    return (a @ b - a.double() @ b.double()).abs().max().item()


def test_tf32_rounds_products_only_when_it_is_asked_for():
    errors = {}
    for wanted in (True, False, True, False):
        runtime.after_torch(Runtime(tf32=wanted), DEVICE)
        errors[wanted] = error_of_a_product()
        assert runtime.rounds_products(DEVICE) == wanted
        found = line("tf32", Runtime(tf32=wanted))
        assert found.agrees and found.in_effect == str(wanted)
        assert not line("tf32", Runtime(tf32=not wanted)).agrees
    assert errors[False] < 1e-3 < 1e-2 < errors[True]  # of sums of 1024 products, with a deviation of 32


def test_off_is_off_even_where_the_environment_switches_it_on():
    code = """
import torch
from engine import runtime
from engine.config import Runtime
device = torch.device("cuda")
before = runtime.rounds_products(device)
runtime.after_torch(Runtime(), device)
print(before, runtime.rounds_products(device))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "False"]


# --- the allocator


def test_expandable_segments_are_used_and_seen_in_the_ledger(lab):
    entry = ledger(lab.launch(device="cuda", run="expandable", allocator="expandable_segments"))["allocator"]
    assert entry["agrees"] and entry["in_effect"] == "expandable_segments", entry
    entry = ledger(lab.launch(device="cuda", run="default"))["allocator"]
    assert entry["agrees"] and entry["in_effect"] == "default" and entry["how"].startswith("0 of "), entry


def test_an_allocator_asked_for_too_late_is_in_the_ledger(lab):
    torch.ones(1, device=DEVICE)  # this process has CUDA running
    entry = ledger(lab.train(device="cuda", allocator="expandable_segments"))["allocator"]
    assert not entry["agrees"] and entry["in_effect"] == "default"


def test_a_users_allocator_is_refused(lab, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    done = lab.start("-m", "engine.train", lab.file(device="cuda"))
    assert done.returncode == 2
    assert "allocator = 'default', but PYTORCH_CUDA_ALLOC_CONF = 'expandable_segments:True'" in done.stderr


# --- operations


def attention(backend: SDPBackend) -> None:
    shape = (2, 4, 64, 64)
    q, k, v = torch.randn(3, *shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True).unbind(0)
    with sdpa_kernel(backend):
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()


@pytest.mark.parametrize(
    ("backend", "kernel"),
    [
        (SDPBackend.FLASH_ATTENTION, "flash"),
        (SDPBackend.CUDNN_ATTENTION, "cudnn"),
        (SDPBackend.EFFICIENT_ATTENTION, "efficient"),
        (SDPBackend.MATH, "math"),
    ],
)
def test_the_attention_kernel_is_named(backend, kernel):
    with Operations() as operations:
        attention(backend)
    assert operations.attention_kernels == {kernel: 1} and operations.visible


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(128, 384), torch.nn.Linear(128, 128)

    def forward(self, x):  # (B, T, 128)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 64).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("full", 2), ("selective", 1)])
def test_full_checkpointing_is_told_from_selective(mode, times):
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(Block() for _ in range(3)).to(DEVICE)
    settings = Memory(activation_checkpointing=mode)
    apply_activation_checkpointing(model, settings, width=128, dropout=0.0)
    x = torch.randn(2, 64, 128, device=DEVICE, requires_grad=True)
    with Operations() as operations, torch.autocast("cuda", torch.bfloat16):
        for block in model.layers:
            x = block(x)
        x.sum().backward()
    assert sum(operations.attention_kernels.values()) == times * 3
    assert matrix_products(operations.counts) >= 18


def test_a_replayed_graph_is_not_visible():
    a = torch.randn(64, 64, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        a @ a  # cuBLAS makes its workspace
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a @ a
    with Operations() as operations:
        graph.replay()
        a + a
    assert operations.graph_replays == 1 and not operations.visible
    assert matrix_products(operations.counts) == 0
    graph.replay()
    assert operations.graph_replays == 1  # it looked at one step


# --- where the time goes


LARGE = {  # enough work that the GPU, not the host, sets the pace
    "device": "cuda",
    "precision": "bf16",
    "layers": 8,
    "heads": 16,
    "width": 1024,
    "context": 512,
    "batch_size": 32,
    "eval_batch_size": 8,
    "eval_interval": 100,
    "steps": 12,
    "profile_steps": 2,
}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A run whose steps were traced, in a process of its own."""
    from engine_runs import Lab

    return Lab(tmp_path_factory.mktemp("lab")).launch(**LARGE)


def test_a_steps_time_is_divided_by_the_devices_clock(profiled):
    found = read_json(profiled / "profile.json")
    parts = found["parts_ms"]
    assert (found["device"], found["steps"], found["first_step"]) == ("cuda", 2, 4)
    assert all(parts[name] > 0 for name in ("forward", "backward", "optimizer"))
    assert parts["forward"] < parts["backward"]
    working = parts["forward"] + parts["backward"] + parts["optimizer"]
    assert 0.8 * found["step_ms"] <= working <= found["step_ms"]
    assert sum(parts.values()) == pytest.approx(found["step_ms"])
    assert parts["communication"] == found["communication_overlapped_ms"] == 0
    assert ledger(profiled)["profile_steps"]["agrees"]


def test_the_profiled_steps_are_like_the_others(profiled):
    median = 1000 * statistics.median(column(profiled, "step_seconds")[7:])
    assert 0.8 * median < read_json(profiled / "profile.json")["step_ms"] < 1.3 * median


def test_the_trace_has_the_kernels_and_the_largest_come_first(profiled):
    with gzip.open(profiled / "trace.json.gz", "rt") as file:
        kernels = {e["name"] for e in json.load(file)["traceEvents"] if e.get("cat") == "kernel"}
    operations = read_json(profiled / "profile.json")["operations"]
    assert len(operations) == 15 and operations[0]["name"] in kernels
    assert sum(o["ms"] for o in operations) <= read_json(profiled / "profile.json")["step_ms"]


def test_the_loader_does_not_stall_the_gpu(profiled):
    waits, seconds = (column(profiled, name)[3:] for name in ("data_wait_seconds", "step_seconds"))
    assert statistics.median(waits) < 0.05 * statistics.median(seconds)


def test_no_collection_falls_into_a_step(profiled):
    entry = ledger(profiled)["gc_interval"]
    assert entry["agrees"] and "0 automatic collections" in entry["how"], entry
