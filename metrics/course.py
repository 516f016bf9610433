"""How the runs of a study got where they are: perplexity on the way, at equal seconds, and the time to a fixed loss.

From the evaluations during training alone; a loss is looked at where it was evaluated, and only at equal seconds
between two evaluations. Seconds are of training, without compiling and evaluating. What a pruned run had before it
was at its target sparsity counts for nothing but its perplexity on the way. Must not read or write files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import polars as pl

from metrics import statistics
from metrics.counting import counts
from metrics.epochs import by_seed, seconds_so_far
from metrics.measures import AXES
from metrics.rows import Results
from metrics.statistics import Comparison, Estimate, Ratio
from metrics.summary import Summary

END = 0.1  # of the steps: the last of them, whose evaluations say how stable a run ends
FEWEST = 3  # evaluations that have a scatter
EQUAL = AXES["seconds"].tolerance  # relative: what is no further apart has taken equally long
NOT_SPARSE = "not at its target sparsity yet"
NOT_EVALUATED = "not evaluated by then"
NOT_FINITE = "not finite"


@dataclass(frozen=True)
class Course:
    """Validation perplexity of one run, means over seeds; None where it was not evaluated."""

    run: str
    at: dict[int, Estimate | None]  # after so many steps
    best: Estimate | None
    last: Estimate | None
    gain: Estimate | None  # best less first: negative, where training helped
    scatter: Estimate | None  # standard deviation of the evaluations in the last tenth of the steps
    degradation: Estimate | None  # last over best, less 1
    aside: str = ""  # why it stands beside the others: own budget, not comparable, invalid


@dataclass(frozen=True)
class AtEqualSeconds:
    """One run when the quickest has ended."""

    run: str
    seconds: Estimate | None  # of training, whole run
    limit: Estimate | None  # of training, when it is looked at
    loss: Estimate | None  # validation loss then
    comparison: Comparison | None  # with the baseline's; None of the baseline itself
    quickest: bool = False  # of a seed at least
    why: str = ""  # why it has no loss


@dataclass(frozen=True)
class ToTarget:
    """When one run's validation loss was first at or below a target."""

    run: str
    target: float
    reached: int  # seeds
    seeds: int
    tokens: Estimate | None = None
    seconds: Estimate | None = None
    tokens_ratio: Ratio | None = None  # to the baseline's, over seeds in which both reached it
    seconds_ratio: Ratio | None = None
    aside: str = ""  # why it stands beside the others: own budget


@dataclass(frozen=True)
class _Seed:
    """Evaluations of one run and seed, by step."""

    steps: list[int]  # steps done
    losses: list[float]
    tokens: list[int]
    seconds: list[float]  # of training until then
    counts: list[bool]  # whether it may be the run's best
    length: int  # steps in all
    ended: float  # seconds of training in all

    @property
    def counted(self) -> list[float]:
        """The losses that may be the run's best."""
        return [loss for loss, good in zip(self.losses, self.counts, strict=True) if good]


def _seeds(results: Results, run: str) -> dict[int, _Seed]:
    """seed → its evaluations."""
    evals, steps = (by_seed(frame.filter(pl.col("run") == run)) for frame in (results.evals, results.steps))
    found = {}
    for one in results.of(run):
        if one.state == "complete" and (run, one.seed) in evals:
            rows, own = evals[run, one.seed], steps[run, one.seed]
            at, seconds = rows["step"].to_list(), seconds_so_far(own, one.starts)
            found[one.seed] = _Seed(
                [step + 1 for step in at],
                rows["val_loss"].to_list(),
                rows["tokens_seen"].to_list(),
                [seconds[done - 1] for done in own["step"].search_sorted(rows["step"], side="right")],
                counts(one, at),
                own["step"].max() + 1,
                seconds[-1],
            )
    return found


def _mean(values: list[float | None]) -> Estimate | None:
    """Over seeds; None unless all have it."""
    known = [value for value in values if value is not None]
    return statistics.mean_interval(known) if known and len(known) == len(values) else None


def perplexity(loss: float) -> float:
    """Not capped; infinite where a number cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf  # noqa: PLR2004


def courses(summary: Summary) -> list[Course]:
    """A row a run that has evaluations, in the study's order; none of classifiers, which have no perplexity."""
    if summary.labelled:
        return []
    rows = []
    for run in summary.complete:
        seeds = list(_seeds(summary.results, run.run).values())
        values = [[perplexity(loss) for loss in one.losses] for one in seeds]
        best = [min(map(perplexity, one.counted), default=None) for one in seeds]
        at = {
            step: _mean([_at(one.steps, own, step) for one, own in zip(seeds, values, strict=True)])
            for step in summary.results.study.perplexity_at
        }
        rows.append(
            Course(
                run.run,
                at,
                _mean(best),
                _mean([own[-1] for own in values]),
                _mean([least and least - own[0] for least, own in zip(best, values, strict=True)]),
                _mean([_scatter(one) for one in seeds]),
                _mean([_degradation(least, own[-1]) for least, own in zip(best, values, strict=True)]),
                "" if run in summary.comparable else run.status,
            )
        )
    return rows


def _at(steps: list[int], values: list[float], step: int) -> float | None:
    return values[steps.index(step)] if step in steps else None


def _degradation(best: float | None, last: float) -> float | None:
    return last / best - 1 if best is not None and math.isfinite(last) else None


