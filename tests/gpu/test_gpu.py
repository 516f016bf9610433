"""What only a GPU can show: bf16, compiled blocks, flash attention, the allocator's memory, event timing.

Needs pytest and what the engine needs: torch, torchtitan, numpy, safetensors, tomli-w.
"""

import json
import os

import pytest
import torch
from engine_runs import Lab, column, ledger, read_json, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# Wide enough that activations are most of the memory, and small enough for a second a run.
RUN = {
    "device": "cuda",
    "layers": 4,
    "heads": 4,
    "width": 256,
    "context": 256,
    "batch_size": 16,
    "steps": 12,
    "lr": 5e-4,
    "warmup_steps": 4,
    "schedule": "constant",
    "eval_batch_size": 4,
}
RUNS = {
    "cpu": {"device": "cpu", "steps": 4},
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "manual": {"precision": "bf16", "attention": "manual"},
    "compiled": {"precision": "bf16", "compile": "blocks"},
    "compiled_full": {"precision": "bf16", "compile": "blocks", "activation_checkpointing": "full"},
    **{
        mode: {"precision": "bf16", "activation_checkpointing": mode}
        for mode in ("full", "selective", "every_n")
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every run above, trained once; a compiled one in its own process, because dynamo counts by process."""
    with pytest.MonkeyPatch.context() as patch:
        lab = Lab(tmp_path_factory.mktemp("lab"))
        patch.chdir(lab.directory)
        trained = {}
        for name, changes in RUNS.items():
            train = lab.launch if "compile" in changes else lab.train
            trained[name] = lab.directory / train(run=name, **{**RUN, **changes})
    if log := os.environ.get("PLUMBLINE_GPU_TEST_LOG"):  # to look at afterwards
        with open(log, "w") as file:
            for name, run in trained.items():
                file.write(json.dumps({name: read_json(run / "metrics.json"), "ledger": ledger(run)}) + "\n")
    return trained


@pytest.mark.parametrize("name", [name for name in RUNS if name != "cpu"])
def test_the_ledger_agrees_and_the_run_is_on_the_gpu(runs, name):
    lines = ledger(runs[name])
    assert [what for what, line in lines.items() if not line["agrees"]] == []
    assert lines["device"]["in_effect"] == "cuda:0"
    environment = read_json(runs[name] / "env.json")
    assert environment["device_name"] == torch.cuda.get_device_name() and environment["device_memory_gib"] > 1


def test_fp32_starts_with_the_cpus_losses(runs):
    """The same weights and data on both devices; the kernels round differently."""
    assert column(runs["fp32"], "train_loss")[:4] == pytest.approx(
        column(runs["cpu"], "train_loss"), rel=1e-4
    )


def test_bf16_is_in_effect_and_close_to_fp32(runs):
    assert ledger(runs["bf16"])["precision"]["in_effect"] == "bfloat16"
    losses = [column(runs[name], "train_loss") for name in ("bf16", "fp32")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] != losses[1]
    assert losses[0][-1] < 0.95 * losses[0][0]


def test_flash_attention_is_in_the_ledger(runs):
    assert ledger(runs["bf16"])["attention"]["in_effect"] in ("sdpa flash", "sdpa cudnn")
    assert ledger(runs["manual"])["attention"]["in_effect"] == "manual"
    losses = [column(runs[name], "train_loss") for name in ("bf16", "manual")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("name", ["compiled", "compiled_full"])
def test_compiled_blocks_give_eagers_losses_with_proof(runs, name):
    line = ledger(runs[name])["compile"]
    graphs, breaks, recompiles = (int(part.split()[0]) for part in line["in_effect"].split(", ")[:3])
    assert graphs >= 1 and breaks == 0 and recompiles == 0
    assert column(runs[name], "train_loss") == pytest.approx(column(runs["bf16"], "train_loss"), rel=1e-2)


@pytest.mark.parametrize("mode", ["full", "selective", "every_n"])
def test_activation_checkpointing_reduces_activation_memory_and_nothing_else(runs, mode):
    kept = {name: read_json(runs[name] / "metrics.json")["activation_mib"] for name in ("bf16", mode)}
    assert 0 < kept[mode] < 0.8 * kept["bf16"]
    assert column(runs[mode], "train_loss") == pytest.approx(column(runs["bf16"], "train_loss"), rel=1e-3)


@pytest.mark.parametrize("compiled", ["none", "blocks"])
def test_checkpointing_draws_the_dropout_of_the_forward_pass_again(lab, compiled):
    """Attention's kernel draws too, and selective checkpointing does not run it again."""
    settings = {**RUN, "dropout": 0.3, "precision": "bf16", "attention": "flash", "compile": compiled}
    modes = ("none", "full", "every_n", "selective") if compiled == "none" else ("none", "selective")
    found = [
        lab.launch(run=mode, activation_checkpointing=mode, deterministic=True, **settings) for mode in modes
    ]
    rel = 1e-3 if compiled == "blocks" else 0  # other kernels round otherwise
    for name in ("train_loss", "grad_norm"):
        expected = column(found[0], name)
        assert all(column(run, name) == pytest.approx(expected, rel=rel, abs=0) for run in found[1:]), name


@pytest.mark.parametrize("compiled", ["none", "model"])
def test_a_deterministic_run_is_the_same_bit_for_bit(lab, compiled):
    settings = {**RUN, "dropout": 0.1, "precision": "bf16", "attention": "flash", "compile": compiled}
    runs = [lab.launch(run=f"d{i}", deterministic=True, **settings) for i in range(2)]
    assert len({(run / "model.safetensors").read_bytes() for run in runs}) == 1
    assert column(runs[0], "grad_norm") == column(runs[1], "grad_norm")
    assert ledger(runs[0])["deterministic"]["agrees"]


def test_checkpointing_also_saves_memory_inside_compiled_blocks(runs):
    kept = [
        read_json(runs[name] / "metrics.json")["activation_mib"] for name in ("compiled", "compiled_full")
    ]
    assert 0 < kept[1] < 0.8 * kept[0]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "cpu"])
