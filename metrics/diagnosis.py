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
from metrics.statistics import Ratio
from metrics.words import number, paired_seeds, times

GOOD = 0.85  # efficiency from which on a run scales well
MOST = 0.5  # of what is lost


def diagnosis(one: Scaling) -> str:
    """A sentence: how a run scales, and if not well, what the largest part of its lost time is and what to change.

    Only what holds in every seed and over the whole interval is said to be so.
    """
    if one.reason:
        return f"The scaling of {one.run} against {one.reference} was not measured: {one.reason}."
    assert one.speedup and one.efficiency and one.lost
    well = scales_well(one)
    parts = [
        f"{one.run} {_how(one.speedup, well)}: in {one.processes} processes it is through with {times(one.speedup)} "
        f"the samples a second of {one.reference} in one (efficiency {percent(one.efficiency.mean)}, {one.kind} "
        "scaling)"
    ]
    lost = f"of each step {percent(one.lost.mean)} is lost"
    cause = None if well else the_cause(one)
    if cause:
        share = one.parts[cause].mean
        much = "most of it, " if MOST * one.lost.mean < share <= one.lost.mean else "the largest part "
        parts += [
            f"{lost}, {much}{percent(share)} of the step, because {_cause(one, cause)}",
            _advice(one, cause),
        ]
    elif well or not any(one.causes):
        parts.append(lost)
    else:
        each = ", ".join(dict.fromkeys(filter(None, one.causes)))
        parts.append(f"{lost}, and these seeds do not tell to what: its largest part is {each}, seed by seed")
    if one.distinct < one.drawn and cause != SHARED:
        parts.append(f"and ranks read the same samples: {_shared(one)}")
    if one.untold:
        apart = f"{COMMUNICATION}, {IMBALANCE} and {LITTLE_WORK} could not be told apart"
        parts.append(f"{apart}: no step was timed without exchange ({one.untold})")
    return "; ".join([*parts, *one.notes, paired_seeds(one.speedup.count)]) + "."


def _how(speedup: Ratio, well: bool | None) -> str:
    """What the interval allows to be said."""
    high = speedup.mean if speedup.high is None else speedup.high
    if high < 1:
        return "is slower than one process"
    if well is None:
        return f"has an efficiency that these seeds do not place above or below {percent(GOOD)}"
    if well:
        return "scales well"
    return (
        "is no faster than one process, as far as these seeds tell"
        if speedup.mean < 1
        else "does not scale well"
    )


def scales_well(one: Scaling) -> bool | None:
    """Whether hardly anything is lost; None where the interval of the efficiency says neither."""
    if one.efficiency is None:
        return None
    low, high = (
        one.efficiency.mean if end is None else end for end in (one.efficiency.low, one.efficiency.high)
    )
    return True if low >= GOOD else False if high < GOOD else None


def the_cause(one: Scaling) -> str | None:
    """The part that most is lost to, if it is the same one in every seed."""
    causes = set(one.causes)
    return causes.pop() if len(causes) == 1 and "" not in causes else None


def percent(share: float) -> str:
    """`31 %`; `-2 %`."""
    return f"{round(100 * share)} %"


def _shared(one: Scaling) -> str:
    return f"{one.distinct:,} different ones of the {one.drawn:,} that a step draws"


def _cause(one: Scaling, name: str) -> str:
    """What the part is, with its measures."""
    own, its = (f"{number(1000 * seconds, 3)} ms" for seconds in one.work)
    return {
        SHARED: f"the samples are not divided among the ranks, which read {_shared(one)}",
        WAIT: "it takes longer with batches from the loader than with one at hand (while they trained, ranks waited "
        f"{number(1000 * one.waited, 2)} ms a step for it)",
        COMMUNICATION: "the ranks exchange gradients while nothing is computed",
        IMBALANCE: _imbalance(one),
        LITTLE_WORK: f"each rank has too little work: its samples of a step take it {own}, where {one.reference} has "
        f"as many done in {its}",
        TOGETHER: f"of {COMMUNICATION}, {IMBALANCE} or {LITTLE_WORK}",
    }[name]


def _imbalance(one: Scaling) -> str:
    if not one.slowest:
        return ""
    ranks = {rank for rank, _ in one.slowest}
    longer = sum(ratio for _, ratio in one.slowest) / len(one.slowest)
    whom = f"rank {ranks.pop()}" if len(ranks) == 1 else "one rank, not always the same"
    return f"the others wait for {whom}, which computes {longer:.2f} × as long as the fastest"


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
