"""Latent attention on a GPU: keys that heads share, the reciprocal term by fused kernels, latency and the monitor.

With PLUMBLINE_GPU_TEST_LOG set, one JSON line for each measurement goes there: milliseconds and MiB of a layer of
GPT-2's size, of whole runs, and what the monitor cost.
"""

import json
import math
import os

import pytest
import torch
from engine_runs import column, ledger, read_json, rows

from engine import latency, monitor
from engine.config import resolve
from engine.models import reciprocal
from engine.models.attention import attend, weigh
from engine.models.gpt import build
from engine.models.latent import Latent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

B, H, T, L = 8, 12, 1024, 128
RUN = {
    "device": "cuda",
    "layers": 2,
    "heads": 4,
    "width": 256,
    "context": 256,
    "batch_size": 16,
    "steps": 12,
    "lr": 5e-4,
    "schedule": "constant",
    "eval_batch_size": 4,
    "precision": "bf16",
    "attention_form": "latent",
    "latent_width": 64,
}
RECIPROCAL = RUN | {"reciprocal_alpha": 0.5, "reciprocal_window": 32}


def log(**values) -> None:
    if path := os.environ.get("PLUMBLINE_GPU_TEST_LOG"):
        with open(path, "a") as file:
            file.write(json.dumps(values) + "\n")


def parts(heads_of_k: int = 1) -> list[torch.Tensor]:
    """q (B, H, T, L), k and v (B, 1, T, L), as in GPT-2 with a latent 128 wide."""
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = [(B, H, T, L), (B, heads_of_k, T, L), (B, heads_of_k, T, L)]
    made = [torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes]
    return [x.requires_grad_() for x in made]


def measured(function, given, name: str) -> dict:
    """The output and gradients of `function`(*given), its milliseconds and peak MiB, forward and backward."""
    outside = torch.randn(
        B, H, T, L, generator=torch.Generator("cuda").manual_seed(2), device="cuda"
    ).bfloat16()

    def once():
        y = function(*given)
        return [y.detach(), *torch.autograd.grad(y, given, outside)]

    for _ in range(3):
        once()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = once()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        once()
    stop.record()
    torch.cuda.synchronize()
    found = {"milliseconds": start.elapsed_time(stop) / 10, "peak_mib": peak}
    log(layer=name, **found)
    return found | {"results": results}