def test_peak_memory_and_step_times_are_measured_at_every_step(runs, name):
    steps, metrics = rows(runs[name] / "steps.csv"), read_json(runs[name] / "metrics.json")
    weights_gib = metrics["parameters"] * 4 / 2**30
    assert len(steps) == RUN["steps"]
    assert all(float(row["peak_memory_gib"]) > weights_gib for row in steps)
    assert metrics["peak_memory_gib"] == max(float(row["peak_memory_gib"]) for row in steps)
    assert metrics["peak_memory_gib"] > 4 * weights_gib  # weights, gradients and two moments at the least
    seconds = column(runs[name], "step_seconds")
    assert all(s > 0 for s in seconds) and sum(seconds) < metrics["train_seconds"] + metrics["eval_seconds"]


def test_several_processes_may_run_on_the_cpu_beside_a_gpu(lab):
    run = lab.launch(processes=2, run="two", data_parallel="fsdp", steps=2, device="cpu")
    assert ledger(run)["device"]["in_effect"] == "cpu" and ledger(run)["processes"]["in_effect"] == "2"


def test_an_interrupted_run_resumes_on_the_gpu(lab, monkeypatch):
    """With dropout, whose random state is the GPU's own. To rounding only: kernels may add in any order."""
    from engine.step import Step

    settings = {**RUN, "dropout": 0.1, "checkpoint_interval": 4}
    expected = column(lab.train(**settings), "train_loss")
    whole = Step.__call__

    def stop(self, step, micro_batches):
        if step == 6:
            raise InterruptedError
        return whole(self, step, micro_batches)

    with monkeypatch.context() as patched:
        patched.setattr(Step, "__call__", stop)
        with pytest.raises(InterruptedError, match="^$"):
            lab.train(**settings)
    assert column(lab.train(**settings), "train_loss") == pytest.approx(expected, rel=1e-5)
