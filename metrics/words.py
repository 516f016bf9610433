"""Every sentence and every number that a table or report says about a result, made from its summary.

Must not compute a result: that is in `metrics.summary` and `metrics.statistics`.
"""

from __future__ import annotations

import math
import re

from metrics.measures import DECIDED, METRICS, Metric
from metrics.statistics import Comparison, Estimate, Ratio
from metrics.summary import RunSummary, Summary

SMALL, LARGE = 1e-6, 1e12  # below and from there on a table writes an exponent
WORTH_SAYING = 0.01  # a change in cost below this is in the tables, not in a sentence
# What the ledger says of a data set that is not whole, only stands in for another, or could not be checked.
PART_OF = re.compile(
    r"[\d,]+ of the [\d,]+ published training rows \(\d+ ?%\)|a stand-in for [^;]+|unverified: [^;]+"
)


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table: `digits` significant digits, whole when large, a power of ten when beyond LARGE.

    A dash when not measured.
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(value, "not a number")
    if value and not SMALL <= abs(value) < LARGE:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(decimals, 0)}f}"


def short(name: str, most: int = 30) -> str:
    """The name as it is, or its two ends where it is longer than a chart has room for."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def percent_change(ratio: float) -> str:
    """`29 % more`, `52 % less`, or `the same`."""
    percent = round(100 * abs(ratio - 1))
    return "the same" if percent == 0 else f"{percent} % {'more' if ratio > 1 else 'less'}"


def change(ratio: Ratio) -> str:
    """`29 % more (16 % more to 43 % more)`, `52 % less`, `the same`; or that it may be either."""
    mean = percent_change(ratio.mean)
    if ratio.low is None or ratio.high is None or percent_change(ratio.low) == percent_change(ratio.high):
        return mean
    if ratio.low < 1 < ratio.high:
        return f"{mean}, which these seeds do not tell from none ({number(ratio.low, 2)}–{number(ratio.high, 2)} ×)"
    return f"{mean} ({percent_change(ratio.low)} to {percent_change(ratio.high)})"


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


def difference(estimate: Estimate | None, metric: Metric) -> str:
    """A difference between two values of a metric, with its sign and interval, in the unit that is shown."""
    return with_interval(estimate and estimate.times(metric.factor), signed=True)


def times(ratio: Ratio) -> str:
    """`1.29 × (0.84–1.98)`."""
    if ratio.low is None or ratio.high is None or ratio.low == ratio.high:
        return f"{ratio.mean:.2f} ×"
    return f"{ratio.mean:.2f} × ({ratio.low:.2f}–{ratio.high:.2f})"


def of_seeds(count: int) -> str:
    """How many seeds a figure is of."""
    return "one seed" if count == 1 else f"{count} seeds"


def paired_seeds(count: int) -> str:
    """How many seeds a paired figure is of."""
    return "one seed, so no interval" if count == 1 else f"{count} paired seeds"


def p_value(p: float | None) -> str:
    """`0.0123`, `< 0.0001`, `1`, or a dash."""
    if p is None:
        return "–"
    if p == 1:
        return "1"
    return f"{p:.4f}" if p >= 1e-4 else "< 0.0001"  # noqa: PLR2004


def headline(summary: Summary) -> str:
    """The verdict of the whole study in a sentence: which runs are better, worse, the same, or undecided."""
    study = summary.results.study
    others = [run for run in summary.runs if run.run != study.baseline]
    if not others:
        return f"{study.baseline} is the only run: there is nothing to compare it with."
    groups: dict[str, list[str]] = {}
    for run in others:
        groups.setdefault(run.status, []).append(run.run + _of_planned(run, len(study.seeds)))
    order = [status for status in HEADLINES if status in groups]
    order += [status for status in groups if status not in HEADLINES]
    parts = []
    for status in order:
        one, several = HEADLINES.get(status, (f"is {status}", f"are {status}"))
        parts.append(f"{_listed(groups[status])} {one if len(groups[status]) == 1 else several}")
    against = f"Against {study.baseline} on {summary.metric.label} at {summary.axis}"
    return f"{against}, {'; '.join(parts)}."


def _of_planned(run: RunSummary, seeds: int) -> str:
    """How many of the planned seeds a verdict is from, where it is not all."""
    done = len(run.complete_seeds)
    return f" ({done} of {seeds} seeds)" if run.status in DECIDED and 0 < done < seeds else ""


HEADLINES = {  # status: what is said of one run that has it, and of several
    "better": ("is better", "are better"),
    "worse": ("is worse", "are worse"),
    "identical": ("is identical", "are identical"),
    "equivalent": ("is equivalent", "are equivalent"),
    "inconclusive": ("is inconclusive", "are inconclusive"),
    "no verdict": ("has no verdict", "have no verdict"),
    "own budget": ("had a budget of its own", "had budgets of their own"),
    "diverged": ("diverged", "diverged"),
    "failed": ("failed", "failed"),
    "missing": ("has not run", "have not run"),
}


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def verdict_sentence(summary: Summary, run: RunSummary) -> str:
    """What can be said about one run against the baseline on the study's metric, in a sentence."""
    study, comparison = summary.results.study, run.comparison
    label = summary.metric.label
    if not run.complete_seeds:
        return f"{run.run} has no result ({'; '.join(run.notes)})."
    if run.invalid:
        return f"{run.run} is invalid: {'; '.join(run.invalid)}."
    if run.not_comparable:
        return f"{run.run} is not comparable with {study.baseline}: {'; '.join(run.not_comparable)}."
    if run.own_budget:
        return f"{run.run} had a budget of its own and is not ranked: {'; '.join(run.own_budget)}."
    if comparison is None:
        return f"{run.run} is the baseline."
    if comparison.verdict is None:
        return f"{run.run} against {study.baseline} on {label}: {comparison.reason}."
    pairs = f"{len(comparison.seeds)} paired seeds"
    if comparison.verdict == "identical":
        return f"{run.run} and {study.baseline} have exactly the same {label} in all {pairs}."
    by = f"{difference(comparison.estimate, summary.metric)} {summary.metric.difference_unit}".strip()
    evidence = f"{by}, {pairs}, p {_equals(p_value(comparison.p_holm))}"
    if comparison.verdict == "equivalent":
        p = p_value(comparison.p_equivalent)
        return (
            f"{run.run} is equivalent to {study.baseline} on {label}: the difference ({by}, {pairs}) is less than "
            f"{margin(summary)} (p {_equals(p)})."
        )
    if comparison.verdict == "inconclusive":
        smallest = _smallest(summary, comparison)
        return (
            f"{run.run} against {study.baseline} on {label} is inconclusive ({evidence}): "
            f"these seeds could have shown a difference of {smallest}."
        )
    return f"{run.run} is {comparison.verdict} than {study.baseline} on {label} ({evidence})."


