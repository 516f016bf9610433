"""The largest micro-batch that fits, by trying; each trial is a run of its own.

    python -m engine.frontier FILE.toml [--largest N] [--out frontier.json]

The first trial has the file's own micro-batch; which others there are, says engine/largest.py. A trial is a few
steps of engine.train in a process and a directory of its own, with one micro-batch as the whole batch. Its result is
written before the next one starts, and the same command goes on from there. Running out of memory (exit status 3 of
engine.train) is a result; any other failure is an error, which says nothing about memory and ends the search.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from engine import children, tasks
from engine.config import Config, Evaluation, Logging, is_effective, load
from engine.errors import ConfigError, command
from engine.largest import ERROR, NO_MEMORY, SUCCESS, Result, search
from engine.launch import tokens_for
from engine.rundir import toml, write_json
from engine.train import OUT_OF_MEMORY

STEPS = 5  # of a trial: two that make the optimizer's state, one that is looked at, two that are timed
REPOSITORY = Path(__file__).resolve().parents[1]


def settings_of_trial(config: Config, micro: int) -> Config:
    """`config` for one trial: a few steps, no accumulation, as little beside them as possible.

    What would come in later steps comes in these: whole sequences, and the ranking of weights to prune.
    """
    t, p, logging = config.training, config.pruning, config.logging
    # Else every validation row is scored, which takes long one by one; a quarter is far from the peak of a step.
    cut = is_effective("eval_tokens", config.flat)
    return replace(
        config,
        model=replace(config.model, init_from=""),  # weights take no more memory for having been trained
        training=replace(
            t,
            steps=STEPS,
            epochs=0.0,
            batch_size=micro * replicas(config),
            micro_batch_size=0,
            first_length=0,
            lengthening_steps=0,
            curriculum="none",
        ),
        schedule=replace(
            config.schedule, warmup_steps=min(config.schedule.warmup_steps, STEPS), warmup_epochs=0.0
        ),
        pruning=replace(p, pruning_start=0, pruning_hold=min(p.pruning_hold, 1), pruning_interval=1),
        memory=replace(config.memory, on_out_of_memory="stop"),
        runtime=replace(config.runtime, profile_steps=0, scaling_probe_steps=0),
        evaluation=Evaluation(
            eval_interval=STEPS,
            eval_batch_size=1 if cut else max(micro // 4, 1),
            eval_tokens=config.model.context if cut else 0,
            eval_precision=config.evaluation.eval_precision,
        ),
        saving=replace(config.saving, checkpoint_interval=0, keep_best=False),
        logging=Logging(
            log_interval=STEPS,
            activation_norm_layers=logging.activation_norm_layers,
            gradient_norm_layers=logging.gradient_norm_layers,
        ),
    )


def replicas(config: Config) -> int:
    """Ranks that read different data."""
    if not config.parallel.shard_samples:
        return 1
    return max(config.parallel.processes, 1) // config.parallel.tensor_parallel


def own_micro_batch(config: Config) -> int:
    """That of `config` itself, where the search starts."""
    return config.training.micro_batch_size or max(config.rank_sequences(replicas(config)), 1)


def trial(config: Config, micro: int) -> Result:
    """Run engine.train with this micro-batch, in a process and a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="frontier-") as name:
        directory = Path(name)
        (directory / "tokens").mkdir()
        (directory / config.tokens_directory).symlink_to(config.tokens_directory.absolute())
        own = settings_of_trial(config, micro)
        (directory / "run.toml").write_text(toml(own), encoding="utf-8")
        done = subprocess.run(
            children.training("run.toml", config.parallel.processes),
            cwd=directory,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=children.die_with_parent,  # noqa: PLW1509  no threads here
        )
        found = result(micro, done, directory / own.directory)
    limit = config.memory.memory_limit_gib
    return replace(found, limit_gib=limit) if limit else found


