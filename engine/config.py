"""A run's configuration: the settings of engine/settings, each declared once, complete and checked.

This module imports no torch, so that a mistake is reported in a fraction of a second. It must not read the
environment or the hardware, and must never change a value: a value is taken as given or refused. Rules between
settings are in engine/rules.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from engine import rules
from engine.declare import Setting
from engine.errors import ConfigError
from engine.settings.data import Data
from engine.settings.kept import Evaluation, Logging, Run, Saving
from engine.settings.machine import Compile, Memory, Parallel, Runtime
from engine.settings.model import Model
from engine.settings.optimizer import Optimizer, Schedule
from engine.settings.training import Guards, Pruning, Training

try:
    import tomllib
except ModuleNotFoundError:  # Python < 3.11 on a GPU node
    import tomli as tomllib


@dataclass(frozen=True)
class Config:
    """One run, complete and valid. A consumer is given its own section, never the whole."""

    run: Run
    data: Data
    model: Model
    optimizer: Optimizer
    schedule: Schedule
    training: Training
    pruning: Pruning
    guards: Guards
    parallel: Parallel
    memory: Memory
    compile: Compile
    runtime: Runtime
    evaluation: Evaluation
    saving: Saving
    logging: Logging

    @property
    def directory(self) -> Path:
        """Where this run writes, relative to the working directory."""
        return Path("results") / self.run.study / f"{self.run.run}-{self.run.seed}"

    @property
    def order_seed(self) -> int:
        """The seed of the data order: data_seed, or where that is not set the run's."""
        return self.run.seed if self.run.data_seed < 0 else self.run.data_seed

    @property
    def peak_lr(self) -> float:
        """The learning rate at the schedule's peak: lr, times what lr_rule makes of batch_size / lr_batch_size.

        In decimals, as one would work it out by hand.
        """
        o, batch = self.optimizer, self.training.batch_size
        if o.lr_rule == "none":
            return o.lr
        ratio = Fraction(batch, o.lr_batch_size)
        if o.lr_rule == "linear":
            return float(Fraction(repr(o.lr)) * ratio)
        return o.lr * math.sqrt(ratio)

    def rank_sequences(self, data_size: int) -> int:
        """Sequences of a step that each of `data_size` ranks reads: its part, or without shards all of them."""
        return self.training.batch_size // (data_size if self.parallel.shard_samples else 1)

    @property
    def tokens_directory(self) -> Path:
        """Where this run's token files are, relative to the working directory."""
        return Path("tokens") / self.run.study

    @property
    def eval_precision(self) -> str:
        """The precision that evaluations have: their own, or that of training."""
        asked = self.evaluation.eval_precision
        return self.training.precision if asked == "precision" else asked

    @property
    def flat(self) -> dict:
        """Every setting by its name."""
        return {name: value for section in SECTIONS for name, value in vars(getattr(self, section)).items()}


SECTIONS = typing.get_type_hints(Config)


def _collect() -> dict[str, Setting]:
    found = {}
    for section, cls in SECTIONS.items():
        types = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            assert f.name not in found, f"setting {f.name} is declared twice"
            found[f.name] = Setting(f.name, section, types[f.name], f.default, **f.metadata)
    return found


SETTINGS = _collect()


def nearest(name: str) -> str:
    """' (nearest: X)' for the declared setting whose name or meaning is most like `name`, or ''."""

    def likeness(s: Setting) -> float:
        words = name.lower().replace("_", " ")
        by_meaning = difflib.SequenceMatcher(None, words, s.meaning.lower()[: len(words) + 5]).ratio()
        return max(difflib.SequenceMatcher(None, name.lower(), s.name).ratio(), by_meaning)

    best = max(SETTINGS.values(), key=likeness)
    return f" (nearest: {best.name})" if likeness(best) >= 0.6 else ""


def value_problems(values: Mapping) -> list[str]:
    """Problems with names, types and ranges of flat `values`."""
    problems = []
    for name, value in values.items():
        if name not in SETTINGS:
            problems.append(f"{name}: unknown setting{nearest(str(name))}")
        elif not SETTINGS[name].accepts(value):
            problems.append(f"{name} = {value!r}: must be {SETTINGS[name].allowed}")
    return problems


