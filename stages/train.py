"""TRAIN: one resolved TOML → one run directory, by starting the engine and showing its progress.

    python -m stages.train results/<study>/configs/<run>-<seed>.toml

First the study's checklist (stages/checklist.py), of which the run's directory keeps the lines. Starts one process,
or torchrun where the run asks for several. On a terminal the engine's JSON lines become a live progress bar;
elsewhere they are passed on, one line an interval. All that it prints is kept in the run's directory, as output.log.
The engine's exit status becomes this one's, but for a run that diverged: that is a result, and the other runs of the
study go on.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine import children
from engine.config import load
from engine.errors import ConfigError, command
from engine.rundir import identity, write_json
from engine.train import DIVERGED
from stages import checklist, output, progress


def show(lines, console: Console, title: str, steps: int) -> None:
    """Turn the engine's JSON lines into a progress bar on a terminal, or pass them on."""
    if not console.is_terminal:
        for line in lines:
            print(line, end="", flush=True)
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, figures="")
        for line in lines:
            fields = parsed(line)
            if fields.get("event") == "step":
                figures = f"loss {fields['train_loss']:.3f}  {fields['tokens_per_second']:,} tokens/s"
                progress.update(task, completed=fields["step"], total=fields["steps"], figures=figures)
            elif not fields:
                progress.console.print(line.rstrip(), markup=False, highlight=False)


def parsed(line: str) -> dict:
    """The fields of a JSON line; {} for any other line."""
    try:
        fields = json.loads(line)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def is_divergence(line: str) -> bool:
    """Whether the engine says that a guard stopped the run, and has written so."""
    return parsed(line).get("event") == "diverged"


def status(engine_status: int, diverged: bool) -> int:
    """The stage's exit status; torchrun's is 1 whatever its processes' is."""
    return 0 if diverged and engine_status in (DIVERGED, 1) else engine_status


@command
def main() -> None:
    if len(sys.argv) != 2:
        raise ConfigError("usage: python -m stages.train FILE.toml")
    path = sys.argv[1]
    config, said = load(path), []
    checks = checklist.require(Path(path))
    if Path(path).with_name("study.json").is_file():
        so_far = progress.of_study(Path(path).parent)
        print(f"train: {config.run.run}, seed {config.run.seed}; {so_far}", file=sys.stderr, flush=True)

    def shown(lines: Iterable[str]) -> None:
        lines = (said.append(is_divergence(line)) or line for line in lines)
        show(lines, Console(), f"{config.run.run}, seed {config.run.seed}", config.training.steps)

    with output.Kept(config.directory, identity(config)["config_sha256"]) as kept:
        of_engine = output.run(children.training(path, config.parallel.processes), kept, shown)
        own = status(of_engine, any(said))
        if own == 0:
            kept.ended()
    if checks and config.directory.is_dir():
        write_json(config.directory / checklist.FILE, checklist.as_rows(checks))
    sys.exit(own)


if __name__ == "__main__":
    main()
