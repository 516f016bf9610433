"""Whether a run's figures may be compared with the baseline's: axis, frozen settings, hashes, machine, sound rows.

Everything is read off the rows of the runs; why each rule is as it is: docs/decisions/0011-fairness.md. Must not
compute a metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from metrics.measures import AXES
from metrics.rows import Results, RunSeed

# A step's samples follow from these, so that runs which differ in one cannot read the same ones in a step.
ORDER_SETTINGS = (
    "data_seed",
    "batch_size",
    "context",
    "steps",
    "curriculum",
    "curriculum_steps",
    "curriculum_start",
)
# What none may have otherwise than the baseline unless the study says so of one of them.
SAME = ("clip_norm", "weight_decay", "dropout", "precision")
HASHES = ("evaluation_sha256", "evaluation_precision")  # in metrics.json and in the test's file
MACHINE = ("device", "device_name", "cpu_count", "platform", "torch", "cuda")  # in env.json
A_PROCESS = ("threads",)  # in env.json, of one process
EVENTS = {  # events.jsonl: event, and how one and several are called
    "resumed": ("resume", "resumes"),
    "out_of_memory": ("out-of-memory rung", "out-of-memory rungs"),
    "damaged_checkpoint": ("damaged checkpoint", "damaged checkpoints"),
}
LAST_ROWS = {  # figures of metrics.json, and the column whose last row they are
    "steps.csv": {"tokens": "tokens_seen"},
    "evals.csv": {"val_loss": "val_loss", "val_accuracy": "val_accuracy"},
}
COUNTS = {  # counts in metrics.json
    "skipped_steps": ("skipped step", "skipped steps"),
    "norm_spikes": ("spike of the gradient norm", "spikes of the gradient norm"),
}


@dataclass(frozen=True)
class Judgement:
    """Why a run is not compared; all empty when it may be."""

    not_comparable: tuple[str, ...] = ()
    costs_not_comparable: tuple[str, ...] = ()
    invalid: tuple[str, ...] = ()
    own_budget: tuple[
        str, ...
    ] = ()  # of a run that the study gives another amount of the axis: how much it had
    notes: tuple[str, ...] = ()  # what was not paired or could not be checked, although it is compared


def judge(results: Results) -> dict[str, Judgement]:
    """Every run of the study against its baseline, seed by seed."""
    invalid = {run: _invalid(results, run) for run in results.study.runs}
    return {run: _judge(results, run, invalid) for run in results.study.runs}


def _judge(results: Results, run: str, invalid: dict[str, tuple[str, ...]]) -> Judgement:
    baseline = results.study.baseline
    notes = (*_each(results, run, _unchecked), *_one_order(results, run))
    if run == baseline:
        return Judgement(invalid=invalid[run], notes=notes)
    pairs = list(_pairs(results, run))

    def differences(check: Callable[[Results, RunSeed, RunSeed], Iterable[str]]) -> list[str]:
        found = ((one.seed, words) for one, other in pairs for words in check(results, one, other))
        return _by_seed(found, len(pairs))

    reasons = ["the baseline is invalid"] if invalid[baseline] else []
    for name, words in ((run, "diverged"), (baseline, "the baseline diverged")):
        reasons += _by_seed((one.seed, words) for one in results.of(name) if one.state == "diverged")
    if not pairs and not reasons and any(one.state == "complete" for one in results.of(run)):
        reasons.append("no seed in common with the baseline")
    budgets = differences(_axis)
    is_own = run in results.study.own_budget
    reasons += [] if is_own else budgets
    for check in (
        _frozen,
        _undeclared,
        _decay,
        evaluation_differences,
        data_differences,
        order_differences,
    ):
        reasons += differences(check)
    machine = differences(machine_differences)
    if results.study.axis == "seconds":  # another machine does more in them
        reasons += machine
    notes = (*notes, *differences(_unpaired), *_other_seeds(results, run))
    own = tuple(budgets or ["no other than the baseline's"]) if is_own and pairs else ()
    return Judgement(tuple(reasons), tuple(machine), invalid[run], own, notes)


def _other_seeds(results: Results, run: str) -> Iterator[str]:
    """Means over other seeds than the baseline's: only the paired difference is of the same ones."""
    mine, theirs = (
        [one.seed for one in results.of(name) if one.state == "complete"]
        for name in (run, results.study.baseline)
    )
    if mine and theirs and mine != theirs:
        yield f"its means are over {seeds_words(mine)}, the baseline's over {seeds_words(theirs)}"


def _pairs(results: Results, run: str) -> Iterator[tuple[RunSeed, RunSeed]]:
    """The run's complete seeds, each with the baseline's where that is complete too."""
    baseline = {one.seed: one for one in results.of(results.study.baseline) if one.state == "complete"}
    for one in results.of(run):
        if one.state == "complete" and one.seed in baseline:
            yield one, baseline[one.seed]


