"""The engine beside its peers: one run on one machine, each peer in its own process, one JSON line each, one table.

    python -m benchmarks.speed --size cpu|gpu [--nanogpt PATH] [--only NAME,…] [--out FILE.jsonl]
    python -m benchmarks.speed --size gpu --factorial [--only EXPERIMENT,…]

Peers take turns (A B C A B C), so that a machine that slows down slows all of them. Exit status 1 if a peer that was
there gave no valid row, 2 for a user's mistake.
"""

import argparse
import dataclasses
import json
import shlex
import shutil
import signal
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import process
from benchmarks.data import make_tokens
from benchmarks.factorial import EXPERIMENTS, Experiment
from benchmarks.machine import facts
from benchmarks.peers import PEERS
from benchmarks.recipes import best, engine_settings
from benchmarks.rows import complete
from benchmarks.sizes import SIZES, Size, peers
from benchmarks.table import tables
from benchmarks.task import Task
from benchmarks.techniques import ROADMAP
from engine.config import resolve
from engine.errors import ConfigError, command


@dataclasses.dataclass(frozen=True)
class Job:
    """One peer to measure, once a turn. `identity` goes into its row."""

    module: str
    settings: dict  # the engine's flat settings
    identity: dict


def peer_jobs(size: Size, names: list[str], settings: dict) -> list[Job]:
    """The peers of the speed table; `settings`: the engine's for this task."""
    settings = settings | best(size)
    resolve(settings, "benchmark")
    return [Job(PEERS[name], settings, {"peer": name, "experiment": None}) for name in names]


def experiment_jobs(experiments: list[Experiment], settings: dict) -> list[Job]:
    """Every combination of every experiment, all through the engine, without checkpoints.

    Raises ConfigError before anything runs.
    """
    jobs = []
    for e in experiments:
        for levels in e.combinations():
            changed = settings | {"checkpoint_interval": 0} | e.settings(levels)
            resolve(changed, f"experiment {e.name}, {levels}")
            named = {"peer": "engine", "experiment": e.name, "question": e.question, "means": e.means}
            jobs.append(Job(PEERS["engine"], changed, {**named, "levels": levels, "all_on": e.all_on}))
    return jobs


def experiments_of(size: Size) -> tuple[Experiment, ...]:
    """What --factorial measures on a size."""
    return ROADMAP if size.name == "roadmap" else EXPERIMENTS[size.device]


def measure(jobs: list[Job], task: Task, machine: dict, work: Path, *, identity: dict, keep) -> list[dict]:
    """Measure every job, once a turn; `keep` is called with each row as soon as it is there."""
    rows, size = [], task.size
    for repeat in range(size.repeats):
        for job in jobs:
            directory = work / "run"
            directory.mkdir()
            (directory / "tokens").symlink_to(work / "tokens")
            own = dataclasses.replace(task, settings=job.settings)
            if size.target_loss:  # how soon a loss is reached is a matter of luck too
                seed = repeat + 1
                own = dataclasses.replace(own, seed=seed, settings=job.settings | {"seed": seed})
            measured = process.run(job.module, own, directory, size.limit_seconds)
            shutil.rmtree(directory)
            row = {
                **identity,
                **job.identity,
                "repeat": repeat,
                **complete(
                    measured,
                    size,
                    task.vocabulary,
                    machine["device_name"],
                    machine.get("device_memory_gib"),
                ),
            }
            row.setdefault("settings", {k: v for k, v in job.settings.items() if k != "data_dir"})
            keep(row)
            rows.append(row)
    return rows


