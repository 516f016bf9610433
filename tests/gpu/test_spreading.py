"""Several GPUs train what one does, over NCCL: what tests/distributed shows over gloo, and compiled.

A way that needs more GPUs than there are is skipped.
"""

import pytest
import torch
from engine_runs import Lab, column, ledger, read_json

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

RUN = {
    "device": "cuda",
    "layers": 4,
    "heads": 4,
    "width": 256,
    "context": 256,
    "batch_size": 16,
    "micro_batch_size": 2,
    "steps": 12,
    "lr": 5e-4,
    "epsilon": 1e-4,  # see tests/distributed/test_same_as_one_process.py
    "warmup_steps": 4,
    "eval_batch_size": 4,
    "pad_vocabulary_to": 64,
}
FUSED = {"precision": "bf16", "compile": "model", "loss_kernel": "fused", "gradient_sums": "fused"}
FAST = {"precision": "bf16", "compile": "blocks", "loss_kernel": "fused"}
WAYS = {
    "ddp": (2, {}),
    "fsdp": (2, {"data_parallel": "fsdp"}),
    "fsdp_kept": (2, {"data_parallel": "fsdp", "reshard_after_forward": False}),
    "fsdp_model": (2, {"data_parallel": "fsdp", "shard_unit": "model"}),
    "tensor": (2, {"tensor_parallel": 2}),
    "hsdp": (4, {"data_parallel": "hsdp"}),
    "fsdp_tensor": (4, {"data_parallel": "fsdp", "tensor_parallel": 2}),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def one(lab):
    """The same run on one GPU, by whether it is compiled."""
    return {fast: lab.launch(run=f"one_{fast}", **RUN, **(FAST if fast else {})) for fast in (False, True)}


@pytest.mark.parametrize("fast", [False, True], ids=["fp32", "bf16_compiled"])
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradient_norms_are_those_of_one_gpu(lab, one, way, fast):
    processes, settings = WAYS[way]
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    run = lab.launch(processes, run=f"{way}_{fast}", **RUN, **settings, **(FAST if fast else {}))
    lines = ledger(run)
    assert [what for what, line in lines.items() if not line["agrees"]] == []
    assert lines["sharding"]["in_effect"] != "one rank"
    for name, tolerance in (("train_loss", 1e-2 if fast else 1e-4), ("grad_norm", 5e-2 if fast else 1e-3)):
        assert column(run, name) == pytest.approx(column(one[fast], name), rel=tolerance)


def test_sums_that_do_not_go_through_autograd_are_exchanged_too(lab, one):
    run = lab.launch(2, run="fused", **RUN, **FUSED)
    lines = ledger(run)
    assert [what for what, line in lines.items() if not line["agrees"]] == []
    assert lines["sharding"]["in_effect"] == "ddp over 2 ranks" and lines["gradient_sums"]["agrees"]
    assert column(run, "train_loss") == pytest.approx(column(one[True], "train_loss"), rel=1e-2)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_probe_times_compiled_steps_and_cuda_graphs_too(lab, mode):
    settings = {**RUN, **FAST, "compile_mode": mode, "scaling_probe_steps": 5}
    run = lab.launch(2, run=f"probed_{mode.replace('-', '_')}", **settings)
    assert [what for what, line in ledger(run).items() if not line["agrees"]] == []
    found = read_json(run / "scaling.json")
    for kind in ("loaded", "ready", "alone"):
        assert len(found[f"{kind}_seconds"]) == 2 and min(found[f"{kind}_seconds"]) > 0
    assert min(found["alone_seconds"]) < max(found["ready_seconds"])
    devices = read_json(run / "env.json")["devices"]
    assert [one["device"] for one in devices] == ["cuda:0", "cuda:1"] and devices[0]["memory_gib"] > 1
