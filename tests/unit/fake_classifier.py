"""Results of a study of classifiers in one and two processes, written by hand for tests: round figures throughout.

30 steps of 256 rows, or 15 of 512, are 3 epochs of 2,560. The files are those of `metrics.rows`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w
from fake_results import EVALUATED, write_json

CONTEXT, EPOCH, EPOCHS = 128, 2560, 3
RUNS = {
    "small_1": {},
    "small_2": {"processes": 2},
    "large_1": {"width": 256},
    "large_2": {"width": 256, "processes": 2, "batch_size": 512, "steps": 15},
}
SCALING = {
    "small_2": {"reference": "small_1", "kind": "strong"},
    "large_2": {"reference": "large_1", "kind": "weak"},
}
CRITERIA = [
    {"run": "large_2", "measure": "speedup", "at_least": 1.8},
    {"run": "small_1", "measure": "test_accuracy", "at_least": 0.91, "at_most": 0.95},
    {"run": "small_2", "measure": "efficiency", "at_least": 0.7},
]
# run -> seconds of a step of each rank: from the loader, with a batch that is there, and without exchange
PROBES = {
    "small_1": ([0.010], [0.009], [0.009]),
    "small_2": ([0.0080, 0.0080], [0.0075, 0.0074], [0.0070, 0.0066]),
    "large_1": ([0.0400], [0.0395], [0.0395]),
    "large_2": ([0.0420, 0.0415], [0.0415, 0.0410], [0.0405, 0.0400]),
}
ACCURACY = {"small_1": 0.912, "small_2": 0.911, "large_1": 0.921, "large_2": 0.920}  # of seed 2
PART = "50,670 of the 120,000 published training rows (42 %)"


def classifier_study(root: Path, seeds: tuple[int, ...] = (1, 2, 3), **changes: Any) -> Path:
    """Write results/agnews with all runs complete; `changes` replace keys of study.json."""
    results = root / "results" / "agnews"
    study = {
        "study": "agnews",
        "question": "Does a classifier train faster in two processes?",
        "baseline": "small_1",
        "metric": "test_accuracy",
        "seeds": list(seeds),
        "dataset": "ag_news",
        "runs": RUNS,
        "scaling": SCALING,
        "criteria": CRITERIA,
        "base": {"steps": 30},
    } | changes
    write_json(results / "configs" / "study.json", study)
    for run in study["runs"]:
        for seed in seeds:
            write_classifier(results, run, seed, study["runs"][run])
    return results


def probe(run: str, batch_size: int = 256, **changes: Any) -> dict[str, Any]:
    """scaling.json of a run of this study, or with other values."""
    loaded, ready, alone = PROBES[run]
    return {
        "ranks": len(loaded),
        "batch_size": batch_size,
        "samples_drawn": batch_size,
        "samples_distinct": batch_size,
        "steps": 5,
        "turns": 3,
        "loaded_seconds": loaded,
        "ready_seconds": ready,
        "alone_seconds": alone,
        "exchange": "ddp",
    } | changes


def write_classifier(results: Path, run: str, seed: int, settings: dict[str, Any] | None = None) -> None:
    """Write one complete run and seed, with its probe and its test."""
    settings = {"batch_size": 256, "steps": 30, "context": CONTEXT, "processes": 1} | (settings or {})
    batch, steps = settings["batch_size"], settings["steps"]
    probed = probe(run, batch)
    seconds, accuracy = max(probed["loaded_seconds"]), ACCURACY[run] + (seed - 2) / 1000
    home = results / f"{run}-{seed}"
    home.mkdir(parents=True, exist_ok=True)
    tokens = batch * CONTEXT
    rows = [
        f"{s},{(s + 1) * tokens},{1.0 - s / 100},0.001,0.5,{seconds},{tokens / seconds}" for s in range(steps)
    ]
    head = "step,tokens_seen,train_loss,lr,grad_norm,step_seconds,tokens_per_second"
    (home / "steps.csv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    # Best after two epochs, a little worse at the end.
    each = steps // EPOCHS
    shares, losses = (accuracy - 0.03, accuracy + 0.002, accuracy), (0.33, 0.27, 0.28)
    ends = [(e + 1) * each for e in range(EPOCHS)]
    evals = [
        f"{n - 1},{n * tokens},{loss},{share}" for n, loss, share in zip(ends, losses, shares, strict=True)
    ]
    (home / "evals.csv").write_text(
        "\n".join(["step,tokens_seen,val_loss,val_accuracy", *evals]) + "\n", encoding="utf-8"
    )
    line = {
        "what": "dataset",
        "requested": "ag_news",
        "in_effect": "ag_news",
        "how": f"48,000 training rows, from {PART}, dropped 3 repeated",
        "agrees": True,
    }
    write_json(home / "ledger.json", {"entries": [line]})
    env = {"torch": "2.13.0", "device": "cpu", "processes": settings["processes"]}
    write_json(home / "env.json", env)
    tables = {"run": {"run": run, "seed": seed}, "settings": settings | {"scaling_probe_steps": 5}}
    (home / "config.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
    write_json(home / "scaling.json", probed)
    write_json(
        home / "metrics.json",
        {
            "status": "complete",
            "steps": steps,
            "tokens": steps * tokens,
            "samples": steps * batch,
            "samples_per_second": batch / seconds,
            "samples_per_epoch": EPOCH,
            "classes": ["World", "Sports", "Business", "Sci/Tech"],
            "train_loss": 0.25,
            "val_loss": losses[-1],
            "best_val_loss": min(losses),
            "val_accuracy": shares[-1],
            "best_val_accuracy": max(shares),
            "step_seconds_median": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": 0.25,
            "activation_mib": 40.0,
            "train_seconds": steps * seconds,
            "data_order_sha256": f"{seed:064x}",
            **EVALUATED,
        },
    )
    write_json(
        results / "test" / f"{run}-{seed}.json",
        {"split": "test", "test_loss": 0.28, "test_accuracy": accuracy, "examples": 7600, **EVALUATED},
    )
