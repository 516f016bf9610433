"""Findings: what the rows of a study say beyond the verdicts, in sentences, each with the runs it came from.

Only what rows can say, with an interval or the number of seeds; nothing about a run that is invalid or not
comparable. Must not read or write files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import polars as pl

from metrics import statistics
from metrics.batch_findings import batch_multiplier, cost_of_a_sample, lr_rule, scaled_lr
from metrics.counting import COUNTS, with_counts
from metrics.course import at_equal_seconds
from metrics.devices import capped, throttled
from metrics.diagnosis import diagnosis
from metrics.epochs import by_seed, seconds_until
from metrics.gradients import noise, spreads
from metrics.grid_results import sentences
from metrics.measures import METRICS, RECOMPUTING, SPREADING, amount, speed
from metrics.outside import outside, sentence
from metrics.pruning import EMPTY, best_at_each_sparsity, emptied
from metrics.scaling import scalings
from metrics.statistics import Ratio
from metrics.summary import Summary, seed_values
from metrics.words import change, difference, number, of_seeds, paired_seeds, times, with_interval

NAMES = {"study", "run", "seed", "log_interval", "activation_norm_layers"}  # say nothing about how it ran
NAMES |= {"sample_tokens", "sample_prompt"}
NAMES |= {"gradient_norm_layers", "noise_scale_interval", "attention_sequences", "reciprocity_window"}
NAMES |= {"monitor_interval", "latency_lengths"}


@dataclass(frozen=True)
class Finding:
    """A sentence, and the runs whose rows it was made from."""

    text: str
    runs: tuple[str, ...]


def findings(summary: Summary) -> tuple[Finding, ...]:
    """Every finding that the rows of the study give, in a fixed order."""
    study = _Study(summary)
    kinds: tuple[Callable[[_Study], Iterator[Finding]], ...] = (
        _to_beat,
        _from_outside,
        _equal_seconds,
        _identical,
        _memory,
        _batches,
        _learning_rates,
        _scaling,
        _time_to_target,
        _sparsest,
        _sparsity,
        _noise_scale,
        _block_norms,
        _throttled,
        _grids,
    )
    # A grid has many runs, and sentences of its own.
    left_out = (_learning_rates, _time_to_target) if study.results.study.grid else ()
    return tuple(finding for kind in kinds if kind not in left_out for finding in kind(study))


class _Study:
    """The comparable runs of a summary, and what the kinds of findings ask of them."""

    def __init__(self, summary: Summary):
        self.summary, self.results = summary, summary.results
        self.baseline = self.results.study.baseline
        self.runs = {run.run: run for run in summary.comparable}
        self.evals, self.steps = by_seed(self.results.evals), by_seed(self.results.steps)
        # Costs of runs on one machine: each was found to be the baseline's.
        self.costed = [run.run for run in summary.comparable if not run.costs_not_comparable]

    def first(self, run: str):
        """The run's first complete seed, whose settings are those of all its seeds."""
        return next(one for one in self.results.of(run) if one.state == "complete")

    def setting(self, run: str, name: str) -> Any:
        return self.first(run).config.get(name)

    def differences(self, one: str, other: str) -> set[str]:
        """The settings in which two runs differ, apart from names."""
        mine, theirs = self.first(one).config, self.first(other).config
        return {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)} - NAMES

    def ratio(self, run: str, reference: str, metric: str) -> Ratio | None:
        values = seed_values(self.results, metric)
        return statistics.paired_ratio(values[run], values[reference])

    def processes(self, run: str) -> int:
        return int(self.first(run).env.get("processes") or 1)


def _to_beat(study: _Study) -> Iterator[Finding]:
    """The baseline's figure, and the run with the best one; of a study that follows its runs' course."""
    metric, plan = study.summary.metric, study.results.study
    estimates = {name: run.estimates[plan.metric] for name, run in study.runs.items()}
    base = estimates.get(study.baseline)
    others = {name: e.mean for name, e in estimates.items() if e and name != study.baseline}
    if not plan.follows_course or base is None or not others:
        return
    best = (min if metric.better == "lower" else max)(others, key=lambda name: others[name])
    compared = study.runs[best].comparison
    delta = difference(compared.estimate if compared else None, metric)
    said = f"; {compared.verdict}" if compared and compared.verdict else ""
    yield Finding(
        f"Baseline to beat: {study.baseline}, {metric.label} {with_interval(base.times(metric.factor))}. Best of the "
        f"others: {best}, {with_interval(estimates[best].times(metric.factor))}, which is {delta} "
        f"{metric.difference_unit}{said}.",
        (study.baseline, best),
    )


def _from_outside(study: _Study) -> Iterator[Finding]:
    """The figure that the study declares to beat, and the best run's distance to it."""
    if found := outside(study.summary):
        yield Finding(sentence(found), (found.best,) if found.best else ())


