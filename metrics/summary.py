"""One row a run: means and intervals over seeds, the verdict, cost ratios, what did not go as requested.

Numbers only: `metrics.words` says them, `metrics.frames` lays them out. Must not read or write files.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from metrics import fairness, statistics
from metrics.fairness import Judgement, seeds_words
from metrics.measures import AXES, COSTS, METRICS, Metric, measure
from metrics.rows import Results, ResultsError, RunSeed
from metrics.statistics import Comparison, Estimate, Proportion, Ratio


@dataclass(frozen=True)
class RunSummary:
    """One run over its seeds. `estimates` and `ratios` hold None for what was not measured.

    A run that is invalid, not comparable or of a budget of its own has its numbers in `estimates`, and neither
    comparison nor ratios.
    """

    run: str
    complete_seeds: tuple[int, ...]
    state: str  # complete when any seed is, else diverged, missing, failed or incomplete
    estimates: dict[str, Estimate | None]
    ratios: dict[str, Ratio | None]
    comparison: Comparison | None  # None for the baseline itself
    ledger: tuple[str, ...]  # what was requested and did not take effect
    notes: tuple[str, ...]  # seeds without a result, what was not paired
    not_comparable: tuple[str, ...] = ()  # why no figure of it is compared with the baseline
    costs_not_comparable: tuple[str, ...] = ()  # why its costs are not, such as other hardware
    invalid: tuple[str, ...] = ()  # what cannot be true of its rows
    own_budget: tuple[str, ...] = ()  # how much of the axis it had, where the study gives it another amount
    counts: dict[str, int] = field(default_factory=dict)  # in words, over its seeds; only what happened
    proportions: dict[str, Proportion] = field(default_factory=dict)  # binomial intervals of accuracies

    @property
    def status(self) -> str:
        """A word or two for the verdict column."""
        if not self.complete_seeds:
            return self.state
        if self.invalid:
            return "invalid"
        if self.not_comparable:
            return "not comparable"
        if self.own_budget:
            return "own budget"
        if self.comparison is None:
            return "baseline"
        return self.comparison.verdict or "no verdict"


@dataclass(frozen=True)
class Summary:
    """All runs of a study, in the study's order."""

    results: Results
    metric: Metric
    runs: tuple[RunSummary, ...]
    axis: str  # what the runs have equally much of, in words: "equal tokens"

    @property
    def labelled(self) -> bool:
        """Whether its runs are classifiers."""
        return self.results.labelled

    def measure(self, name: str) -> Metric:
        """A metric as this study measures it."""
        return measure(name, self.labelled)

    def of(self, run: str) -> RunSummary:
        """The summary of one run."""
        return next(one for one in self.runs if one.run == run)

    @property
    def complete(self) -> tuple[RunSummary, ...]:
        """The runs with at least one finished seed."""
        return tuple(run for run in self.runs if run.complete_seeds)

    @property
    def comparable(self) -> tuple[RunSummary, ...]:
        """The complete runs whose figures may stand beside the baseline's."""
        return tuple(
            run for run in self.complete if not (run.invalid or run.not_comparable or run.own_budget)
        )


def summarize(results: Results) -> Summary:
    """Means, intervals, verdicts and ratios of every run of the study.

    Raises:
        ResultsError: the study asks for a metric that does not exist.
    """
    study = results.study
    if study.metric not in METRICS:
        raise ResultsError(
            f"study {study.name!r}: unknown metric {study.metric!r}; one of {', '.join(METRICS)}"
        )
    values = {name: seed_values(results, name) for name in METRICS}
    judged = fairness.judge(results)
    compared = {
        run: own
        for run, own in values[study.metric].items()
        if run == study.baseline
        or not (judged[run].invalid or judged[run].not_comparable or judged[run].own_budget)
    }
    comparisons = statistics.compare(compared, study.baseline, METRICS[study.metric].better, study.margin)
    runs = tuple(_run_summary(results, run, values, comparisons.get(run), judged[run]) for run in study.runs)
    return Summary(results, measure(study.metric, results.labelled), runs, AXES[study.axis].words)


