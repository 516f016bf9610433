"""The engine as its users start it: `python -m engine.train FILE`, with loader, progress lines and a checkpoint.

Everything is read from the files that the run leaves. Its evaluation and its checkpoint are not in the times of the
steps; nor are they in any peer's.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.race import evaluations
from benchmarks.task import Task
from engine.config import Config, resolve
from engine.rundir import toml


def measure(task: Task) -> dict:
    config = resolve(task.settings, "benchmark")
    Path("run.toml").write_text(toml(config), encoding="utf-8")
    done = subprocess.run(command(config.parallel.processes), check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it said why
    measured = read(config, task.size.warmup)
    if task.size.target_loss:
        measured |= {"step_tokens": config.training.batch_size * config.model.context, "evals": evals(config)}
    return measured


def command(processes: int) -> list[str]:
    """How a run of so many processes is started."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [sys.executable, "-m", *(launcher if processes > 1 else []), "engine.train", "run.toml"]


def read(config: Config, warmup: int) -> dict:
    """The measurement, from the directory of a complete run."""
    directory = config.directory
    with (directory / "steps.csv").open(newline="", encoding="utf-8") as file:
        steps = list(csv.DictReader(file))
    metrics, ledger = (_json(directory / f"{name}.json") for name in ("metrics", "ledger"))
    peaks = [float(row["peak_memory_gib"]) for row in steps[warmup:] if row["peak_memory_gib"]]
    return {
        "step_seconds": [float(row["step_seconds"]) for row in steps[warmup:]],
        "first_step_seconds": float(steps[0]["step_seconds"]),
        "peak_gib": max(peaks) if peaks else None,
        "peak_reserved_gib": metrics.get("peak_reserved_gib"),
        "loss_first": float(steps[0]["train_loss"]),
        "loss_last": float(steps[-1]["train_loss"]),
        "data_wait_seconds": sum(float(row["data_wait_seconds"]) for row in steps[warmup:]),
        "compile_seconds": metrics["compile_seconds"],
        "activation_mib": metrics["activation_mib"],
        "parameters": metrics["parameters"],
        "problems": [
            f"ledger: {e['what']}: requested {e['requested']}, in effect {e['in_effect']} ({e['how']})"
            for e in ledger["entries"]
            if not e["agrees"]
        ],
        # What the run itself reports, for comparison: all steps but its own warm-up
        "reported": {
            name: metrics[name] for name in ("tokens_per_second", "peak_memory_gib", "checkpoint_seconds")
        },
    }


def evals(config: Config) -> list[dict]:
    """The evaluations of a complete run, with the seconds of training before each."""
    found = {}
    for name in ("steps", "evals"):
        with (config.directory / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            found[name] = list(csv.DictReader(file))
    losses = [(int(row["step"]) + 1, float(row["val_loss"])) for row in found["evals"]]
    return evaluations(losses, [float(row["step_seconds"]) for row in found["steps"]])


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
