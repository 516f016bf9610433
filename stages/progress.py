"""How far a study is: its planned runs that are done, and about how long the others will take, from those.

Reads results only; must not start anything.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from engine.config import Config, load

SECONDS = ("train_seconds", "eval_seconds", "checkpoint_seconds", "noise_scale_seconds")  # of metrics.json


@dataclass(frozen=True)
class Progress:
    """Run-seeds of a study."""

    done: int
    total: int
    seconds_left: float | None  # of those that are not done; None where none is done yet
    left: tuple[str, ...] = ()  # their names, in the order in which they are trained

    def __str__(self) -> str:
        if self.seconds_left is None or not self.left:
            return f"{self.done} of {self.total} done"
        return f"{self.done} of {self.total} done, about {duration(self.seconds_left)} to go"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def of_study(configs: Path) -> Progress:
    """Of the study whose plan is in the directory `configs`, results/<study>/configs."""
    plan = json.loads((configs / "study.json").read_text(encoding="utf-8"))
    done: dict[str, list[float]] = {}  # run → seconds a token of each of its seeds
    left: list[tuple[str, str, int]] = []  # name, run, tokens
    total = 0
    for seed in plan["seeds"]:
        for run in plan["runs"]:
            path = configs / f"{run}-{seed}.toml"
            tokens = _tokens(load(path))
            seconds = _seconds(configs.parent / path.stem, path)
            total += 1
            if seconds is None:
                left.append((path.stem, run, tokens))
            else:
                done.setdefault(run, []).append(seconds / tokens)
    every = [pace for paces in done.values() for pace in paces]
    names = tuple(name for name, _, _ in left)
    if not every:
        return Progress(0, total, None, names)
    seconds_left = sum(tokens * _mean(done.get(run, every)) for _, run, tokens in left)
    return Progress(len(every), total, seconds_left, names)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _tokens(config: Config) -> int:
    """Tokens that it trains on; 1, as a stand-in, if its length is in epochs and there are no token files yet."""
    t, steps = config.training, config.training.steps
    if t.epochs:
        meta = config.tokens_directory / "meta.json"
        if not meta.is_file():
            return 1
        from engine.epochs import samples_per_epoch, steps_of  # numpy, which the plan does without

        samples = samples_per_epoch(json.loads(meta.read_text(encoding="utf-8")), config)
        steps = steps_of(t.epochs, samples, t.batch_size)
    return steps * t.batch_size * config.model.context


def _seconds(directory: Path, plan: Path) -> float | None:
    """What the run took, or None if it is not done with the settings that are planned now."""
    try:
        metrics = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if metrics.get("config_sha256") != hashlib.sha256(plan.read_bytes()).hexdigest():
        return None
    return sum(metrics.get(name) or 0.0 for name in SECONDS) if metrics["status"] == "complete" else 0.0
