"""Two sets of rows of one study beside each other: does what came out on one machine, or engine, come out again?

Both sides are read with the seeds that both have, so that their verdicts have equally much to go by. A run that one
side alone has keeps its own seeds, without anything beside them. Must not read or write files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

from metrics.fairness import data_differences, evaluation_differences, order_differences
from metrics.measures import METRICS
from metrics.rows import Results, ResultsError, RunSeed
from metrics.summary import RunSummary, Summary, summarize

# Settings that say where a run is made, and nothing of what it is.
PLACES = ("device", "data_dir", "tokenizer_dir")
SIDES = ("first", "second")


@dataclass(frozen=True)
class Pair:
    """A run on both sides, or on one. `distances`: of the study's metric, |second - first| of each common seed."""

    run: str
    first: RunSummary | None
    second: RunSummary | None
    distances: dict[int, float]
    settings: tuple[str, ...]  # whose values differ between the two sides, in words
    unnamed: tuple[str, ...]  # settings that only one side's rows have

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that are shown."""
        return (self.second or self.first).complete_seeds

    @property
    def sides(self) -> tuple[RunSummary | None, RunSummary | None]:
        return self.first, self.second


@dataclass(frozen=True)
class Beside:
    """Both summaries, with the seeds that count, and each run's pair, in the second's order."""

    first: Summary
    second: Summary
    pairs: tuple[Pair, ...]

    @property
    def baseline(self) -> str:
        return self.second.results.study.baseline

    @property
    def both(self) -> tuple[Pair, ...]:
        """The runs that have finished on both sides."""
        return tuple(pair for pair in self.pairs if all(pair.sides))

    @property
    def settings(self) -> dict[str, list[str]]:
        """What differs, in words, with the runs of which it does."""
        found: dict[str, list[str]] = {}
        for pair in self.pairs:
            for words in pair.settings:
                found.setdefault(words, []).append(pair.run)
        return found

    @property
    def unnamed(self) -> tuple[str, ...]:
        """Settings that only one side's rows have: of an engine that knew more."""
        return tuple(dict.fromkeys(name for pair in self.pairs for name in pair.unnamed))

    @property
    def changed(self) -> tuple[Pair, ...]:
        """The runs on both sides whose verdicts differ."""
        return tuple(pair for pair in self.both if pair.first.status != pair.second.status)

    @property
    def furthest(self) -> tuple[float, str, int]:
        """The largest distance between one seed's two figures, with its run and seed."""
        return max((d, pair.run, seed) for pair in self.both for seed, d in pair.distances.items())

    @property
    def typical(self) -> float:
        """The median distance."""
        return median(d for pair in self.both for d in pair.distances.values())


def beside(first: Results, second: Results) -> Beside:
    """Raises ResultsError for rows of different studies, or without a run and seed that both have."""
    for what in ("name", "baseline", "metric", "axis"):
        a, b = getattr(first.study, what), getattr(second.study, what)
        if a != b:
            raise ResultsError(
                f"the rows are of different studies: {what} {a!r} in the first, {b!r} in the second"
            )
    a, b = (summarize(_common(*sides)) for sides in ((first, second), (second, first)))
    order = dict.fromkeys([*second.study.runs, *first.study.runs])
    pairs = tuple(pair for run in order if (pair := _pair(a, b, run)))
    if not any(pair.distances for pair in pairs):
        raise ResultsError("no run and seed with the study's metric is finished in both")
    return Beside(a, b, pairs)


def _done(results: Results) -> dict[tuple[str, int], RunSeed]:
    return {(one.run, one.seed): one for one in results.runs if one.state == "complete"}


def _common(results: Results, other: Results) -> Results:
    """`results` without the seeds of a run that `other` has not finished, if it has finished any of that run."""
    theirs = _done(other)
    has = {run for run, _ in theirs}
    return replace(
        results,
        runs=tuple(one for one in results.runs if one.run not in has or (one.run, one.seed) in theirs),
    )


def _pair(first: Summary, second: Summary, run: str) -> Pair | None:
    """None of a run that nobody has finished."""
    own = [_of(summary, run) for summary in (first, second)]
    if not any(own):
        return None
    value = METRICS[first.results.study.metric].value
    done = [
        {seed: one for (name, seed), one in _done(x.results).items() if name == run} for x in (first, second)
    ]
    measured = [{seed: v for seed, one in side.items() if (v := value(one)) is not None} for side in done]
    distances = {seed: abs(v - measured[0][seed]) for seed, v in measured[1].items() if seed in measured[0]}
    common = [(side, done[1][seed]) for seed, side in done[0].items() if seed in done[1]]
    settings = dict.fromkeys(words for sides in common for words in _differences(*sides))
    unnamed = dict.fromkeys(
        name for a, b in common for name in [*b.config, *a.config] if (name in a.config) != (name in b.config)
    )
    return Pair(run, *own, distances, tuple(settings), tuple(unnamed))


def _of(summary: Summary, run: str) -> RunSummary | None:
    return next((one for one in summary.complete if one.run == run), None)


def _differences(first: RunSeed, second: RunSeed) -> Iterator[str]:
    """Settings of one seed that are not the same on both sides, and data and scores that are not."""
    for name, value in first.config.items():
        if name in second.config and name not in PLACES and value != second.config[name]:
            yield f"{name} {value} in the first, {second.config[name]} in the second"
    for check in (data_differences, order_differences, evaluation_differences):
        yield from check(None, second, first, whose="the first")
