"""One row a run: means and intervals over seeds, the verdict, cost ratios, what did not go as requested.

Every sentence that a table or report says about a result is made here, from the rows. Must not read or
write files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import polars as pl

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
# The columns of `dvc metrics show` besides the study's own metric, and their decimals: few and short enough
# to be read side by side. Step time says the same as tokens/s, and validation loss and bits per byte nearly
# the same as test loss; the report has them all.
DVC_DECIMALS = {
    "test_loss": 4,
    "test_perplexity": 3,
    "tokens_per_second": 0,
    "peak_memory_gib": 3,
    "activation_mib": 2,
}
SMALL = 1e-6  # below it a table writes an exponent
WORTH_SAYING = 0.01  # a change in cost below this is in the tables, not in a sentence


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


# -- sentences ---------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table: `digits` significant digits, whole when large, a dash when not measured."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    if value and abs(value) < SMALL:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(decimals, 0)}f}"


def with_interval(estimate: Estimate | None, signed: bool = False) -> str:
    """`mean ± half-width`, both with as many decimals as two digits of the half-width need."""
    if estimate is None:
        return "–"
    sign = "+" if signed and estimate.mean > 0 else ""
    if estimate.half_width is None:
        return sign + number(estimate.mean)
    if estimate.half_width < SMALL:  # exactly 0, or rounding noise of the sums
        return f"{sign}{number(estimate.mean)} ± {number(estimate.half_width, 1)}"
    decimals = max(1 - math.floor(math.log10(estimate.half_width)), 0)
    return f"{sign}{estimate.mean:,.{decimals}f} ± {estimate.half_width:,.{decimals}f}"


def p_value(p: float | None) -> str:
    """`0.0123`, `< 0.0001`, `1`, or a dash."""
    if p is None:
        return "–"
    if p == 1:
        return "1"
    return f"{p:.4f}" if p >= 1e-4 else "< 0.0001"  # noqa: PLR2004


def verdict_sentence(summary: Summary, run: RunSummary) -> str:
    """What can be said about one run against the baseline on the study's metric, in a sentence."""
    study, comparison = summary.results.study, run.comparison
    label = summary.metric.label
    if not run.complete_seeds:
        return f"{run.run} has no result ({'; '.join(run.notes)})."
    if comparison is None:
        return f"{run.run} is the baseline."
    if comparison.verdict is None:
        return f"{run.run} against {study.baseline} on {label}: {comparison.reason}."
    pairs = f"{len(comparison.seeds)} paired seeds"
    if comparison.verdict == "identical":
        return f"{run.run} and {study.baseline} have exactly the same {label} in all {pairs}."
    difference = f"{with_interval(comparison.estimate, signed=True)} {summary.metric.unit}".strip()
    evidence = f"{difference}, {pairs}, p {_equals(p_value(comparison.p_holm))}"
    if comparison.verdict == "inconclusive":
        smallest = f"{number(comparison.smallest_detectable, 2)} {summary.metric.unit}".strip()
        return (
            f"{run.run} against {study.baseline} on {label} is inconclusive ({evidence}): "
            f"these seeds could have shown a difference of {smallest}."
        )
    return f"{run.run} is {comparison.verdict} than {study.baseline} on {label} ({evidence})."


def _equals(p: str) -> str:
    return p if p.startswith("<") else f"= {p}"


def cost_sentence(summary: Summary, run: RunSummary) -> str:
    """Memory and step time against the baseline, where the interval of the ratio excludes 1 and it matters."""
    parts = []
    for name in ("step_milliseconds", "peak_memory_gib", "activation_mib"):
        ratio = run.ratios[name]
        if run.comparison is None or ratio is None or ratio.low is None or ratio.high is None:
            continue
        if (ratio.low > 1 or ratio.high < 1) and abs(ratio.mean - 1) >= WORTH_SAYING:
            change = f"{abs(ratio.mean - 1):.0%} {'more' if ratio.mean > 1 else 'less'}"
            parts.append(f"{METRICS[name].label} {change}")
    return f"{run.run} costs, against {summary.results.study.baseline}: {', '.join(parts)}." if parts else ""


def footnotes(summary: Summary) -> list[str]:
    """Ledger differences, seeds without a result, the smallest difference these seeds could have shown."""
    notes = [f"{run.run}: not as requested: {words}" for run in summary.runs for words in run.ledger]
    notes += [f"{run.run}: {words}" for run in summary.runs for words in run.notes]
    judged = [(run.run, run.comparison) for run in summary.complete if run.comparison]
    notes += [f"{run}: no verdict: {comparison.reason}" for run, comparison in judged if comparison.reason]
    for run, comparison in judged:
        if comparison.smallest_detectable:  # 0 when every difference is the same
            smallest = f"{number(comparison.smallest_detectable, 2)} {summary.metric.unit}".strip()
            seeds = len(comparison.seeds)
            notes.append(f"{run}: {seeds} seeds could have shown (80 % power) a difference of {smallest}")
    return notes