def result(micro: int, done: subprocess.CompletedProcess, directory: Path) -> Result:
    """What a finished trial shows; `directory` is its run's."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    says = [line for line in lines if line.startswith("out of memory: ")]
    if done.returncode == OUT_OF_MEMORY or (says and done.returncode > 0):  # torchrun has a status of its own
        return Result(micro, NO_MEMORY, message=says[-1] if says else "")
    if done.returncode:
        ended = f"exit status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        return Result(micro, ERROR, message="; ".join([ended, *lines[-3:]]))
    metrics, machine = (
        json.loads((directory / name).read_text(encoding="utf-8")) for name in ("metrics.json", "env.json")
    )
    return Result(
        micro,
        SUCCESS,
        peak_memory_gib=metrics["peak_memory_gib"],
        step_seconds=metrics["step_seconds_median"],
        tokens_per_second=metrics["tokens_per_second"],
        reserved_gib=metrics["peak_reserved_gib"],
        limit_gib=machine["device_memory_gib"],
    )


def fingerprint(config: Config) -> str:
    """Of everything that the results depend on, but the device."""
    fixed = replace(settings_of_trial(config, 1), run=replace(config.run, run="trial"))
    versions = [importlib.metadata.version(name) for name in ("torch", "torchtitan")]
    return hashlib.sha256("\n".join([toml(fixed), *versions]).encode()).hexdigest()


def load_results(path: Path, name: str) -> list[Result]:
    """What an earlier search with fingerprint `name` left. Raises ConfigError if `path` is of another search."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        results = [Result(**row) for row in found["results"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"not a frontier's results: {error}; remove it, or use --out", str(path)) from None
    if found["fingerprint"] != name:
        raise ConfigError(
            "these results are of other settings or another torch; remove them, or use --out", str(path)
        )
    return results


def table(results: list[Result], tokens: int, *, so_far: bool = False) -> str:
    """The results, and the largest micro-batch that fits; peak: of tensors, held: by a GPU's allocator for them.

    tokens: that are computed for one sequence, all candidates of a dialogue's. so_far: the search has not ended.
    """
    lines = [
        f"{'micro-batch':>11}  {'status':<13}  {'peak GiB':>9}  {'held GiB':>9}  {'step ms':>9}  {'tokens/s':>10}"
    ]
    for r in results:
        peak, held, milliseconds, rate = (
            "–" if value is None else form.format(value * unit)
            for value, form, unit in (
                (r.peak_memory_gib, "{:.3f}", 1),
                (r.reserved_gib, "{:.3f}", 1),
                (r.step_seconds, "{:.1f}", 1000),
                (r.tokens_per_second, "{:,.0f}", 1),
            )
        )
        lines.append(
            f"{r.micro_batch:>11}  {r.status:<13}  {peak:>9}  {held:>9}  {milliseconds:>9}  {rate:>10}"
        )
        if r.status == ERROR:
            lines.append(f"  {r.message}")
    fitting = [r for r in results if r.status == SUCCESS]
    yet = " so far" if so_far else ""
    if not fitting:
        return "\n".join([*lines, "", f"none fits{yet}"])
    fastest = max(fitting, key=lambda r: r.tokens_per_second)
    largest = fitting[-1].micro_batch
    lines += [
        "",
        f"largest that fits{yet}: {largest} sequences ({largest * tokens:,} tokens); "
        f"fastest: {fastest.micro_batch}",
    ]
    return "\n".join(lines)


def check(config: Config, largest: int | None) -> None:
    """Raise ConfigError where nothing would end the search."""
    if largest is not None and largest < 1:
        raise ConfigError(f"--largest {largest}: must be ≥ 1")
    if largest is None and not config.memory.memory_limit_gib and not _has_gpu(config):
        raise ConfigError(
            "the CPU has no limit of its own to search for: set memory_limit_gib, or give --largest N"
        )


def _has_gpu(config: Config) -> bool:
    import torch

    return config.run.device != "cpu" and torch.cuda.is_available()


@command
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m engine.frontier", description="Find the largest micro-batch that fits."
    )
    parser.add_argument("file", help="the run's TOML file")
    parser.add_argument(
        "--largest", type=int, help="micro-batch at which to stop; default: where memory ends"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("frontier.json"), help="results; also read, to go on"
    )
    asked = parser.parse_args(arguments)
    config = load(asked.file)
    check(config, asked.largest)
    name = fingerprint(config)
    known = load_results(asked.out, name)
    tokens_for(config)
    tokens = tasks.of(config).tokens_per_sample(config)

    def keep(results: list[Result]) -> None:
        write_json(asked.out, {"fingerprint": name, "results": [vars(r) for r in results]})

    def tried(micro: int) -> Result:
        found = trial(config, micro)
        held = "" if found.held_gib is None else f", {found.held_gib:.3f} GiB"
        print(f"micro-batch {micro}: {found.status}{held}", file=sys.stderr, flush=True)
        return found

    try:
        results = search(tried, known, asked.largest or sys.maxsize, keep, own_micro_batch(config))
    except KeyboardInterrupt:
        if found := load_results(asked.out, name):
            print(table(found, tokens, so_far=True), flush=True)
            print(f"what was tried is in {asked.out}: the same command goes on", file=sys.stderr, flush=True)
        raise
    print(table(results, tokens), flush=True)
    if any(r.status == ERROR for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