def _equal_seconds(study: _Study) -> Iterator[Finding]:
    """Who has the lowest validation loss when the quickest has ended; of a study that follows its runs' course."""
    rows = at_equal_seconds(study.summary) if study.results.study.follows_course else []
    known = [one for one in rows if one.loss]
    if len(known) < 2:  # noqa: PLR2004
        return
    best = min(known, key=lambda one: one.loss.mean)
    base = best.run == study.baseline
    verdict = "the baseline itself" if base else best.comparison.verdict or "no verdict"
    quickest = tuple(one.run for one in rows if one.quickest)
    yield Finding(
        f"At equal seconds of training, {number(best.limit.mean)} s, when the quickest run of each seed had ended "
        f"({', '.join(quickest)}), {best.run} has the lowest validation loss: {with_interval(best.loss)} "
        f"({verdict}).",
        tuple(dict.fromkeys((best.run, *quickest))),
    )


def _identical(study: _Study) -> Iterator[Finding]:
    """Runs that computed exactly what the baseline did."""
    for name, run in study.runs.items():
        if run.status != "identical":
            continue
        steps = study.results.steps
        mine, theirs = (
            steps.filter(pl.col("run") == one).select("seed", "step", "train_loss").sort("seed", "step")
            for one in (name, study.baseline)
        )
        everywhere = ", and the same training loss at every step" if mine.equals(theirs) else ""
        yield Finding(
            f"{name} has exactly the {study.summary.metric.label} of {study.baseline} in all "
            f"{len(run.comparison.seeds)} seeds{everywhere}.",
            (name, study.baseline),
        )


def _memory(study: _Study) -> Iterator[Finding]:
    """Memory saved and time added between runs that differ in how they are computed and nothing else."""
    for reference, name in combinations(_baseline_first(study), 2):
        differing = study.differences(reference, name)
        memory, seconds = (
            study.ratio(name, reference, one) for one in ("peak_memory_gib", "step_milliseconds")
        )
        if not differing or differing - RECOMPUTING or memory is None or seconds is None:
            continue
        kept = study.ratio(name, reference, "activation_mib")
        activations = f", activations kept {change(kept)}" if kept else ""
        changed = ", ".join(f"{key} = {study.setting(name, key)}" for key in sorted(differing))
        yield Finding(
            f"{name} against {reference} ({changed}): peak memory {change(memory)}{activations}, step time "
            f"{change(seconds)}; {paired_seeds(memory.count)}.",
            (name, reference),
        )


def _baseline_first(study: _Study) -> list[str]:
    return sorted(study.costed, key=lambda run: run != study.baseline)


def _batches(study: _Study) -> Iterator[Finding]:
    """What a larger batch is bought with."""
    for kind in (batch_multiplier, cost_of_a_sample):
        yield from (Finding(text, runs) for text, runs in kind(study))


def _learning_rates(study: _Study) -> Iterator[Finding]:
    """How the learning rate went with the batch, and what that did."""
    for kind in (lr_rule, scaled_lr):
        yield from (Finding(text, runs) for text, runs in kind(study))


def _scaling(study: _Study) -> Iterator[Finding]:
    """The diagnosis of every declared pair; of other runs speedup and efficiency, from throughput."""
    yield from (Finding(diagnosis(one), (one.run, one.reference)) for one in scalings(study.summary))
    kind = "samples" if study.results.labelled else "tokens"
    for name in (run for run in study.costed if run not in study.results.study.scaling):
        fewer = [
            run
            for run in study.costed
            if study.processes(run) < study.processes(name) and not study.differences(run, name) - SPREADING
        ]
        if not fewer:
            continue
        reference = min(fewer, key=study.processes)
        speedup = study.ratio(name, reference, speed(study.results.labelled))
        if speedup is None:
            continue
        many, few = study.processes(name), study.processes(reference)
        ids = [_sample_ids(study, run) for run in (name, reference)]
        yield Finding(
            f"{name} in {many} processes trains {times(speedup)} as many {kind} a second as {reference} in {few}: "
            f"efficiency {speedup.mean * few / many:.0%}; {paired_seeds(speedup.count)}. Samples of one step, by "
            f"their ids: {ids[0]} and {ids[1]}.",
            (name, reference),
        )


def _sample_ids(study: _Study, run: str) -> str:
    """What the ledger says of the samples that all processes together read in one step."""
    lines = [entry["in_effect"] for entry in study.first(run).ledger if entry["what"] == "samples"]
    return lines[0] if lines else "not recorded"


def _time_to_target(study: _Study) -> Iterator[Finding]:
    """Samples or tokens, and seconds, until a run's validation was as good as another's final one.

    The other is the baseline, and of runs whose scaling is declared also their reference.
    """
    pairs = [(name, study.baseline) for name in study.runs]
    pairs += [(run, declared["reference"]) for run, declared in study.results.study.scaling.items()]
    for name, other in dict.fromkeys(pairs):
        if name != other and name in study.runs and other in study.runs:
            yield from _target(study, name, other)