# -- frames ------------------------------------------------------------------------------------------------


def dvc_metrics(run: RunSummary, metric: str) -> dict[str, Any]:
    """The flat dictionary of one run for DVC: means over seeds, the verdict, and whether all took effect.

    `metric` is the study's, which is among them whatever it is.
    """
    row: dict[str, Any] = {}
    for name, decimals in ({metric: 4} | DVC_DECIMALS).items():
        estimate = run.estimates[name]
        if estimate is not None:  # JSON has no infinity: words
            finite = math.isfinite(estimate.mean)
            row[name] = round(estimate.mean, decimals or None) if finite else "not finite"
    in_effect = "; ".join(run.ledger) or "as requested"
    return {
        **row,
        "seeds": len(run.complete_seeds),
        "verdict": run.status,
        "in_effect": in_effect if run.complete_seeds else "-",
    }


def table_frame(summary: Summary) -> pl.DataFrame:
    """One row a run, unrounded: mean, half-width and (for costs) ratio of every metric; the comparison."""
    rows = []
    for run in summary.runs:
        row: dict[str, Any] = {"run": run.run, "seeds": len(run.complete_seeds), "verdict": run.status}
        comparison = run.comparison
        estimate = comparison.estimate if comparison else None
        row |= {
            "difference": estimate and estimate.mean,
            "difference_half_width": estimate and estimate.half_width,
            "p": comparison and comparison.p,
            "p_holm": comparison and comparison.p_holm,
            "smallest_detectable": comparison and comparison.smallest_detectable,
        }
        for name in METRICS:
            one, ratio = run.estimates[name], run.ratios.get(name)
            row |= {name: one and one.mean, f"{name}_half_width": one and one.half_width}
            if name in COSTS:
                row |= {
                    f"{name}_ratio": ratio and ratio.mean,
                    f"{name}_ratio_low": ratio and ratio.low,
                    f"{name}_ratio_high": ratio and ratio.high,
                }
        rows.append(row | {"not_as_requested": "; ".join(run.ledger), "notes": "; ".join(run.notes)})
    words = {"run", "verdict", "not_as_requested", "notes"}
    types = {name: pl.String if name in words else pl.Float64 for name in rows[0]} | {"seeds": pl.Int64}
    return pl.DataFrame(rows, schema=types)


def bars(summary: Summary, names: tuple[str, ...]) -> pl.DataFrame:
    """Columns run, metric (label and unit), value, low, high (95 % interval; null for one seed)."""
    rows = []
    for name in names:
        for run in summary.complete:
            estimate = run.estimates[name]
            if estimate is not None and math.isfinite(estimate.mean):
                half = estimate.half_width
                low, high = (None, None) if half is None else (estimate.mean - half, estimate.mean + half)
                rows.append((run.run, METRICS[name].axis, estimate.mean, low, high))
    types = {"run": pl.String, "metric": pl.String} | dict.fromkeys(("value", "low", "high"), pl.Float64)
    return pl.DataFrame(rows, schema=types, orient="row")


def curves(
    results: Results, frame: pl.DataFrame, columns: tuple[str, ...], points: int = 200
) -> pl.DataFrame:
    """Mean, lowest and highest seed of `columns` at each step, thinned to `points` even steps a run.

    Thinned by leaving steps out, never by averaging neighbours: what is drawn was measured. A step counts
    only when every complete seed of the run has it. Columns: run, step, tokens_seen, then c, c_low, c_high.
    """
    parts = []
    for run in results.study.runs:
        rows = frame.filter(pl.col("run") == run)
        means = [pl.col(c).mean() for c in columns]
        lows = [pl.col(c).min().alias(f"{c}_low") for c in columns]
        highs = [pl.col(c).max().alias(f"{c}_high") for c in columns]
        count, tokens = pl.len().alias("seeds"), pl.col("tokens_seen").first()
        mean = rows.group_by("step").agg(count, tokens, *means, *lows, *highs).sort("step")
        mean = mean.filter(pl.col("seeds") == rows["seed"].n_unique()).drop("seeds")
        last = mean.height - 1
        if mean.height > points:
            mean = mean[[round(i * last / (points - 1)) for i in range(points)]]
        parts.append(mean.select(pl.lit(run).alias("run"), pl.all()))
    return pl.concat(parts)
