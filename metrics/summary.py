"""One row a run: means and intervals over seeds, the verdict, cost ratios, what did not go as requested.

Numbers only: `metrics.words` says them, `metrics.frames` lays them out. Must not read or write files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metrics import statistics
from metrics.rows import Results, ResultsError, RunSeed
from metrics.statistics import Comparison, Estimate, Ratio


@dataclass(frozen=True)
class Metric:
    """How one number of a finished run is called, and where it is."""

    label: str
    unit: str
    value: Callable[[RunSeed], float | None]
    cost: bool = False  # shown as a ratio to the baseline

    @property
    def axis(self) -> str:
        """The label with its unit, for an axis or a column head."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


def _metric(key: str, factor: float = 1.0) -> Callable[[RunSeed], float | None]:
    return lambda one: None if one.metrics.get(key) is None else factor * one.metrics[key]


def _test(key: str) -> Callable[[RunSeed], float | None]:
    return lambda one: None if one.test.get(key) is None else float(one.test[key])


METRICS = {
    "test_loss": Metric("test loss", "nats/token", _test("test_loss")),
    "test_perplexity": Metric("test perplexity", "", _test("test_perplexity")),
    "test_bits_per_byte": Metric("test bits per byte", "bits/byte", _test("test_bits_per_byte")),
    "val_loss": Metric("validation loss", "nats/token", _metric("val_loss")),
    "best_val_loss": Metric("best validation loss", "nats/token", _metric("best_val_loss")),
    "train_loss": Metric("training loss", "nats/token", _metric("train_loss")),
    "tokens_per_second": Metric("speed", "tokens/s", _metric("tokens_per_second"), cost=True),
    "step_milliseconds": Metric("step time", "ms", _metric("step_seconds_median", 1000), cost=True),
    "peak_memory_gib": Metric("peak memory", "GiB", _metric("peak_memory_gib"), cost=True),
    "activation_mib": Metric("activations kept", "MiB", _metric("activation_mib"), cost=True),
}
COSTS = tuple(name for name, metric in METRICS.items() if metric.cost)


@dataclass(frozen=True)
class RunSummary:
    """One run over its seeds. `estimates` and `ratios` hold None for what was not measured."""

    run: str
    complete_seeds: tuple[int, ...]
    state: str  # complete when any seed is, else missing, failed or incomplete
    estimates: dict[str, Estimate | None]
    ratios: dict[str, Ratio | None]
    comparison: Comparison | None  # None for the baseline itself
    ledger: tuple[str, ...]  # what was requested and did not take effect
    notes: tuple[str, ...]  # seeds without a result, unequal token counts

    @property
    def status(self) -> str:
        """A word or two for the verdict column."""
        if not self.complete_seeds:
            return self.state
        if self.comparison is None:
            return "baseline"
        return self.comparison.verdict or "no verdict"


@dataclass(frozen=True)
class Summary:
    """All runs of a study, in the study's order."""

    results: Results
    metric: Metric
    runs: tuple[RunSummary, ...]

    @property
    def complete(self) -> tuple[RunSummary, ...]:
        """The runs with at least one finished seed."""
        return tuple(run for run in self.runs if run.complete_seeds)


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
    comparisons = statistics.compare(values[study.metric], study.baseline, study.better)
    runs = []
    for run in study.runs:
        done = tuple(one for one in results.of(run) if one.state == "complete")
        base = study.baseline
        one = RunSummary(
            run=run,
            complete_seeds=tuple(one.seed for one in done),
            state=_state(results, run),
            estimates={name: _estimate(values[name][run]) for name in METRICS},
            ratios={name: statistics.paired_ratio(values[name][run], values[name][base]) for name in COSTS},
            comparison=comparisons.get(run),
            ledger=ledger_differences(done),
            notes=_notes(results, run, study.metric),
        )
        runs.append(one)
    return Summary(results, METRICS[study.metric], tuple(runs))


def _state(results: Results, run: str) -> str:
    """The run's state in a word; seeds that failed in different ways make it incomplete."""
    states = {one.state for one in results.of(run)}
    if "complete" in states:
        return "complete"
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
    return tuple(w if len(s) == everywhere else f"{w} ({_seeds(s)})" for w, s in found.items())


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _notes(results: Results, run: str, metric: str) -> tuple[str, ...]:
    """Seeds without a result and why; complete seeds without the study's metric; unequal training budgets."""
    found: dict[str, list[int]] = {}
    baseline = {one.seed: one for one in results.of(results.study.baseline)}
    for one in results.of(run):
        if one.state != "complete":
            found.setdefault(f"{one.state}: {one.reason}", []).append(one.seed)
            continue
        if METRICS[metric].value(one) is None:
            found.setdefault(f"has no {metric}", []).append(one.seed)
        other = baseline.get(one.seed)
        if other and other.state == "complete" and other.metrics["tokens"] != one.metrics["tokens"]:
            tokens, others = one.metrics["tokens"], other.metrics["tokens"]
            words = f"trained on {tokens:,} tokens, the baseline on {others:,}"
            found.setdefault(words, []).append(one.seed)
    return tuple(f"{_seeds(seeds)}: {words}" for words, seeds in found.items())