def _target(study: _Study, name: str, other: str) -> Iterator[Finding]:
    """One run against the final validation of another."""
    by = "val_accuracy" if study.results.study.metric.endswith("accuracy") else "val_loss"
    finals = seed_values(study.results, by)[other]
    pairs = [seed for seed in study.runs[name].complete_seeds if seed in finals]
    identical = other == study.baseline and study.runs[name].status == "identical"
    if identical or not pairs or not all(math.isfinite(value) for value in finals.values()):
        return
    base = {seed: _reached(study, other, seed, by, value) for seed, value in finals.items()}
    reached = {s: found for s in pairs if (found := _reached(study, name, s, by, finals[s])) is not None}
    target = f"{other}'s final {METRICS[by].label}"
    if not reached:
        among = "in its one seed" if len(pairs) == 1 else f"in any of {len(pairs)} seeds"
        yield Finding(f"{name} never reached {target} {among}.", (name, other))
        return
    amounts, seconds = (
        statistics.paired_ratio(
            {seed: found[i] for seed, found in reached.items()},
            {seed: found[i] for seed, found in base.items() if found},
        )
        for i in range(2)
    )
    kind = "samples" if study.results.labelled else "tokens"
    after = f"{times(amounts)} the {kind}" if amounts else "its first evaluation"
    if seconds and name in study.costed and other in study.costed:
        after += f" and {times(seconds)} the seconds of training (compiling not counted)"
    yield Finding(
        f"{name} reached {target} after {after} that {other} took, in {len(reached)} of {len(pairs)} "
        "seeds; looked at where it was evaluated.",
        (name, other),
    )


def _reached(study: _Study, run: str, seed: int, by: str, target: float) -> tuple[float, float] | None:
    """When a run was first at least as good as `target` where it was evaluated and that counts.

    (samples of a run that chooses, else tokens; seconds of training). Tokens of a sample may differ between runs.
    """
    good = pl.col(by) <= target if METRICS[by].better == "lower" else pl.col(by) >= target
    one = next(one for one in study.results.of(run) if one.seed == seed)
    there = with_counts(one, study.evals[run, seed]).filter(good & pl.col(COUNTS)).head(1)
    if there.is_empty():
        return None
    step, read = there["step"][0], float(there["tokens_seen"][0])
    if one.labelled:
        read = one.metrics["samples"] * (step + 1) / one.metrics["steps"]
    return read, seconds_until(study.steps[run, seed], step, one.starts)


def _sparsest(study: _Study) -> Iterator[Finding]:
    """Which of equally sparse runs is best; of a study that follows its runs' course."""
    if study.results.study.follows_course:
        yield from (Finding(*one) for one in best_at_each_sparsity(study.summary))


def _sparsity(study: _Study) -> Iterator[Finding]:
    """The share of the prunable weights that are exactly 0 at the end, of runs that say it."""
    for name in study.runs:
        shares = [
            share
            for one in study.results.of(name)
            if one.state == "complete" and (share := one.metrics.get("sparsity")) is not None
        ]
        if shares and any(shares):
            estimate = statistics.mean_interval(shares)
            interval = "" if estimate.half_width is None else f" ± {100 * estimate.half_width:.1f}"
            share = f"{100 * estimate.mean:.1f}{interval} %"
            yield Finding(
                f"{name} ended with {share} of its prunable weights 0; {of_seeds(len(shares))}.", (name,)
            )
        if kinds := emptied(study.results, name):
            which = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
            yield Finding(
                f"{name} left next to nothing of {amount(sum(kinds.values()), 'tensor')}, at least "
                f"{100 * EMPTY:g} % of each being 0: {which}.",
                (name,),
            )


def _noise_scale(study: _Study) -> Iterator[Finding]:
    """How far a run's batch is from its gradient noise scale, where that was measured."""
    yield from (Finding(one.words, (one.run,)) for one in noise(study.results) if one.run in study.runs)


def _block_norms(study: _Study) -> Iterator[Finding]:
    """How unlike the gradients of a run's blocks are, at the start and at the end."""
    yield from (Finding(one.words, (one.run,)) for one in spreads(study.results) if one.run in study.runs)


def _throttled(study: _Study) -> Iterator[Finding]:
    """That a run's GPU was slowed down because it was hot, or at its power limit, where a monitor looked."""
    for slowed in (throttled, capped):
        yield from (Finding(text, (run,)) for run in study.runs if (text := slowed(study.results, run)))


def _grids(study: _Study) -> Iterator[Finding]:
    """The stable range and the best place of each of the study's grids."""
    yield from (Finding(text, runs) for text, runs in sentences(study.summary))
