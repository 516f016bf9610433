"""A results directory as the plan, train and eval stages leave it, written by hand for tests.

Numbers are smooth functions of run, seed and step: plausible, and the same every time.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RUNS = {
    "adamw": {},
    "adamw-checkpointing": {"activation_checkpointing": "full"},
    "sgd": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
}
# run -> (final test loss, step seconds, activations kept in MiB)
LEVELS = {
    "adamw": (2.10, 0.100, 60.3),
    "adamw-checkpointing": (2.10, 0.131, 12.1),
    "sgd": (2.61, 0.094, 60.3),
}
EVALUATED = {"evaluation_sha256": "e" * 64, "evaluation_precision": "float32"}
STEP_HEAD = "step,tokens_seen,train_loss,lr,grad_norm,step_seconds,tokens_per_second,peak_memory_gib"


def write_study(root: Path, seeds: tuple[int, ...] = (1, 2, 3), **changes: Any) -> Path:
    """Write results/quickstart with all runs complete under `root`; `changes` replace keys of study.json."""
    results = root / "results" / "quickstart"
    study = {
        "study": "quickstart",
        "question": "Does activation checkpointing change the result?",
        "baseline": "adamw",
        "metric": "test_loss",
        "seeds": list(seeds),
        "dataset": "stdlib",
        "runs": RUNS,
        "base": {"lr": 0.001, "steps": 300},
    } | changes
    write_json(results / "configs" / "study.json", study)
    for run in study["runs"]:
        for seed in seeds:
            write_run(results, run, seed)
    return results


def write_json(path: Path, value: Any) -> None:
    """Write JSON, making folders as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_run(
    results: Path, run: str, seed: int, test_loss: float | None = None, agrees: bool = True
) -> None:
    """Write one complete run and seed, with its test result."""
    final, step_seconds, activations = LEVELS.get(run, LEVELS["adamw"])
    # The two AdamW runs share their losses exactly, as checkpointing must; SGD wobbles its own way.
    final += 0.02 * math.sin(seed) + (0.01 * math.cos(3 * seed) if run == "sgd" else 0.0)
    final = final if test_loss is None else test_loss
    steps = 300
    home = results / f"{run}-{seed}"
    home.mkdir(parents=True, exist_ok=True)
    rows = [f"{STEP_HEAD},activation_norm_0"]
    for step in range(1, steps + 1):
        loss = final + 3.4 * math.exp(-step / 60) + 0.05 * math.sin(step * (seed + 0.3))
        lr = 0.001 * min(step / 30, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        norm = 0.4 + 2 * math.exp(-step / 40) + 0.1 * math.cos(step * seed)
        rows.append(f"{step},{step * 4096},{loss},{lr},{norm},{step_seconds},{4096 / step_seconds},0.41,3.2")
    (home / "steps.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    evals = [(s, s * 4096, final - 0.03 + 3.4 * math.exp(-s / 60)) for s in range(50, steps + 1, 50)]
    lines = [",".join(map(str, row)) for row in evals]
    (home / "evals.csv").write_text("\n".join(["step,tokens_seen,val_loss", *lines]) + "\n", encoding="utf-8")
    entry = {
        "what": "compile",
        "requested": "true",
        "in_effect": "true" if agrees else "false",
        "how": "dynamo counters: 1 graph" if agrees else "dynamo counters: 0 graphs",
        "agrees": agrees,
    }
    write_json(home / "ledger.json", {"entries": [entry]})
    (home / "events.jsonl").write_text('{"event": "resumed", "step": 40}\n', encoding="utf-8")
    write_json(
        home / "env.json", {"python": "3.11.7", "torch": "2.13.0", "device": "cpu", "git_commit": "0123abc"}
    )
    (home / "config.toml").write_text(
        f"[run]\nrun = {json.dumps(run, ensure_ascii=False)}\nseed = {seed}\n\n"
        "[training]\nsteps = 300\nbatch_size = 32\n",
        encoding="utf-8",
    )
    slow = step_seconds * (1 + 0.01 * math.sin(7 * seed + len(run)))
    write_json(
        home / "metrics.json",
        {
            "status": "complete",
            "parameters": 810_000,
            "steps": steps,
            "tokens": steps * 4096,
            "train_loss": final - 0.1,
            "val_loss": evals[-1][2],
            "best_val_loss": evals[-1][2],
            "val_perplexity": math.exp(evals[-1][2]),
            "val_bits_per_byte": evals[-1][2] / math.log(2) / 2.5,
            "step_seconds_median": slow,
            "tokens_per_second": 4096 / slow,
            "peak_memory_gib": 0.41 + activations / 1024,
            "activation_mib": activations,
            "train_seconds": 30.0,
            "compile_seconds": 0.0,
            "flops": 6.1e12,
            "data_order_sha256": f"{seed:064x}",
            **EVALUATED,
        },
    )
    write_json(
        results / "test" / f"{run}-{seed}.json",
        {
            "split": "test",
            "test_loss": final,
            "test_perplexity": math.exp(final),
            "test_bits_per_byte": final / math.log(2) / 2.5,
            "tokens": 50_000,
            **EVALUATED,
        },
    )


# What a page must bear: markup, quotes, something outside the basic plane, and a name that does not fit.
AWKWARD = {
    "adamw": {},
    'post<norm> & "co"': {"norm_placement": "post"},
    "\N{ROCKET}'s": {"lr": 2.5e-4},
    "a_run_whose_name_says_everything_about_it_and_then_some": {"optimizer": "sgd", "momentum": 0.9},
    "sgd": {"optimizer": "sgd"},
}


def awkward_study(root: Path) -> Path:
    """A study with all that a report has to say: odd names, samples, a run that took effect only in part."""
    question = 'Is <b>bold</b> & "quoted" \N{ROCKET} text $safe?'
    results = write_study(root, question=question, runs=AWKWARD)
    write_run(results, "\N{ROCKET}'s", 2, agrees=False)
    write_run(results, "\N{ROCKET}'s", 3, agrees=False)
    text = {"step": 300, "prompt": "The <i>", "text": " cat & the\n  mat" + " purr" * 400}
    for run in ("adamw", "sgd"):
        write_json(results / f"{run}-1" / "samples.jsonl", text)
    for seed in (1, 2, 3):
        write_json(
            results / f"sgd-{seed}" / "metrics.json",
            {"status": "diverged", "step": 7, "reason": "loss 9 > 3"},
        )
    return results
