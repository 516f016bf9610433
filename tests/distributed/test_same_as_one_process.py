"""Two processes train what one does: DDP and FSDP2 change where the work is done, and no number.

Started by torchrun as a user would, over gloo on the CPU, with a rendezvous on a free port.
"""

import json
from pathlib import Path

import pytest
import torch
from engine_runs import Lab, assert_same_weights, column, events, ledger, read_json, rows, untimed, weights

from engine.data.batches import eval_windows
from engine.data.prepare import open_tokens

pytestmark = pytest.mark.slow

PROBED = Path(__file__).with_name("probed_train.py")
# Clipping acts (the norm is far above it); two micro-batches a rank; dropout is off, because its random
# numbers belong to a rank.
RUN = {
    "steps": 8,
    "batch_size": 8,
    "micro_batch_size": 2,
    "clip_norm": 0.5,
    "lr": 5e-3,
    "warmup_steps": 2,
    "eval_interval": 4,
    "eval_batch_size": 4,
    "activation_norm_layers": [0, 1],
}
WAYS = {
    "ddp": {"data_parallel": "ddp", "activation_checkpointing": "full"},
    "fsdp": {"data_parallel": "fsdp", "checkpoint_interval": 3, "processes": 2},
}


def launched(lab: Lab, way: str, stop_at: str = ""):
    """Train in two processes with the probes; what torchrun said."""
    lab.directory.joinpath("log").mkdir(exist_ok=True)
    arguments = [lab.file(run=way, **RUN, **WAYS[way]), "log", *([stop_at] if stop_at else [])]
    return lab.start(str(PROBED), *arguments, processes=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One lab in which the same run was trained by one process, and by two in each way."""
    with pytest.MonkeyPatch.context() as patch:
        lab = Lab(tmp_path_factory.mktemp("lab"))
        patch.chdir(lab.directory)
        lab.train(run="one", **RUN)
        written = {}
        for way in WAYS:
            done = launched(lab, way)
            assert done.returncode == 0, done.stderr
            written[way] = [
                json.loads((lab.directory / f"log/writes-{rank}.json").read_text()) for rank in (0, 1)
            ]
    results = lab.directory / "results/by_hand"
    return lab, {way: results / f"{way}-1" for way in ("one", *WAYS)}, written


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradient_norms_are_those_of_one_process(trained, way):
    _, runs, _ = trained
    for name in ("train_loss", "grad_norm", "lr", "activation_norm_0", "activation_norm_1"):
        assert column(runs[way], name) == pytest.approx(column(runs["one"], name), rel=1e-5)
    assert min(column(runs["one"], "grad_norm")) > 2 * RUN["clip_norm"]
    assert column(runs[way], "tokens_seen") == column(runs["one"], "tokens_seen")


@pytest.mark.parametrize("way", WAYS)
def test_the_final_weights_are_those_of_one_process(trained, way):
    _, runs, _ = trained
    one, two = weights(runs["one"]), weights(runs[way])
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # Adam divides by the root of a tiny second moment: rounding shows where a gradient is nearly 0.
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=2e-6, msg=name)
    assert max((two[name] - tensor).abs().max() for name, tensor in one.items()) < 0.001 * RUN["lr"]


@pytest.mark.parametrize("way", WAYS)
def test_an_uneven_tail_is_evaluated_once(trained, way):
    lab, runs, _ = trained
    windows = len(eval_windows(len(open_tokens(lab.directory / "tokens/by_hand").validation), 16, 16))
    assert 0 < windows % (2 * 4) < 4  # in the last batches one rank has few windows and the other none
    found = [[float(row["val_loss"]) for row in rows(runs[name] / "evals.csv")] for name in ("one", way)]
    assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_ledger_agrees_and_tells_the_replicas(trained, way):
    _, runs, _ = trained
    lines = ledger(runs[way])
    assert [what for what, line in lines.items() if not line["agrees"]] == []
    assert lines["processes"]["in_effect"] == "2"
    assert "micro-batch 2 × accumulation 2 × replicas 2, 128 tokens a step" in lines["batch_size"]["how"]
    assert read_json(runs[way] / "env.json")["processes"] == 2
    counts = [read_json(runs[name] / "metrics.json")["parameters"] for name in ("one", way)]
    assert counts[0] == counts[1]


def test_memory_is_one_ranks_own(trained):
    _, runs, _ = trained
    kept = {way: read_json(run / "metrics.json")["activation_mib"] for way, run in runs.items()}
    assert kept["ddp"] < 0.7 * kept["one"]  # full activation checkpointing; gradient buckets do not count
    # FSDP2 frees the blocks after the forward pass, and keeps the root whole: embeddings and the last norm.
    root = ((256 + 16) * 32 + 2 * 32) * 4 / 2**20
    assert kept["fsdp"] == pytest.approx(kept["one"] + root, rel=0.01)


@pytest.mark.parametrize("way", WAYS)
def test_only_the_first_process_writes_results(trained, way):
    _, runs, written = trained
    first, second = written[way]
    assert second == []
    opened = {entry.split("/")[-1].removesuffix(".partial") for entry in first if entry.startswith("open ")}
    # safetensors writes past Python's own open
    assert opened >= {path.name for path in runs[way].iterdir()} - {"model.safetensors"}


def test_an_interrupted_sharded_run_ends_bit_for_bit_like_one_that_was_not(trained):
    lab, runs, _ = trained
    run = runs["fsdp"]
    expected = untimed(run / "steps.csv"), untimed(run / "evals.csv"), weights(run)
    stopped = launched(lab, "fsdp", stop_at="7")
    assert stopped.returncode != 0 and "stopped by the test" in stopped.stderr
    assert not (run / "metrics.json").exists()
    again = launched(lab, "fsdp")
    assert again.returncode == 0, again.stderr
    assert events(run) == [{"event": "resumed", "step": 6}]
    assert (untimed(run / "steps.csv"), untimed(run / "evals.csv")) == expected[:2]
    assert_same_weights(weights(run), expected[2])
    assert list((lab.directory / "checkpoints").iterdir()) == []


def test_another_number_of_processes_than_asked_for_is_refused(trained):
    lab, _, _ = trained
    file = lab.file(run="three", batch_size=6, processes=3)
    done = lab.start("-m", "engine.train", file, processes=2)
    assert done.returncode != 0 and "exitcode  : 2 " in done.stderr
    assert (
        "processes = 3, but 2 were launched: use torchrun --nproc-per-node 3, or set processes = 0"
        in done.stderr
    )
    assert "engine/parallel.py" not in done.stderr  # torchrun shows its own traceback, but none of ours
    assert not (lab.directory / "results/by_hand/three-1").exists()
