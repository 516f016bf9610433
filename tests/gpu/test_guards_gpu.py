"""Guards on a GPU: no wait in a step, a kernel that skips, and an end that is found out later and looks the same."""

import math

import pytest
import torch
from engine_runs import Lab, column, read_json

from engine.build import build_model, build_optimizer
from engine.config import resolve
from engine.parallel import Ranks
from engine.step import Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU = torch.device("cuda", 0)


def step_of(**changes) -> Step:
    sizes = {"layers": 2, "heads": 2, "width": 64, "context": 64, "device": "cuda", "steps": 100}
    c = resolve({**sizes, **changes}, "test")
    ranks = Ranks(0, 1, GPU)
    model = build_model(c, 256, ranks)
    how = {"training": c.training, "schedule": c.schedule, "guards": c.guards}
    optimizer = build_optimizer(model, c)
    return Step(model, optimizer, ranks, lr=c.optimizer.lr, **how)


def batch(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(256, (4, 64), generator=draw).to(GPU) for _ in range(2))]


@pytest.mark.parametrize("mode", ["abort", "skip"])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_step_never_waits_and_skips_without_a_trace(name, mode):
    step, batches = step_of(optimizer=name, on_divergence=mode), [batch(i) for i in range(40)]
    for i in range(37):
        step(i, batches[i])
    before = [p.detach().clone() for p in step.parameters]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.parameters[2].register_hook(lambda gradient: gradient * math.nan)
        step(37, batches[37])
        first = step.guard.stopped(wait=False)
        second = step.guard.stopped(wait=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(p, b) for p, b in zip(step.parameters, before, strict=True))
    assert first is None and (second.step if second else None) == (37 if mode == "abort" else None)


def test_an_end_found_out_later_leaves_the_rows_until_then(tmp_path):
    lab = Lab(tmp_path)
    wild = {
        "device": "cuda",
        "optimizer": "sgd",
        "lr": 1e6,
        "clip_norm": 0.0,
        "steps": 400,
        "log_interval": 7,
    }
    done = lab.start("-m", "engine.train", lab.file(**wild, eval_interval=400))
    assert done.returncode == 4, done.stderr
    run = lab.directory / lab.config().directory
    metrics = read_json(run / "metrics.json")
    assert metrics["status"] == "diverged" and column(run, "step") == list(range(metrics["step"] + 1))
    assert not (run / "model.safetensors").exists()