def _scatter(one: _Seed) -> float | None:
    """Standard deviation of the perplexities at the end that count, as a sample's.

    Of the end alone: before it a loss goes down, which is no scatter.
    """
    rows = zip(one.steps, one.losses, one.counts, strict=True)
    last = [perplexity(loss) for step, loss, good in rows if good and step > (1 - END) * one.length]
    if len(last) < FEWEST or not all(map(math.isfinite, last)):
        return None
    mean = sum(last) / len(last)
    return math.sqrt(sum((value - mean) ** 2 for value in last) / (len(last) - 1))


def at_equal_seconds(summary: Summary) -> list[AtEqualSeconds]:
    """Every run whose costs compare, when the quickest of them has ended, seed by seed; in the study's order."""
    runs = [run.run for run in summary.comparable if not run.costs_not_comparable]
    seeds = {run: _seeds(summary.results, run) for run in runs}
    shared = set.intersection(*(set(own) for own in seeds.values())) if seeds else set()
    limits = {seed: min(own[seed].ended for own in seeds.values()) for seed in sorted(shared)}
    found = {
        run: {seed: _then(own[seed], limit) for seed, limit in limits.items()} for run, own in seeds.items()
    }
    losses = {
        run: {seed: loss for seed, (loss, _) in own.items() if loss is not None} for run, own in found.items()
    }
    baseline = summary.results.study.baseline
    if not limits or not losses.get(baseline):
        return []
    comparisons = statistics.compare(losses, baseline, "lower")
    return [
        AtEqualSeconds(
            run,
            _mean([own[seed].ended for seed in limits]),
            _mean(list(limits.values())),
            _mean([losses[run].get(seed) for seed in limits]),
            comparisons.get(run),
            any(own[seed].ended == limit for seed, limit in limits.items()),
            "; ".join(dict.fromkeys(why for _, why in found[run].values() if why)),
        )
        for run, own in seeds.items()
    ]


def _then(one: _Seed, limit: float) -> tuple[float | None, str]:
    """The loss after so many seconds, on the line between the evaluations around them; or why there is none.

    That of its last evaluation, where the run had ended by then, or took equally long. Linear: taking the evaluation
    before would cost a run that is a thousandth slower all that it learned since.
    """
    after = next((i for i, seconds in enumerate(one.seconds) if seconds > limit), len(one.seconds))
    if one.ended <= limit * (1 + EQUAL) or after == len(one.seconds):
        around = [len(one.seconds) - 1]
    elif after == 0:
        return None, NOT_EVALUATED
    else:
        around = [after - 1, after]
    if not all(one.counts[i] for i in around):
        return None, NOT_SPARSE
    losses, seconds = [one.losses[i] for i in around], [one.seconds[i] for i in around]
    if not all(map(math.isfinite, losses)):
        return None, NOT_FINITE
    share = (limit - seconds[0]) / (seconds[-1] - seconds[0]) if len(around) > 1 else 0.0
    return losses[0] + share * (losses[-1] - losses[0]), ""


def to_targets(summary: Summary) -> list[ToTarget]:
    """For each of the study's targets a row a run that is comparable, or but for a budget of its own.

    How soon a run has a loss is no matter of what it was given in all. Ratios of seconds where costs compare.
    """
    rows, baseline = [], summary.results.study.baseline
    timed = [run for run in summary.runs if run in summary.comparable or run.status == "own budget"]
    seeds = {run.run: _seeds(summary.results, run.run) for run in timed}
    costed = {run.run for run in timed if not run.costs_not_comparable}
    own_budget = {run.run for run in timed if run.status == "own budget"}
    for target in summary.results.study.targets:
        found = {run: _first(own, target) for run, own in seeds.items()}
        base = found.get(baseline, {})
        for run, own in found.items():
            tokens, seconds = ({seed: one[i] for seed, one in own.items()} for i in range(2))
            its_tokens, its_seconds = ({seed: one[i] for seed, one in base.items()} for i in range(2))
            is_base = run == baseline
            rows.append(
                ToTarget(
                    run,
                    target,
                    len(own),
                    len(seeds[run]),
                    _mean(list(tokens.values())) if own else None,
                    _mean(list(seconds.values())) if own else None,
                    None if is_base else statistics.paired_ratio(tokens, its_tokens),
                    None if is_base or run not in costed else statistics.paired_ratio(seconds, its_seconds),
                    "own budget" * (run in own_budget),
                )
            )
    return rows


def seconds_to(summary: Summary, run: str, target: float) -> dict[int, float]:
    """seed → seconds of training at the first evaluation at or below `target`, of the seeds that got there."""
    return {seed: seconds for seed, (_, seconds) in _first(_seeds(summary.results, run), target).items()}


def steady_seconds_of(summary: Summary, run: str) -> dict[int, float]:
    """seed → seconds of its whole training, compiling not counted: which run compiled first is no cost of it."""
    return {seed: one.ended for seed, one in _seeds(summary.results, run).items()}


def _first(seeds: dict[int, _Seed], target: float) -> dict[int, tuple[float, float]]:
    """seed → tokens and seconds at the first evaluation at or below `target`, of the seeds that got there."""
    found = {}
    for seed, one in seeds.items():
        rows = zip(one.losses, one.tokens, one.seconds, one.counts, strict=True)
        for loss, tokens, seconds, good in rows:
            if good and loss <= target:
                found[seed] = float(tokens), seconds
                break
    return found