def _each(results: Results, run: str, check: Callable[[RunSeed], Iterable[str]]) -> tuple[str, ...]:
    done = [one for one in results.of(run) if one.state == "complete"]
    return tuple(_by_seed(((one.seed, words) for one in done for words in check(one)), len(done)))


def _by_seed(found: Iterable[tuple[int, str]], everywhere: int = 0) -> list[str]:
    """Each sentence once, with the seeds it is about, unless it is about `everywhere` of them."""
    seeds: dict[str, list[int]] = {}
    for seed, words in found:
        seeds.setdefault(words, []).append(seed)
    return [w if len(s) == everywhere else f"{w} ({seeds_words(s)})" for w, s in seeds.items()]


def seeds_words(seeds: list[int]) -> str:
    """`seed 2`, `seeds 1, 3`."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _axis(results: Results, one: RunSeed, other: RunSeed) -> Iterator[str]:
    """Unequal budgets, on the study's axis."""
    axis = AXES[results.study.axis]
    mine, theirs = one.metrics.get(axis.key), other.metrics.get(axis.key)
    if mine is None or theirs is None:
        yield f"its {axis.unit} or the baseline's were not recorded, and the study compares at {axis.words}"
    elif abs(mine - theirs) > axis.tolerance * abs(theirs):
        limit = f", more than {axis.tolerance:.0%} apart" if axis.tolerance else ""
        yield f"had {_amount(mine)} {axis.unit}, the baseline {_amount(theirs)}{limit}"
    if results.study.axis == "seconds":
        for side, run in (("it", one), ("the baseline", other)):
            if any(event.get("event") == "resumed" for event in run.events):
                yield f"{side} was resumed, and the steps done again are in no one's seconds"


