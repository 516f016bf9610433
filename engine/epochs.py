"""A run's length and its warm-up said in epochs: how many steps they are, once the token files are known. No torch.

The steps of n epochs are the fewest that have all n epochs' samples: n times the samples of an epoch over batch_size,
rounded up, in exact fractions. From then on the run has steps alone: its config.toml, schedule, ramps and rules know
nothing of epochs.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from engine import rules
from engine.config import Config
from engine.data.order import windows
from engine.errors import ConfigError
from engine.ledger import Line


def samples_per_epoch(meta: Mapping, config: Config) -> int:
    """Of the training split that `meta`, a token directory's meta.json, describes; 0 where it has none."""
    train = meta["splits"]["train"]
    return train["rows"] if "rows" in train else windows(train["tokens"], config.model.context)


def steps_of(epochs: float, samples: int, batch_size: int) -> int:
    """The fewest steps that have all samples of so many epochs, of `samples` each."""
    return math.ceil(Fraction(repr(float(epochs))) * samples / batch_size)


def in_steps(config: Config, meta: Mapping) -> Config:
    """`config` with its steps and warm-up as numbers of steps; itself where they are.

    Raises ConfigError with the rules that the number of steps breaks, and for an epoch without samples.
    """
    t, warmup = config.training, config.schedule.warmup_epochs
    if not (t.epochs or warmup):
        return config
    samples = samples_per_epoch(meta, config)
    if samples < 1:
        raise ConfigError(
            f"epochs = {t.epochs:g}, warmup_epochs = {warmup:g}: the training split has no sample of context = "
            f"{config.model.context} tokens; set a smaller context"
        )
    found = config
    if t.epochs:
        found = replace(
            found, training=replace(t, epochs=0.0, steps=steps_of(t.epochs, samples, t.batch_size))
        )
    if warmup:
        steps = steps_of(warmup, samples, t.batch_size)
        found = replace(found, schedule=replace(found.schedule, warmup_epochs=0.0, warmup_steps=steps))
    if problems := rules.problems(found, ()):
        raise ConfigError(problems, words(config, found, samples))
    return found


def words(asked: Config, found: Config, samples: int) -> str:
    """What was asked for in epochs, in steps: `epochs = 3, which is steps = 188 (…)`."""
    pairs = (
        ("epochs", asked.training.epochs, "steps", found.training.steps),
        ("warmup_epochs", asked.schedule.warmup_epochs, "warmup_steps", found.schedule.warmup_steps),
    )
    said = " and ".join(f"{name} = {value:g}, which is {of} = {n}" for name, value, of, n in pairs if value)
    return f"{said} ({samples} samples an epoch, batch_size = {found.training.batch_size})"


def length(config: Config, samples: int) -> dict[str, float]:
    """For a progress line: a run's steps and warm-up, also in epochs of so many samples."""
    batch, steps, warmup = config.training.batch_size, config.training.steps, config.schedule.warmup_steps
    return {
        "steps": steps,
        "epochs": round(steps * batch / samples, 3),
        "warmup_steps": warmup,
        "warmup_epochs": round(warmup * batch / samples, 3),
        "samples_per_epoch": samples,
    }


def lines(asked: Config, order, steps_taken: int, warmup_steps: int) -> list[Line]:
    """What was asked for in epochs against what the loop took and the schedule has; nothing where all was in steps.

    order: the run's, an engine.data.order.Order. warmup_steps: of the schedule that the steps are taken by.
    """
    batch, samples, found = asked.training.batch_size, order.samples_per_epoch, []
    for name, wanted, steps, of in (
        ("epochs", asked.training.epochs, steps_taken, "batches that the loop was given"),
        ("warmup_epochs", asked.schedule.warmup_epochs, warmup_steps, "warm-up of the step's schedule"),
    ):
        if wanted:
            how = f"{of}, × batch_size {batch} / {samples} samples of the order's epoch; rounded up to whole steps"
            in_effect = f"{steps} steps, {steps * batch / samples:.4g} epochs"
            agrees = steps == steps_of(wanted, samples, batch)
            found.append(Line(name, f"{wanted:g} epochs", in_effect, how, agrees))
    return found