def margin(summary: Summary) -> str:
    """The study's margin, in the unit that is shown."""
    metric = summary.metric
    return f"{summary.results.study.margin * metric.factor:g} {metric.difference_unit}".strip()


def _smallest(summary: Summary, comparison: Comparison) -> str:
    """The smallest difference that the seeds could have shown, in the unit that is shown."""
    metric = summary.metric
    assert comparison.smallest_detectable is not None
    return f"{number(comparison.smallest_detectable * metric.factor, 2)} {metric.difference_unit}".strip()


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
            parts.append(f"{METRICS[name].label} {percent_change(ratio.mean)}")
    return f"{run.run} costs, against {summary.results.study.baseline}: {', '.join(parts)}." if parts else ""


def footnotes(summary: Summary) -> list[str]:
    """What a table must not be read without: why runs are not compared, what did not go as asked, and the rest.

    The same words about several runs are said once.
    """
    found: dict[str, list[str]] = {}
    for run in summary.runs:
        for words in _run_footnotes(summary, run):
            found.setdefault(words, []).append(run.run)
    notes = [f"{', '.join(runs)}: {words}" for words, runs in found.items()]
    if absent := summary.results.study.left_out:
        whole = len(absent) + len(summary.results.study.runs)
        notes.append(
            f"{len(absent)} of the study's {whole} runs are left out, with what is asked of them: {', '.join(absent)}"
        )
    return notes


def _run_footnotes(summary: Summary, run: RunSummary) -> list[str]:
    notes = [f"invalid: {words}" for words in run.invalid]
    notes += [
        f"not comparable: {words}"
        for words in run.not_comparable
        if run.complete_seeds  # of a run that diverged altogether the notes say so, with its step
    ]
    notes += [f"own budget, not ranked: {words}" for words in run.own_budget]
    notes += [f"costs not comparable: {words}" for words in run.costs_not_comparable]
    notes += [f"not as requested: {words}" for words in run.ledger]
    notes += run.notes
    if run.counts:
        notes.append(", ".join(f"{count} {what}" for what, count in run.counts.items()))
    notes += [
        f"{METRICS[name].label}: the binomial interval is Wilson's, 95 %, of {share.count:,} rows; it says how far "
        "other rows could move it, the interval over seeds how far other seeds"
        for name, share in run.proportions.items()
    ]
    notes += data_notes(summary, run)
    comparison = run.comparison if run.complete_seeds else None
    if comparison and comparison.reason:
        notes.append(f"no verdict: {comparison.reason}")
    if comparison and comparison.verdict == "equivalent":
        notes.append(f"the difference is less than {margin(summary)}, which would change no choice")
    elif comparison and comparison.smallest_detectable:  # 0 when every difference is the same
        smallest = _smallest(summary, comparison)
        notes.append(
            f"{len(comparison.seeds)} seeds could have shown (80 % power) a difference of {smallest}"
        )
    return notes


def data_notes(summary: Summary, run: RunSummary) -> list[str]:
    """How much of the published training rows the run had, where it is not all of them; what its data stand in for.

    As its ledger says it.
    """
    said = [
        f"{entry['what']} {entry['in_effect']}: {found[0]}"
        for one in summary.results.of(run.run)
        for entry in one.ledger
        if (found := PART_OF.search(entry["how"]))
    ]
    return list(dict.fromkeys(said))


def binomial(run: RunSummary, name: str) -> str:
    """`90.6–91.9`: the ends of the binomial interval of a share, in percent; a dash where there is none."""
    share, factor = run.proportions.get(name), METRICS[name].factor
    return f"{share.low * factor:.2f}–{share.high * factor:.2f}" if share else "–"