def _amount(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _frozen(results: Results, one: RunSeed, other: RunSeed) -> Iterator[str]:
    """Frozen settings that the run had otherwise than the baseline, or otherwise than it asked for."""
    for name in results.study.frozen:
        mine, theirs = one.config.get(name), other.config.get(name)
        if mine != theirs:
            yield f"{name} is frozen: {_value(mine)}, the baseline has {_value(theirs)}"
        for side, whose in ((one, ""), (other, "the baseline's ")):
            for entry in side.ledger:
                if entry["what"] in (name, f"{name}, as first asked") and not entry["agrees"]:
                    found = f"requested {entry['requested']}, in effect {entry['in_effect']}"
                    yield f"{whose}{name} is frozen: {found}"


def _undeclared(results: Results, one: RunSeed, other: RunSeed) -> Iterator[str]:
    """Settings that must be alike and are not, although the study sets them for neither run."""
    said = results.study.runs[one.run].keys() | results.study.runs[other.run].keys()
    for name in SAME:
        mine, theirs = one.config.get(name), other.config.get(name)
        if mine != theirs and name not in said and name not in results.study.frozen:
            yield f"{name} {_value(mine)}, the baseline's {_value(theirs)}, and the study sets it for neither"


def _decay(results: Results, one: RunSeed, other: RunSeed) -> Iterator[str]:
    """Weight decay in effect on other parameters, or of another size, although the study sets it for neither."""
    said = results.study.runs[one.run].keys() | results.study.runs[other.run].keys()
    mine, theirs = _decays(one), _decays(other)
    if said & {"weight_decay", "muon_weight_decay"} or None in (mine, theirs):
        return
    for kind in mine.keys() & theirs.keys():
        if mine[kind] != theirs[kind]:
            yield (
                f"weight decay in effect is {_listed(mine[kind])} of {kind}, the baseline's {_listed(theirs[kind])}, "
                "and the study sets it for neither"
            )


def _decays(one: RunSeed) -> dict[str, set[str]] | None:
    """kind of parameter → the decays that its ledger found on them; None where it does not say.

    Of Muon only what another optimizer updates: its own decay goes with another learning rate.
    """
    lines = [entry["in_effect"] for entry in one.ledger if entry["what"] == "weight_decay"]
    if not lines:
        return None
    found: dict[str, set[str]] = {}
    for part in lines[0].split(", "):
        size, _, kind = part.partition(" of ")
        found.setdefault(kind, set()).add(size)
    if "embeddings" in found:
        found.pop("matrices", None)
    return {kind: found[kind] for kind in sorted(found)}


def _listed(sizes: set[str]) -> str:
    return " and ".join(sorted(sizes))


def data_differences(
    _results: Results, one: RunSeed, other: RunSeed, whose: str = "the baseline"
) -> Iterator[str]:
    """Other training tokens than the baseline's, or whose `other` is, whatever their number."""
    mine, theirs = (side.metrics.get("train_sha256") for side in (one, other))
    if None not in (mine, theirs) and mine != theirs:
        yield f"was trained on other tokens (sha256 {mine[:12]}) than {whose} ({theirs[:12]})"


def _value(value: Any) -> str:
    return "its default" if value is None else str(value)


def evaluation_differences(
    _results: Results, one: RunSeed, other: RunSeed, whose: str = "the baseline"
) -> Iterator[str]:
    """Another evaluation set, windows or precision than the baseline's, or whose `other` is."""
    for where, mine, theirs in (
        ("validation", one.metrics, other.metrics),
        ("test", one.test, other.test),
    ):
        set_key, precision_key = HASHES
        if None not in (mine.get(set_key), theirs.get(set_key)) and mine[set_key] != theirs[set_key]:
            yield f"was scored on other {where} tokens or windows than {whose}"
        found = mine.get(precision_key), theirs.get(precision_key)
        if None not in found and found[0] != found[1]:
            yield (
                f"{where} was scored in {found[0]}, {whose}'s in {found[1]} (eval_precision makes them equal)"
            )


def order_differences(
    _results: Results, one: RunSeed, other: RunSeed, whose: str = "the baseline"
) -> Iterator[str]:
    """Another data order than the baseline's, or whose `other` is, although nothing that it follows from differs."""
    if _other_order(one, other) and not _order_settings_changed(one, other):
        yield f"read its data in another order than {whose}"


def _unpaired(_results: Results, one: RunSeed, other: RunSeed) -> Iterator[str]:
    if _other_order(one, other) and (names := _order_settings_changed(one, other)):
        yield f"data order not paired, because of {', '.join(names)}"


def _other_order(one: RunSeed, other: RunSeed) -> bool:
    mine, theirs = (side.metrics.get("data_order_sha256") for side in (one, other))
    return None not in (mine, theirs) and mine != theirs


def _order_settings_changed(one: RunSeed, other: RunSeed) -> list[str]:
    return [name for name in ORDER_SETTINGS if one.config.get(name) != other.config.get(name)]


def _unchecked(one: RunSeed) -> Iterator[str]:
    """What its rows have no hash of, so that it cannot be compared."""
    keys = {"data order": "data_order_sha256", "evaluation set": HASHES[0], "evaluation precision": HASHES[1]}
    absent = [what for what, key in keys.items() if one.metrics.get(key) is None]
    if one.test and any(one.test.get(key) is None for key in HASHES):
        absent.append("test set and its precision")
    if absent:
        yield f"not checked (rows without hashes): {', '.join(absent)}"


def _one_order(results: Results, run: str) -> Iterator[str]:
    """Seeds that draw other weights and read the same samples in each step."""
    done = [one for one in results.of(run) if one.state == "complete"]
    orders = {one.config.get("data_seed", -1) for one in done}
    if len(done) > 1 and min(orders) >= 0:
        yield (
            f"its seeds have one data order (data_seed = {min(orders)}), so its interval is of initial weights and "
            "dropout alone"
        )


def machine_differences(
    _results: Results, one: RunSeed, other: RunSeed, whose: str = "the baseline"
) -> Iterator[str]:
    """Other hardware, threads or another torch than the baseline's, or whose `other` is."""
    alike = one.env.get("processes") == other.env.get("processes")
    for key in (*MACHINE, *(A_PROCESS if alike else ())):
        mine, theirs = one.env.get(key), other.env.get(key)
        if mine != theirs:
            yield f"ran on another machine or torch: {key} {mine}, {whose}'s {theirs}"


def _invalid(results: Results, run: str) -> tuple[str, ...]:
    """What cannot be true: more memory than there is, figures that are not the rows'."""

    def problems(one: RunSeed) -> Iterator[str]:
        peak, there_is = one.metrics["peak_memory_gib"], one.env.get("device_memory_gib")
        if None not in (peak, there_is) and peak > there_is:
            yield f"peak memory {peak:.4g} GiB, and its device has {there_is:.4g}"
        for name, frame in (("steps.csv", results.steps), ("evals.csv", results.evals)):
            own = frame.filter((pl.col("run") == run) & (pl.col("seed") == one.seed))
            for key, column in LAST_ROWS[name].items():
                if key in one.metrics:
                    yield from _differences(name, own, one.metrics, key, column)

    return _each(results, run, problems)


def _differences(
    name: str, rows: pl.DataFrame, metrics: dict[str, Any], key: str, column: str
) -> Iterator[str]:
    """A figure of metrics.json that is not what its rows end in."""
    said, found = metrics[key], rows[column][-1] if rows.height else None
    both_nan = isinstance(said, float) and isinstance(found, float) and math.isnan(said) and math.isnan(found)
    if said != found and not both_nan:
        yield f"metrics.json says {key} {said}, {name} ends in {found}"


def counts(seeds: Iterable[RunSeed]) -> dict[str, int]:
    """What happened to a run over its complete seeds: resumes, skipped steps and so on; only what did."""
    found: dict[tuple[str, str], int] = {}
    for one in seeds:
        for event in one.events:
            if names := EVENTS.get(event.get("event", "")):
                found[names] = found.get(names, 0) + 1
        for key, names in COUNTS.items():
            found[names] = found.get(names, 0) + int(one.metrics.get(key) or 0)
    return {names[count > 1]: count for names, count in found.items() if count}
