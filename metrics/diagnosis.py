"""What is said of a scaling: the cause of lost time, its measured share of a step, and what to change.

Words only; the figures are of `metrics.scaling`.
"""

from __future__ import annotations

from metrics.scaling import (
    COMMUNICATION,
    IMBALANCE,
    LITTLE_WORK,
    SHARED,
    TOGETHER,
    WAIT,
    Scaling,
)
from metrics.words import number, paired_seeds, times

GOOD = 0.85  # efficiency from which on a run scales well
MOST = 0.5  # of what is lost


def diagnosis(one: Scaling) -> str:
    """A sentence: how a run scales, and if not well, what the largest part of its lost time is and what to change."""
    if one.reason:
        return f"The scaling of {one.run} against {one.reference} was not measured: {one.reason}."
    assert one.speedup and one.efficiency and one.lost
    slower = one.speedup.mean < 1
    well = scales_well(one)
    does = "is slower than one process" if slower else "scales well" if well else "does not scale well"
    parts = [
        f"{one.run} {does}: in {one.processes} processes it is through with {times(one.speedup)} the samples a "
        f"second of {one.reference} in one (efficiency {percent(one.efficiency.mean)}, {one.kind} scaling)"
    ]
    if well:
        parts.append(f"of each step {percent(one.lost.mean)} is lost")
    else:
        name, share = largest(one)
        much = "most of it, " if share > MOST * one.lost.mean else "the largest part "
        what = f"of each step {percent(one.lost.mean)} is lost, {much}{percent(share)} of the step, because "
        parts += [what + _cause(one, name), _advice(one, name)]
    if one.distinct < one.drawn and (well or largest(one)[0] != SHARED):
        parts.append(f"and ranks read the same samples: {_shared(one)}")
    if one.untold:
        apart = f"{COMMUNICATION}, {IMBALANCE} and {LITTLE_WORK} could not be told apart"
        parts.append(f"{apart}: no step was timed without exchange ({one.untold})")
    return "; ".join([*parts, *one.notes, paired_seeds(one.speedup.count)]) + "."


def scales_well(one: Scaling) -> bool:
    """Whether hardly anything is lost."""
    return one.efficiency is not None and one.efficiency.mean >= GOOD


def largest(one: Scaling) -> tuple[str, float]:
    """The part that most of the lost time is, and its share of a step."""
    return max(((name, share.mean) for name, share in one.parts.items()), key=lambda part: part[1])


def percent(share: float) -> str:
    """`31 %`; never `-0 %`."""
    return f"{round(100 * share)} %".replace("-", "−")


def _shared(one: Scaling) -> str:
    return f"{one.distinct:,} different ones of the {one.drawn:,} that a step draws"


def _cause(one: Scaling, name: str) -> str:
    """What the part is, with its measures."""
    own, its = (f"{number(1000 * seconds, 3)} ms" for seconds in one.work)
    return {
        SHARED: f"the samples are not divided among the ranks, which read {_shared(one)}",
        WAIT: "the ranks wait for the loader",
        COMMUNICATION: "the ranks exchange gradients while nothing is computed",
        IMBALANCE: _imbalance(one),
        LITTLE_WORK: f"each rank has too little work: its samples of a step take it {own}, where {one.reference} has "
        f"as many done in {its}",
        TOGETHER: f"of {COMMUNICATION}, {IMBALANCE} or {LITTLE_WORK}",
    }[name]


def _imbalance(one: Scaling) -> str:
    if not one.rank_seconds:
        return ""
    slowest, fastest = max(one.rank_seconds), min(one.rank_seconds)
    rank = one.rank_seconds.index(slowest)
    longer = f"{slowest / fastest:.2f} × as long as the fastest"
    return f"the others wait for rank {rank}, which computes {longer}"


def _advice(one: Scaling, name: str) -> str:
    """What to change."""
    return {
        SHARED: "let each rank read its own part of a step (shard_samples = true)",
        WAIT: "prepare more batches ahead (prefetch), or give the loader more of the CPU",
        COMMUNICATION: "use a larger batch per rank, or devices with a faster link between them",
        IMBALANCE: "see what else runs on that rank's device and cores, and give every rank the same",
        LITTLE_WORK: "use a larger batch per rank, or a larger model, or fewer processes",
        TOGETHER: "use a larger batch per rank, and see whether one rank's device is slower",
    }[name]