def identity_of(size: Size, machine: dict, arguments: list[str], commit: str | None) -> dict:
    """What every row of this run says about it."""
    return {
        "run": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.speed", *arguments]),
        "size": size.name,
        "device": size.device,
        "hardware": machine["device_name"],
        "torch": machine["torch"],
        "git_commit": commit or machine["git_commit"],
        "git_engine_changed": None if commit else machine["git_engine_changed"],
        "machine": machine,
        "step_tokens": size.step_tokens,
        "warmup": size.warmup,
        "steps": size.steps,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Raises ConfigError for a name that there is not."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n")[0])
    p.add_argument(
        "--size",
        choices=SIZES,
        required=True,
        help="the task: cpu, gpu, char, agnews_…, or smoke (only that all runs)",
    )
    p.add_argument("--nanogpt", metavar="PATH", help="a checkout of github.com/karpathy/nanoGPT")
    p.add_argument("--only", metavar="NAME,…", help="only these peers, or experiments")
    p.add_argument("--factorial", action="store_true", help="the engine's techniques alone and combined")
    p.add_argument("--out", metavar="FILE.jsonl", help="append the rows to this file")
    p.add_argument(
        "--data-dir",
        metavar="DIR",
        help="Tiny Shakespeare's directory, for --size cpu and char; AG News', for --size agnews_…; PERSONA-CHAT's",
    )
    p.add_argument("--tokenizer-dir", metavar="DIR", help="of GPT-2's encoding, for --size persona")
    p.add_argument("--warmup", type=int, help="steps before the timed ones")
    p.add_argument("--steps", type=int, help="timed steps")
    p.add_argument("--repeats", type=int, help="turns")
    p.add_argument("--micro-batch", type=int, help="sequences in one forward pass; the tokens of a step stay")
    p.add_argument("--limit-seconds", type=int, help="for one run of one peer")
    p.add_argument("--commit", help="commit of this tree, where git cannot tell")
    args = p.parse_args(arguments)
    size = SIZES[args.size]
    known = [e.name for e in experiments_of(size)] if args.factorial else list(peers(size))
    if args.factorial and (size.classes or size.choices):
        raise ConfigError(f"--factorial: its experiments are of a text, not of --size {args.size}")
    args.names = args.only.split(",") if args.only else known
    if wrong := [name for name in args.names if name not in known]:
        raise ConfigError(f"--only {','.join(wrong)}: must be of {', '.join(known)}")
    if size.target_loss and (args.factorial or not args.data_dir):
        raise ConfigError(
            f"--size {args.size}: a race needs --data-dir, Tiny Shakespeare's, and is no --factorial"
        )
    if args.data_dir and size.tokenizer != "chars" and not (size.classes or size.choices):
        raise ConfigError(
            "--data-dir: Tiny Shakespeare is for --size cpu, AG News for --size agnews_…, PERSONA-CHAT for persona"
        )
    if args.tokenizer_dir and size.tokenizer != "gpt2":
        raise ConfigError(f"--tokenizer-dir: GPT-2's is for --size persona, not for {args.size}")
    return args


def chosen_size(args: argparse.Namespace) -> Size:
    """The size with what the command line changes. Raises ConfigError."""
    size = SIZES[args.size]
    changes = {name: getattr(args, name) for name in ("warmup", "steps", "repeats", "limit_seconds")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.micro_batch is not None:
        sequences = size.micro_batch * size.accumulation
        if args.micro_batch < 1 or sequences % args.micro_batch:
            raise ConfigError(
                f"--micro-batch {args.micro_batch}: must divide the {sequences} sequences of a step"
            )
        changes |= {"micro_batch": args.micro_batch, "accumulation": sequences // args.micro_batch}
    if wrong := [name for name, value in changes.items() if value < 1]:
        raise ConfigError([f"--{name.replace('_', '-')}: must be ≥ 1" for name in wrong])
    return dataclasses.replace(size, **changes)


def announce(row: dict, out: Path | None) -> None:
    """Show progress, and add the row to the file."""
    name = row["peer"] if row["experiment"] is None else f"{row['experiment']} {row['levels']}"
    figure = (
        f"{row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else row["last_lines"][-1]
    )
    print(f"turn {row['repeat'] + 1}, {name}: {row['status']}, {figure}", file=sys.stderr, flush=True)
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@command
def main(arguments: list[str]) -> int:
    args = parse(arguments)
    size = chosen_size(args)
    try:
        machine = facts(size.device)
    except RuntimeError as error:
        raise ConfigError(f"--size {size.name}: {error}") from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the peer ends too
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        work = Path(name)
        data, meta = make_tokens(size, work, args.data_dir, args.tokenizer_dir)
        settings = engine_settings(size, data)
        if args.factorial:
            experiments = [e for e in experiments_of(size) if e.name in args.names]
            jobs = experiment_jobs(experiments, settings)
        else:
            jobs = peer_jobs(size, args.names, settings)
        task = Task(
            size=size,
            settings=settings,
            tokens=work / "tokens" / data["study"],
            token_dtype=meta["dtype"],
            vocabulary=meta["vocabulary_size"],
            nanogpt=Path(args.nanogpt).absolute() if args.nanogpt else None,
        )
        out = Path(args.out) if args.out else None
        identity = identity_of(size, machine, arguments, args.commit)
        rows = measure(jobs, task, machine, work, identity=identity, keep=lambda row: announce(row, out))
    print(tables(rows))
    return int(any(row["status"] not in ("ok", "missing") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