def is_effective(name: str, values: Mapping) -> bool:
    """Whether setting `name` can have an effect in a run with these flat `values`."""
    return all(
        values.get(other, SETTINGS[other].default) in wanted
        for other, wanted in SETTINGS[name].only_if.items()
    )


def effect_problems(values: Mapping, unknown: Collection[str] = ()) -> dict[str, str]:
    """Settings that differ from their default and would do nothing, each with its message.

    None that hangs on an `unknown` value.
    """
    problems = {}
    for name, value in values.items():
        s = SETTINGS[name]
        if s.only_if.keys() & set(unknown):
            continue
        if s.typed(value) != s.default and not is_effective(name, values):
            needed = " and ".join(f"{k} = {' or '.join(map(_value, v))}" for k, v in s.only_if.items())
            actual = ", ".join(f"{k} = {_value(values.get(k, SETTINGS[k].default))}" for k in s.only_if)
            problems[name] = f"{name} = {value!r}: would do nothing with {actual}; it needs {needed}"
    return problems


def in_epochs(values: Mapping) -> set[str]:
    """Settings whose values only the token files tell, because flat `values` say them in epochs."""
    pairs = {"steps": "epochs", "warmup_steps": "warmup_epochs"}
    return {steps for steps, epochs in pairs.items() if values.get(epochs, 0)}


def _value(value) -> str:
    """As TOML and YAML have it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def resolve(
    values: Mapping, where: str, problems: Sequence[str] = (), *, only: Collection[str] = ()
) -> Config:
    """Make the complete configuration from flat `values`; what is absent takes its default.

    only: the sections that `values` speak of, if not of all; then no rule counts that others have a part in.
    Raises ConfigError with every problem found, after the `problems` that the caller found already; `where`
    names the file in its message.
    """
    known = {k: v for k, v in values.items() if k in SETTINGS and SETTINGS[k].accepts(v)}
    unknown = values.keys() - known.keys() | in_epochs(known)
    if only:
        unknown |= {s.name for s in SETTINGS.values() if s.section not in only}
    sections = {
        section: cls(**{k: SETTINGS[k].typed(v) for k, v in known.items() if SETTINGS[k].section == section})
        for section, cls in SECTIONS.items()
    }
    config = Config(**sections)
    problems = [
        *problems,
        *value_problems(values),
        *effect_problems(known, unknown).values(),
        *rules.problems(config, unknown),
    ]
    if problems:
        raise ConfigError(problems, where)
    return config


def tables(config: Config) -> dict[str, dict]:
    """The configuration as TOML tables: every setting that can have an effect, nothing else."""
    flat = config.flat
    return {
        section: {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in vars(getattr(config, section)).items()
            if is_effective(k, flat)
        }
        for section in SECTIONS
    }


def load(path: str | Path, *, only: Collection[str] = ()) -> Config:
    """Read one run's TOML file, or one of some sections `only`.

    Raises ConfigError for anything that is not exactly right.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file", str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not valid TOML: {error}", str(path)) from None
    flat, problems = {}, []
    for section, table in data.items():
        if not isinstance(table, dict):
            home = SETTINGS.get(section)
            hint = f"belongs under [{home.section}]" if home else f"unknown setting{nearest(section)}"
            problems.append(f"{section}: {hint}")
            flat |= {section: table} if home else {}
        elif section not in SECTIONS:
            problems.append(f"[{section}]: unknown table; the tables are {', '.join(SECTIONS)}")
        else:
            for name, value in table.items():
                if name in SETTINGS and SETTINGS[name].section != section:
                    problems.append(f"{name}: belongs under [{SETTINGS[name].section}], not [{section}]")
                flat[name] = value
    return resolve(flat, str(path), problems, only=only)


def main() -> None:
    """Print every setting: `python -m engine.config`."""
    for section in SECTIONS:
        print(f"\n[{section}]")
        for s in SETTINGS.values():
            if s.section == section:
                print(f"  {s.name} = {s.default!r}".ljust(38) + f"{s.meaning}; {s.allowed}")


if __name__ == "__main__":
    main()