def close(found, expected, share: float = 0.03) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other.float()).norm() < share * other.float().norm()


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_shared_keys_are_not_repeated_for_each_head(kernel):
    """The same function as with repeated keys, by the kernel asked for, and in no more memory."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[kernel]

    def shared(q, k, v):
        return attend(q, k, v, implementation=kernel, dropout=0.0)

    def repeated(q, k, v):
        return attend(q, *(x.expand(-1, H, -1, -1) for x in (k, v)), implementation=kernel, dropout=0.0)

    with sdpa_kernel(backend):
        one, other = (measured(f, parts(), f"latent, {kernel}, {f.__name__}") for f in (shared, repeated))
        q, k, v = parts()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            y = shared(q, k, v)
        extra = torch.cuda.max_memory_allocated() - before
    close(one["results"], other["results"])
    assert one["peak_mib"] <= 1.05 * other["peak_mib"]
    repeated_bytes = B * H * T * L * 2
    assert extra < y.numel() * y.itemsize + repeated_bytes / 2  # the output, and no copy of keys or values


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own call
def test_the_reciprocal_term_by_fused_kernels_is_as_written_out_in_less_memory_and_time():
    settings = resolve(
        RUN | {"heads": H, "width": 768, "latent_width": L, "context": T, "device": "auto"}, "t"
    )
    layer = Latent(settings.model, None)
    layer.alpha, layer.window = 0.5, 64
    masks = reciprocal.masks(T, 64, torch.device("cuda"))

    def written(q, k, v):
        return weigh(layer.scores(q, k, q), v, 0.0)

    def fused(q, k, v):
        return reciprocal.attend(q, k, v, alpha=0.5, window=64, masks=masks)

    def alone(q, k, v):
        return attend(q, k, v, implementation="flash", dropout=0.0)

    expected = measured(torch.compile(written, dynamic=False), parts(), "reciprocal, written out, compiled")
    found = measured(torch.compile(fused, dynamic=False, fullgraph=True), parts(), "reciprocal, fused")
    plain = measured(alone, parts(), "latent alone, flash")
    close(found["results"], expected["results"])
    assert found["peak_mib"] < 0.5 * expected["peak_mib"]
    assert found["milliseconds"] < expected["milliseconds"]
    assert plain["milliseconds"] < found["milliseconds"]


@pytest.mark.parametrize(
    "changes",
    [
        {"compile": "model"},
        {"compile": "blocks"},
        {"compile": "blocks", "activation_checkpointing": "full"},
        {"compile": "blocks", "activation_checkpointing": "selective"},
        {"compile": "model", "loss_kernel": "fused", "gradient_sums": "fused", "micro_batch_size": 8},
        {"compile": "model", "latent_query": "shared"},
        {"compile": "model", "positions": "rotary", "reciprocal_window": 255},
    ],
    ids=str,
)
def test_a_run_by_fused_kernels_trains_as_written_out(lab, changes):
    """Its ledger says which kernels ran; the first losses are those of scores written out."""
    given = RECIPROCAL | changes
    flex = lab.launch(run="flex", **given | {"attention": "flex"})
    manual = lab.launch(run="manual", **given | {"attention": "manual"})
    lines = ledger(flex)
    assert [what for what, line in lines.items() if not line["agrees"]] == [], lines
    assert lines["attention"]["in_effect"] == "flex"
    assert column(flex, "train_loss")[:6] == pytest.approx(column(manual, "train_loss")[:6], rel=5e-3)
    peaks = {run.name: read_json(run / "metrics.json")["peak_memory_gib"] for run in (flex, manual)}
    log(run="reciprocal", changes=str(changes), **peaks)
    # Of a model that is compiled whole, so small a one has its peak elsewhere, on an H200 at 1.00 to 1.07 × of it.
    assert peaks["flex-1"] < (1 if changes["compile"] == "blocks" else 1.1) * peaks["manual-1"]


def test_latent_attention_alone_runs_by_the_kernel_asked_for(lab):
    for kernel in ("flash", "cudnn", "efficient"):
        for compiled in ("none", "model"):
            run = lab.launch(run=f"{kernel}_{compiled}", **RUN, attention=kernel, compile=compiled)
            line = ledger(run)["attention"]
            assert line["agrees"] and line["in_effect"] == f"sdpa {kernel}", line


def test_attention_is_looked_at_in_a_compiled_run(lab):
    run = lab.launch(**RECIPROCAL, attention="flex", compile="model", attention_sequences=2, eval_interval=6)
    found = rows(run / "attention.csv")
    assert len(found) == 2 and ledger(run)["attention_sequences"]["agrees"]
    assert all(0 < float(row[f"entropy_{i}"]) < math.log(256) for row in found for i in range(2))
    assert "0 recompiles" in ledger(run)["compile"]["in_effect"]


def test_latency_of_gpt2s_size():
    """A cached token is predicted as without a cache, and latent attention's cache is a sixth of multi-head's."""
    sizes = {"layers": 12, "heads": 12, "width": 768, "context": 1024, "precision": "bf16"}
    found = {}
    for form in ("multi_head", "latent"):
        config = resolve(sizes | {"attention_form": form}, "t")
        torch.manual_seed(1)
        model = build(config.model, 50304).cuda().eval()
        found[form] = latency.measure(model, config, [512, 1024], torch.device("cuda"))
        log(latency=form, **found[form])
    mine, theirs = (found[form]["lengths"][1] for form in ("latent", "multi_head"))
    assert theirs["cache_bytes_per_token"] == 12 * 2 * 768 * 2 == 6 * mine["cache_bytes_per_token"]
    assert all(one["token_p50_ms"] < one["prefill_p95_ms"] * 1.5 for one in (mine, theirs))


def test_the_monitor_reads_the_gpu_and_costs_no_time(lab):
    size = RUN | {"steps": 400, "eval_interval": 400, "layers": 4, "compile": "blocks"}
    plain = lab.launch(run="plain", **size)
    watched = lab.launch(run="watched", **size, monitor_interval=0.05)
    metrics, line = read_json(watched / "metrics.json"), ledger(watched)["monitor_interval"]
    seconds = [read_json(run / "metrics.json")["step_seconds_median"] for run in (plain, watched)]
    log(monitor=line["how"], plain_ms=1000 * seconds[0], watched_ms=1000 * seconds[1], metrics=metrics)
    assert line["agrees"], line
    assert metrics["monitor_samples"] > 10
    for name in ("device_memory_gib", "temperature_celsius", "power_watts", "sm_clock_mhz"):
        assert metrics[f"{name}_mean"] > 0 and metrics[f"{name}_max"] >= metrics[f"{name}_mean"], name
    assert 0 <= metrics["device_utilization_percent_mean"] <= 100
    assert 0 <= metrics["thermal_throttle_share"] <= 1
    assert seconds[1] < 1.05 * seconds[0]


def test_the_gpu_is_read_as_it_is():
    reader, problem = monitor.gpu_reader(torch.device("cuda", 0))
    assert reader is not None, problem
    held = torch.empty(2 * 2**30, dtype=torch.uint8, device="cuda")
    found = reader()
    assert found["device_memory_gib"] * 2**30 > held.numel()
    assert 10 < found["temperature_celsius"] < 120 and 20 < found["power_watts"] < 2000
