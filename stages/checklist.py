"""The checklist of a study or preset: what `expects` says a run must be, against what it is, before its first step.

    python -m stages.checklist results/<study>/configs/<run>-<seed>.toml     the lines; exit 2 if one fails

What follows from settings alone is checked in the plan too, so that a mistake in the last run is told before the
first one starts. Must not change a setting.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.config import SETTINGS, Config, in_epochs, load, nearest
from engine.errors import ConfigError, command

FILE = "checklist.json"
# What an expectation may be about beyond the settings: of the step, and of the data that were made.
OF_STEP = {
    "accumulation": lambda c: c.training.batch_size // (_micro(c) * _replicas(c)),
    "tokens_per_step": lambda c: c.training.batch_size * c.model.context,
}
OF_DATA = {
    "train_tokens_at_least": lambda meta: meta["splits"]["train"]["tokens"],
    "train_sha256": lambda meta: meta["splits"]["train"]["sha256_tokens"],
}
OWN = ("steps", "epochs")  # what a run with a budget of its own has otherwise


@dataclass(frozen=True)
class Check:
    """One line of the checklist."""

    what: str
    expected: str
    found: str
    passed: bool

    def __str__(self) -> str:
        word = "pass" if self.passed else "FAIL"
        return f"{word}  {self.what:<22} {self.found}" + (
            "" if self.passed else f", expected {self.expected}"
        )


def _replicas(config: Config) -> int:
    p = config.parallel
    return max(p.processes // p.tensor_parallel, 1) if p.shard_samples else 1


def _micro(config: Config) -> int:
    return config.training.micro_batch_size or config.training.batch_size // _replicas(config)


def problems(expects: object) -> Iterator[str]:
    """What is wrong with the key `expects` itself."""
    if not isinstance(expects, dict):
        yield f"expects = {expects!r}: must be a mapping from a setting to its value, or to a list of them"
        return
    for name, value in expects.items():
        values = value if isinstance(value, list) else [value]
        if name in OF_STEP or name == "train_tokens_at_least":
            if not all(type(one) is int and one > 0 for one in values):
                yield f"expects.{name} = {value!r}: must be a whole number ≥ 1"
        elif name in OF_DATA:
            if not all(isinstance(one, str) for one in values):
                yield f"expects.{name} = {value!r}: must be text"
        elif name not in SETTINGS:
            more = ", ".join([*OF_STEP, *OF_DATA])
            yield f"expects.{name}: is no setting{nearest(str(name))}, nor one of {more}"
        elif bad := [one for one in values if not SETTINGS[name].accepts(one)]:
            yield f"expects.{name} = {bad[0]!r}: must be {SETTINGS[name].allowed}"


def of_settings(expects: dict, config: Config, own_budget: Iterable[str] = ()) -> list[Check]:
    """The lines that the settings of a run decide; own_budget: the runs of the study that have one."""
    flat, checks = config.flat, []
    for name, wanted in expects.items():
        if name in OF_DATA or (name in OWN and config.run.run in own_budget):
            continue
        found = OF_STEP[name](config) if name in OF_STEP else flat[name]
        if name in in_epochs(flat):
            found = "said in epochs"  # only the token files tell how many
        checks.append(_check(name, wanted, found))
    return checks


def of_data(expects: dict, meta: dict) -> list[Check]:
    """The lines that the token files decide."""
    checks = []
    for name, find in OF_DATA.items():
        if name in expects:
            found, wanted = find(meta), expects[name]
            if name == "train_tokens_at_least":
                few = "" if found >= wanted else ", too few to rank runs by"
                checks.append(Check("train_tokens", f"≥ {wanted:,}{few}", f"{found:,}", found >= wanted))
            else:
                checks.append(_check(name, wanted, found))
    return checks


def _check(name: str, wanted: object, found: object) -> Check:
    values = wanted if isinstance(wanted, list) else [wanted]
    return Check(name, " or ".join(map(_shown, values)), _shown(found), found in values)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else str(value)


def of_plan(path: Path) -> list[Check]:
    """The whole checklist of the run whose planned TOML is `path`; empty where its study expects nothing.

    Raises ConfigError if the tokens are not there.
    """
    study = path.with_name("study.json")
    if not study.is_file():
        return []
    plan = json.loads(study.read_text(encoding="utf-8"))
    expects = plan.get("expects", {})
    config = load(path)
    checks = of_settings(expects, config, plan.get("own_budget", []))
    if any(name in expects for name in OF_DATA):
        from engine.data.prepare import META  # numpy, which the plan does without

        meta = config.tokens_directory / META
        if not meta.is_file():
            raise ConfigError("no tokens yet; dvc repro tokenize makes them", str(config.tokens_directory))
        checks += of_data(expects, json.loads(meta.read_text(encoding="utf-8")))
    return checks


def require(path: Path) -> list[Check]:
    """Print the checklist of a planned run; raise ConfigError with all lines that fail."""
    checks = of_plan(path)
    for check in checks:
        print(f"checklist {path.stem}: {check}", file=sys.stderr, flush=True)
    if failed := [c for c in checks if not c.passed]:
        raise ConfigError(words(failed), f"the checklist of {path.stem} (expects)")
    return checks


def words(failed: Iterable[Check]) -> list[str]:
    """Each failed line as a problem."""
    return [f"{c.what} is {c.found}, expected {c.expected}" for c in failed]


def as_rows(checks: Iterable[Check]) -> list[dict]:
    """For checklist.json."""
    return [vars(check) for check in checks]


@command
def main() -> None:
    if len(sys.argv) != 2:
        raise ConfigError("usage: python -m stages.checklist FILE.toml")
    require(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
