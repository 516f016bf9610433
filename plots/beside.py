"""Two sets of rows of one study beside each other, as tables. Must not compute a result."""

from __future__ import annotations

from metrics.beside import SIDES, Beside
from metrics.measures import METRICS, amount
from metrics.summary import RunSummary
from metrics.words import difference, number
from plots.outcome_tables import Captioned, ratio_text
from plots.tables import cell

COSTS = ("step_milliseconds", "peak_memory_gib")


def tables(found: Beside) -> list[Captioned]:
    """What the runs came to on both sides, against the baseline, and what they cost."""
    metric, name = found.second.metric, found.second.results.study.metric
    time, memory = COSTS
    heads = ["run", "seeds", *_twice(metric.label), "furthest of a seed", *_twice("verdict")]
    outcome = [
        [
            pair.run,
            str(len(pair.seeds)),
            *(_mean(run, name) for run in pair.sides),
            number(max(pair.distances.values()) * metric.factor if pair.distances else None, 2),
            *(run.status if run else "–" for run in pair.sides),
        ]
        for pair in found.pairs
    ]
    against = [
        [
            pair.run,
            *(difference(run and run.comparison and run.comparison.estimate, metric) for run in pair.sides),
            *(ratio_text(run and run.ratios[time]) for run in pair.sides),
        ]
        for pair in found.pairs
    ]
    cost = [[pair.run, *(_mean(run, what) for what in COSTS for run in pair.sides)] for pair in found.pairs]
    return [
        (metric.axis.capitalize(), (heads, outcome)),
        (
            f"Differences to {found.baseline} with their 95 % intervals, and ratios of the step time",
            (["run", *_twice("difference"), *_twice("ratio")], against),
        ),
        ("Cost", (["run", *_twice(METRICS[time].axis), *_twice(METRICS[memory].axis)], cost)),
    ]


def sentences(found: Beside) -> list[str]:
    """Whether verdicts and figures came again, and what was not the same."""
    same = len(found.both) - len(found.changed)
    said = [
        f"{amount(len(found.both), 'run')} on both sides, with the same seeds; {same} have the same verdict"
    ]
    said += [
        f"{pair.run}: {pair.first.status} in the first, {pair.second.status} in the second"
        for pair in found.changed
    ]
    said.append(_distances(found))
    said += [
        f"{', '.join(runs) if len(runs) < len(found.both) else 'all'}: {words}"
        for words, runs in found.settings.items()
    ]
    if found.unnamed:
        said.append(f"settings that only one side's rows name: {', '.join(found.unnamed)}")
    return said


def _distances(found: Beside) -> str:
    far, run, seed = found.furthest
    if far == 0:
        return "the two figures of each seed are the same"
    metric = found.second.metric
    middle, most = (
        f"{number(distance * metric.factor, 2)} {metric.difference_unit}".rstrip()
        for distance in (found.typical, far)
    )
    return f"the two figures of one seed are {middle} apart in the median, and at most {most} ({run}, seed {seed})"


def _twice(head: str) -> list[str]:
    return [f"{head}, {side}" for side in SIDES]


def _mean(run: RunSummary | None, name: str) -> str:
    return cell(run, name, interval=False) if run else "–"