def _run_summary(
    results: Results,
    run: str,
    values: dict[str, dict[str, dict[int, float]]],
    comparison: Comparison | None,
    judged: Judgement,
) -> RunSummary:
    study = results.study
    done = tuple(one for one in results.of(run) if one.state == "complete")
    has_ratios = not (
        judged.invalid or judged.not_comparable or judged.costs_not_comparable or judged.own_budget
    )
    return RunSummary(
        run=run,
        complete_seeds=tuple(one.seed for one in done),
        state=_state(results, run),
        estimates={name: _estimate(values[name][run]) for name in METRICS},
        ratios={
            name: statistics.paired_ratio(values[name][run], values[name][study.baseline])
            if has_ratios
            else None
            for name in COSTS
        },
        comparison=comparison,
        ledger=ledger_differences(done),
        notes=(*_notes(results, run, study.metric), *judged.notes),
        not_comparable=judged.not_comparable,
        costs_not_comparable=judged.costs_not_comparable,
        invalid=judged.invalid,
        own_budget=judged.own_budget,
        counts=fairness.counts(done),
        proportions=_proportions(done),
    )


def _proportions(seeds: tuple[RunSeed, ...]) -> dict[str, Proportion]:
    """Binomial intervals of the metrics that are shares: mean over seeds, count of one seed's.

    The seeds score the same examples, so all of them together are no larger sample of examples than one.
    """
    found = {}
    for name, metric in METRICS.items():
        if metric.count is None:
            continue
        shares = [value for one in seeds if (value := metric.value(one)) is not None]
        counts = [int(count) for one in seeds if (count := metric.count(one)) is not None]
        if shares and counts:
            found[name] = statistics.proportion(sum(shares) / len(shares), min(counts))
    return found


def _state(results: Results, run: str) -> str:
    """The run's state in a word; seeds that stopped in different ways make it diverged if one did, or incomplete."""
    states = {one.state for one in results.of(run)}
    if "complete" in states:
        return "complete"
    if "diverged" in states:
        return "diverged"
    return states.pop() if len(states) == 1 else "incomplete"


def seed_values(results: Results, name: str) -> dict[str, dict[int, float]]:
    """run -> seed -> value of one metric, of the complete run-seeds that have it."""
    values: dict[str, dict[int, float]] = {run: {} for run in results.study.runs}
    for one in results.runs:
        value = METRICS[name].value(one) if one.state == "complete" else None
        if value is not None:
            values[one.run][one.seed] = value
    return values


def _estimate(values: dict[int, float]) -> Estimate | None:
    return statistics.mean_interval(list(values.values())) if values else None


def ledger_differences(seeds: tuple[RunSeed, ...]) -> tuple[str, ...]:
    """Ledger entries that do not agree, in words, each once; the seeds are named where only some have it."""
    found: dict[str, list[int]] = {}
    for one in seeds:
        for entry in one.ledger:
            if not entry["agrees"]:
                words = f"{entry['what']}: requested {entry['requested']}, in effect {entry['in_effect']}"
                found.setdefault(words, []).append(one.seed)
    everywhere = len(seeds)
    return tuple(w if len(s) == everywhere else f"{w} ({seeds_words(s)})" for w, s in found.items())


def _notes(results: Results, run: str, metric: str) -> tuple[str, ...]:
    """Seeds without a result and why; complete seeds without the study's metric."""
    found: dict[str, list[int]] = {}
    for one in results.of(run):
        if one.state != "complete":
            found.setdefault(f"{one.state}: {one.reason}", []).append(one.seed)
        elif METRICS[metric].value(one) is None:
            found.setdefault(f"has no {metric}", []).append(one.seed)
    return tuple(f"{seeds_words(seeds)}: {words}" for words, seeds in found.items())
