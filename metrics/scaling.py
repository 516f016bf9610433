"""Scaling: how many times as fast a run in several processes is as its reference in one, and where the rest goes.

Speed is different samples a second, of all ranks together, from the steps that the run's probe timed (scaling.json);
never the time of an epoch. Seconds are of one step. `metrics.diagnosis` says it. Must not read or write files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from metrics import statistics
from metrics.fairness import machine_differences
from metrics.measures import METRICS
from metrics.rows import RunSeed
from metrics.statistics import Estimate, Ratio
from metrics.summary import Summary
from metrics.words import short

# Where the time goes that is lost, in the order of the tables.
SHARED, WAIT, COMMUNICATION, IMBALANCE, LITTLE_WORK = PARTS = (
    "shared samples",
    "data wait",
    "communication",
    "imbalance",
    "too little work",
)
TOGETHER = "not told apart"  # the last three, where no step could be timed without exchange
COUNTS = ("processes", "batch_size", "drawn", "distinct")
AS_IN_TRAINING = 0.1  # the probe's speed may be so far, relatively, from the training's before it is said


@dataclass(frozen=True)
class Lost:
    """One seed: the seconds of a step, those it would need if nothing were lost, and what the difference is made of.

    `parts` add up to step - ideal. A part can be negative, by noise or because the ranks' caches hold more.
    """

    step: float
    ideal: float
    parts: dict[str, float]
    work: float  # seconds that the fastest rank computes its share of the step's different samples
    reference_work: float  # seconds that the reference computes as many


@dataclass(frozen=True)
class Scaling:
    """A run and its reference over paired seeds. Where `reason` says why nothing was measured, nothing else is set.

    `lost` and `parts` are shares of a step: means over seeds, with intervals.
    """

    run: str
    reference: str
    kind: str  # of metrics.measures.KINDS
    reason: str = ""
    processes: int = 0
    batch_size: int = 0
    drawn: int = 0  # samples of a step, all ranks together
    distinct: int = 0  # different ones of them
    samples_per_second: Estimate | None = None
    speedup: Ratio | None = None
    efficiency: Ratio | None = None
    lost: Estimate | None = None
    parts: dict[str, Estimate] = field(default_factory=dict)
    rank_seconds: tuple[float, ...] = ()  # of each rank alone; empty where that could not be timed
    work: tuple[float, float] = (0.0, 0.0)  # Lost.work and Lost.reference_work
    untold: str = ""  # why communication, imbalance and too little work could not be told apart
    notes: tuple[str, ...] = ()


def scalings(summary: Summary) -> tuple[Scaling, ...]:
    """Every pair that the study declares, in its order."""
    return tuple(
        _scaling(summary, run, declared["reference"], declared["kind"])
        for run, declared in summary.results.study.scaling.items()
    )


def lost(own: dict[str, Any], reference: dict[str, Any]) -> Lost:
    """The lost time of a step of a run with scaling.json `own`, against a reference in one process."""
    distinct, drawn = own["samples_distinct"], own["samples_drawn"]
    # A rank's share of the different samples, as a share of the reference's step.
    share = distinct / reference["samples_distinct"] / own["ranks"]
    step, ready = max(own["loaded_seconds"]), max(own["ready_seconds"])
    its_step, its_ready = max(reference["loaded_seconds"]), max(reference["ready_seconds"])
    alone = own["alone_seconds"]
    # Of the fastest rank: what the others take longer is imbalance, all of it, because a step waits for the slowest.
    computing = min(alone or own["ready_seconds"])
    work, its_work = computing * distinct / drawn, its_ready * share
    parts = {SHARED: computing - work, WAIT: (step - ready) - (its_step - its_ready) * share}
    if alone:
        parts |= {
            COMMUNICATION: ready - max(alone),
            IMBALANCE: max(alone) - computing,
            LITTLE_WORK: work - its_work,
        }
    else:
        parts[TOGETHER] = ready - computing + work - its_work
    return Lost(step, its_step * share, parts, work, its_work)


def scaling_frame(summary: Summary) -> pl.DataFrame:
    """One row a declared pair, unrounded: shares from 0 to 1 of a step, null where not measured."""
    rows = []
    for one in scalings(summary):
        measured = not one.reason
        row: dict[str, Any] = {"run": one.run, "reference": one.reference, "kind": one.kind}
        row |= {name: getattr(one, name) if measured else None for name in COUNTS}
        pace = one.samples_per_second
        row |= {
            "samples_per_second": pace and pace.mean,
            "samples_per_second_half_width": pace and pace.half_width,
        }
        for name, ratio in (("speedup", one.speedup), ("efficiency", one.efficiency)):
            row |= {
                name: ratio and ratio.mean,
                f"{name}_low": ratio and ratio.low,
                f"{name}_high": ratio and ratio.high,
            }
        for name, part in (("lost", one.lost), *((name, one.parts.get(name)) for name in (*PARTS, TOGETHER))):
            key = name.replace(" ", "_")
            row |= {key: part and part.mean, f"{key}_half_width": part and part.half_width}
        rows.append(row | {"not_measured": one.reason})
    words = dict.fromkeys(("run", "reference", "kind", "not_measured"), pl.String)
    types = {
        name: words.get(name, pl.Int64 if name in COUNTS else pl.Float64) for row in rows[:1] for name in row
    }
    return pl.DataFrame(rows, schema=types)


POINTS = {
    **dict.fromkeys(("run", "series", "label"), pl.String),
    "processes": pl.Int64,
    **dict.fromkeys(("value", "low", "high"), pl.Float64),
}


def scaling_points(summary: Summary, efficiency: bool = False) -> pl.DataFrame:
    """Columns run, series, label, processes, value, low, high: a row a measured pair, and one a reference.

    value is the speedup, or the efficiency in percent, low and high its interval (null for one seed and for the
    reference, which has 1 or 100 by definition). A series is what has one reference and one kind.
    """
    rows: dict[tuple[str, int], tuple[Any, ...]] = {}
    for one in scalings(summary):
        ratio = one.efficiency.times(100) if efficiency and one.efficiency else one.speedup
        if ratio is None:
            continue
        series = f"{one.reference}, {one.kind}"
        value = f"{ratio.mean:.1f} %" if efficiency else f"{ratio.mean:.2f} ×"
        label = f"{short(one.run)}: {value} ({one.kind})"
        rows.setdefault((series, 1), (one.reference, series, "", 1, 100.0 if efficiency else 1.0, None, None))
        rows[one.run, one.processes] = (
            one.run,
            series,
            label,
            one.processes,
            ratio.mean,
            ratio.low,
            ratio.high,
        )
    return pl.DataFrame(list(rows.values()), schema=POINTS, orient="row").sort(
        "series", "processes", maintain_order=True
    )


def _scaling(summary: Summary, run: str, reference: str, kind: str) -> Scaling:
    """One pair, or why it was not measured."""
    own, its = (
        {one.seed: one for one in summary.results.of(name) if one.scaling} for name in (run, reference)
    )
    pairs = [(one, its[seed]) for seed, one in own.items() if seed in its]
    if reasons := list(dict.fromkeys((*_absent(summary, run, reference, pairs), *_unlike(summary, pairs)))):
        return Scaling(run, reference, kind, "; ".join(reasons))
    probes = [(one.scaling, other.scaling) for one, other in pairs]
    untold = next((own["exchange"] for own, _ in probes if own["alone_seconds"] is None), "")
    if untold:  # of some seeds: of all, so that the parts are the same
        probes = [(own | {"alone_seconds": None}, its) for own, its in probes]
    speeds = [dict(enumerate(map(_samples_per_second, side))) for side in zip(*probes, strict=True)]
    speedup = statistics.paired_ratio(*speeds)
    assert speedup is not None  # seconds are positive and finite
    found, first = [lost(*pair) for pair in probes], probes[0][0]
    return Scaling(
        run,
        reference,
        kind,
        processes=first["ranks"],
        batch_size=first["batch_size"],
        drawn=first["samples_drawn"],
        distinct=first["samples_distinct"],
        samples_per_second=statistics.mean_interval(list(speeds[0].values())),
        speedup=speedup,
        efficiency=speedup.times(1 / first["ranks"]),
        lost=statistics.mean_interval([1 - one.ideal / one.step for one in found]),
        parts={
            part: statistics.mean_interval([one.parts[part] / one.step for one in found])
            for part in found[0].parts
        },
        rank_seconds=() if untold else _by_rank([own["alone_seconds"] for own, _ in probes]),
        work=(_mean([one.work for one in found]), _mean([one.reference_work for one in found])),
        untold=untold,
        notes=tuple(_notes(pairs)),
    )


def _samples_per_second(probe: dict[str, Any]) -> float:
    """Different samples that all ranks together are through with in a second, loading included."""
    return probe["samples_distinct"] / max(probe["loaded_seconds"])


def _absent(
    summary: Summary, run: str, reference: str, pairs: list[tuple[RunSeed, RunSeed]]
) -> Iterator[str]:
    """What the pair has no figures of."""
    for name in (run, reference):
        found = summary.of(name)
        if not found.complete_seeds:
            yield f"{name} has no result"
        elif found.invalid:
            yield f"{name} is invalid: {'; '.join(found.invalid)}"
        elif not any(one.scaling for one in summary.results.of(name)):
            yield f"{name}'s steps were not probed (scaling_probe_steps is 0)"
    if not pairs:
        yield "no seed in common"


def _unlike(summary: Summary, pairs: list[tuple[RunSeed, RunSeed]]) -> Iterator[str]:
    """Why the figures of the pair, or of its seeds, do not belong together."""
    shape = ("ranks", "batch_size", "samples_drawn", "samples_distinct")
    for one, other in pairs:
        yield from machine_differences(summary.results, one, other, other.run)
        if other.scaling["ranks"] != 1:
            yield f"{other.run} ran in {other.scaling['ranks']} processes, and a reference is to be one"
        if one.scaling["ranks"] == 1:
            yield f"{one.run} ran in one process"
        for side, first in zip((one, other), pairs[0], strict=True):
            if any(side.scaling[key] != first.scaling[key] for key in shape):
                yield f"{side.run}'s seeds differ in ranks or in the samples of a step"


def _notes(pairs: list[tuple[RunSeed, RunSeed]]) -> Iterator[str]:
    """Where the probe's steps were not as fast as those of the training."""
    for side in zip(*pairs, strict=True):
        trained = {one.seed: v for one in side if (v := METRICS["samples_per_second"].value(one)) is not None}
        ratio = statistics.paired_ratio({one.seed: _samples_per_second(one.scaling) for one in side}, trained)
        if ratio and abs(ratio.mean - 1) > AS_IN_TRAINING:
            yield f"the probe's steps of {side[0].run} did {ratio.mean:.2f} × the samples a second of its training's"


def _by_rank(seconds: list[list[float]]) -> tuple[float, ...]:
    """Each rank's mean over seeds."""
    return tuple(_mean(rank) for rank in zip(*seconds, strict=True))


def _mean(values: list[float] | tuple[float, ...]) -> float:
    return sum(values) / len(values)
