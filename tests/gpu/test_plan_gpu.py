"""The memory plan of GPT-2 124M against the peak that CUDA's allocator saw, in every activation-checkpointing mode.

With PLUMBLINE_GPU_TEST_LOG set, one JSON line for each run goes there: planned, measured and their ratio.
"""

import json
import os

import pytest
import torch
from engine_runs import events, ledger, read_json

from engine import plan
from engine.data.prepare import META, prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

VOCABULARY = 50257
GPT2 = {
    "device": "cuda",
    "layers": 12,
    "heads": 12,
    "width": 768,
    "context": 1024,
    "pad_vocabulary_to": 64,
    "batch_size": 64,
    "micro_batch_size": 32,
    "precision": "bf16",
    "residual_precision": "bf16",
    "loss_kernel": "fused",
    "steps": 4,
    "eval_batch_size": 1,
    "eval_tokens": 1024,
}
MODES = {
    "none": {},
    "full": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
    "every_n": {"activation_checkpointing": "every_n"},
    "budget_half": {"activation_checkpointing": "budget", "memory_budget": 0.5},
    "budget_tenth": {"activation_checkpointing": "budget", "memory_budget": 0.1},
}
KERNELS = {
    "full_loss": {"loss_kernel": "full"},
    "chunked": {"loss_kernel": "chunked", "activation_checkpointing": "full"},
    "no_accumulation": {"batch_size": 32},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "muon": {"optimizer": "muon"},
    "spam": {"optimizer": "spam"},
    "adamwspam_legacy": {"optimizer": "adamwspam_legacy"},
    "offload": {"optimizer_offload": True, "loss_kernel": "chunked", "activation_checkpointing": "full"},
    "fp32_stream": {"residual_precision": "fp32"},
}
LATENT = {"attention_form": "latent", "compile": "blocks"}
FLEX = LATENT | {"attention": "flex", "reciprocal_alpha": 0.5}
RUNS = {
    "latent-blocks": LATENT,
    "latent-eager": LATENT | {"compile": "none"},
    "latent_cudnn-blocks": LATENT | {"attention": "cudnn"},
    "latent_one_query-blocks": LATENT | {"latent_query": "shared"},
    "reciprocal_flex-blocks": FLEX,
    "reciprocal_flex-full-blocks": FLEX | {"activation_checkpointing": "full"},
    "reciprocal_manual-blocks": FLEX | {"attention": "manual", "batch_size": 16, "micro_batch_size": 8},
    **{f"{mode}-blocks": changes | {"compile": "blocks"} for mode, changes in MODES.items()},
    **{f"{mode}-eager": changes for mode, changes in MODES.items() if not mode.startswith("budget")},
    **{f"{name}-blocks": changes | {"compile": "blocks"} for name, changes in KERNELS.items()},
    "none-model": {"compile": "model"},
    "fused_sums-model": {"compile": "model", "gradient_sums": "fused"},
    "fused_sums-full-blocks": MODES["full"] | {"compile": "blocks", "gradient_sums": "fused"},
    "full_loss-model": {"compile": "model", "loss_kernel": "full"},
    "full_loss-eager": {"loss_kernel": "full", "batch_size": 16, "micro_batch_size": 8},
}


def write_tokens(lab) -> None:
    """Bytes of the small text, said to be of GPT-2's vocabulary: the head is then as large as that."""
    config = lab.config(**GPT2)
    text = (lab.directory / "text" / "valid.txt").read_text()
    (lab.directory / "text" / "valid.txt").write_text(text * 10)
    (lab.directory / "text" / "test.txt").write_text((lab.directory / "text" / "test.txt").read_text() * 10)
    prepare(config.data, config.tokens_directory)
    path = config.tokens_directory / META
    path.write_text(json.dumps(read_json(path) | {"vocabulary_size": VOCABULARY}))


def log(**values) -> None:
    if path := os.environ.get("PLUMBLINE_GPU_TEST_LOG"):
        with open(path, "a") as file:
            file.write(json.dumps(values) + "\n")


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_is_within_ten_percent_of_the_measured_peak(lab, name):
    settings = {**GPT2, **RUNS[name]}
    if settings.get("optimizer") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    write_tokens(lab)
    planned = plan.estimate(lab.config(**settings), VOCABULARY, "cuda", 1)
    run = lab.launch(**settings)
    measured = read_json(run / "metrics.json")["peak_memory_gib"]
    log(
        run=name,
        planned_gib=planned.peak / 2**30,
        measured_gib=measured,
        ratio=planned.peak / 2**30 / measured,
    )
    assert planned.peak / 2**30 == pytest.approx(measured, rel=0.1)


def test_the_allocator_keeps_the_limit_and_the_ladder_answers(lab):
    """Too little for 32 sequences whole, enough once attention's and the MLP's activations are recomputed."""
    write_tokens(lab)
    settings = {**GPT2, "memory_limit_gib": 7.0, "on_out_of_memory": "ladder"}
    run = lab.launch(**settings)
    assert [event["rung"] for event in events(run)] == ["chunked loss", "full activation checkpointing"]
    assert read_json(run / "metrics.json")["peak_memory_gib"] < 7.0
    assert ledger(run)["activation_checkpointing, as first asked"]["in_effect"] == "full"
    done = lab.start("-m", "engine.train", lab.file(**settings | {"on_out_of_memory": "stop"}))
    assert done.returncode == 3
    assert done.stderr.strip().splitlines()[-1].startswith("out of memory: ")


def test_the_frontier_ends_where_the_limit_is(lab):
    write_tokens(lab)
    settings = {**GPT2, "memory_limit_gib": 4.0, "compile": "blocks"}
    done = lab.start("-m", "engine.frontier", lab.file(**settings))
    assert done.returncode == 0, done.stderr
    rows = read_json(lab.directory / "frontier.json")["results"]
    largest = max(row["micro_batch"] for row in rows if row["status"] == "success")
    assert all((row["status"] == "success") == (row["micro_batch"] <= largest) for row in rows)
    assert {row["status"] for row in rows} == {"success", "out_of_memory"}
    smaller, larger = (
        plan.estimate(
            lab.config(**settings | {"batch_size": n, "micro_batch_size": 0}), VOCABULARY, "cuda", 1
        )
        for n in (1, 32)
    )
    assert plan.largest_micro_batch(smaller, larger, 4.0 * 2**30) == pytest.approx(largest, rel=0.25)
