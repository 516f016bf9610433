"""What a larger batch is bought with and what it does, in sentences: memory, time and learning rate.

Each function takes the comparable runs of a study, a metrics.findings._Study, and gives sentences, each with the runs
it was made from. Must not read or write files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations
from typing import TYPE_CHECKING

from metrics import statistics
from metrics.batches import micro_batch, peak_lr
from metrics.measures import LEARNING_RATE, RECOMPUTING, speed
from metrics.statistics import Estimate
from metrics.summary import seed_values
from metrics.words import change, difference, paired_seeds, times

if TYPE_CHECKING:
    from metrics.findings import _Study

Sentence = tuple[str, tuple[str, ...]]

BATCH = {"batch_size", "micro_batch_size", "eval_batch_size", "steps", "warmup_steps", *LEARNING_RATE}
BATCH |= {"eval_interval", "checkpoint_interval"}  # counted in steps, of which a larger batch has fewer
LR_MEANS_ANOTHER_THING = {"optimizer", "model", "layers", "heads", "width", "mlp_width", "context"}
SAME_MEMORY = 1.02  # a larger peak is more memory, not the same
RULE_TOLERANCE = 0.01


def batch_multiplier(study: _Study) -> Iterator[Sentence]:
    """How much larger a micro-batch fits into the memory of another run."""
    for reference in study.costed:
        fitting = []
        for name in study.costed:
            memory = study.ratio(name, reference, "peak_memory_gib")
            micro, its = (micro_batch(study.first(run)) for run in (name, reference))
            larger = _recomputes_at_another_batch(study, name, reference) and micro and its and micro > its
            if larger and memory and memory.mean <= SAME_MEMORY:
                fitting.append((micro / its, name, memory, micro, its))
        if fitting:
            multiplier, name, memory, micro, its = max(fitting, key=lambda one: one[0])
            yield (
                f"{name} holds micro-batches {multiplier:.3g} × as large as {reference}'s ({micro} sequences "
                f"against {its}) in {times(memory)} its peak memory; {paired_seeds(memory.count)}.",
                (name, reference),
            )


def _recomputes_at_another_batch(study: _Study, name: str, reference: str) -> bool:
    differing = study.differences(reference, name)
    return bool(differing & RECOMPUTING) and not differing - RECOMPUTING - BATCH


def cost_of_a_sample(study: _Study) -> Iterator[Sentence]:
    """What recomputing costs in time and saves in memory for each sample, where the batch was changed with it.

    Against the baseline; of runs with its batch, metrics.findings says the same of a step.
    """
    reference = study.baseline
    for name in (run for run in study.costed if run != reference and reference in study.costed):
        mine, its = (micro_batch(study.first(run)) for run in (name, reference))
        if not _recomputes_at_another_batch(study, name, reference) or not mine or not its or mine == its:
            continue
        seconds = study.ratio(reference, name, speed(study.results.labelled))  # of one sample
        kept, peak = (study.ratio(name, reference, one) for one in ("activation_mib", "peak_memory_gib"))
        parts = [
            f"{words} {change(ratio.times(its / mine))}"
            for words, ratio in (("activations kept", kept), ("peak memory", peak))
            if ratio
        ]
        if seconds and parts:
            changed = ", ".join(
                f"{key} = {study.setting(name, key)}"
                for key in sorted(study.differences(reference, name) & RECOMPUTING)
            )
            yield (
                f"{name} against {reference} ({changed}), for each sample, {mine} at a time against {its}: "
                f"{', '.join(parts)}, time {change(seconds)}; {paired_seeds(seconds.count)}.",
                (name, reference),
            )


def lr_rule(study: _Study) -> Iterator[Sentence]:
    """Whether runs of another batch size scaled the learning rate, and by which rule.

    Against the reference that the study declares for the run's scaling, or else its baseline.
    """
    for name in study.runs:
        reference = study.results.study.scaling.get(name, {}).get("reference", study.baseline)
        if reference not in study.runs:
            continue
        batch, lr = study.setting(reference, "batch_size"), peak_lr(study.first(reference))
        own_batch, own_lr = study.setting(name, "batch_size"), peak_lr(study.first(name))
        if not all((batch, lr, own_batch, own_lr)) or own_batch == batch:
            continue
        if study.differences(name, reference) & LR_MEANS_ANOTHER_THING:
            continue
        by_batch, by_lr = own_batch / batch, own_lr / lr
        rules = {"the linear rule": by_batch, "the square-root rule": math.sqrt(by_batch)}
        followed = [rule for rule, r in rules.items() if abs(by_lr / r - 1) <= RULE_TOLERANCE]
        said = f"{followed[0]}" if followed else "neither the linear rule nor the square-root rule"
        wanted = f"(linear {by_batch:.4g}, square root {math.sqrt(by_batch):.4g})"
        yield (
            f"{name} has {by_batch:.4g} × the batch size of {reference} and {by_lr:.4g} × its learning rate: "
            f"{said} {wanted}.",
            (name, reference),
        )


def scaled_lr(study: _Study) -> Iterator[Sentence]:
    """What a larger learning rate did at a batch that is not the baseline's: two runs that differ in it alone."""
    if study.baseline not in study.runs:
        return
    batch = study.setting(study.baseline, "batch_size")
    for name, reference in permutations(study.runs, 2):
        lr, its = (peak_lr(study.first(run)) for run in (name, reference))
        alike = study.setting(name, "batch_size") not in (None, batch)
        differing = study.differences(name, reference)
        if alike and lr and its and lr > its and differing and not differing - LEARNING_RATE:
            found = [words for one in _judged_by(study) if (words := _moved(study, name, reference, one))]
            if found:
                yield (
                    f"{name} has {lr / its:.4g} × the learning rate of {reference}, at the same batch size of "
                    f"{study.setting(name, 'batch_size')}: {'; '.join(found)}.",
                    (name, reference),
                )


def _judged_by(study: _Study) -> dict[str, None]:
    """The study's metric, and the best accuracy and loss of validation."""
    return dict.fromkeys((study.results.study.metric, "best_val_accuracy", "best_val_loss"))


def _moved(study: _Study, name: str, reference: str, by: str) -> str:
    """The difference of a metric between two runs over paired seeds; nothing where it was not measured."""
    values, metric = seed_values(study.results, by), study.summary.measure(by)
    seeds = sorted(values[name].keys() & values[reference].keys())
    moved = [values[name][seed] - values[reference][seed] for seed in seeds]
    if not moved or not all(map(math.isfinite, moved)):
        return ""
    estimate = statistics.mean_interval(moved)
    return (
        f"{metric.label} {difference(estimate, metric)} {metric.difference_unit}".rstrip()
        + _rows(study, name, by, estimate)
        + _doubt(estimate)
        + f", {paired_seeds(estimate.count)}"
    )


def _rows(study: _Study, name: str, by: str, estimate: Estimate) -> str:
    """`, 31 of 7,801 rows`: how many a difference of two shares is of."""
    share = study.summary.of(name).proportions.get(by)
    return f", {round(abs(estimate.mean) * share.count):,} of {share.count:,} rows" if share else ""


def _doubt(estimate: Estimate) -> str:
    low, high = estimate.ends()
    if low is None or high is None or not low < 0 < high:
        return ""
    return ", which these seeds do not tell from none"
