"""The tables of a study that follows the course of its runs, as words. Must not compute a result."""

from __future__ import annotations

from metrics.course import END, EQUAL, FEWEST, Course, ToTarget, at_equal_seconds, courses, to_targets
from metrics.measures import METRICS
from metrics.summary import Summary
from metrics.words import difference, number, p_value, with_interval
from plots.outcome_tables import Captioned, ratio_text

WAY = "On the way: validation perplexity after so many steps, 95 % interval over seeds"
COURSE = (
    "Course: validation perplexity, 95 % interval over seeds; ΔPPL is best less first, scatter the standard "
    f"deviation of the evaluations in the last {100 * END:g} % of the steps, where there are {FEWEST}, degradation "
    "last over best less 1; best and scatter of pruned runs are at the target sparsity"
)
SECONDS = (
    "At equal seconds: validation loss when the quickest run had ended, seed by seed, on the line between the "
    f"evaluations around it, or at the end of a run that took at most {100 * EQUAL:g} % longer; compiling and "
    "evaluating not counted, and a slower run was not yet at the end of its schedule"
)
TARGET = (
    "Time to a validation loss of {target:g}: at the first evaluation at or below it, 95 % interval over the seeds "
    "that reached it; ratio over paired seeds"
)


def course_tables(summary: Summary) -> list[Captioned]:
    """Course, equal seconds, and one for each target; none of a study that does not ask for them."""
    if not summary.results.study.follows_course:
        return []
    return [*_course(summary), *_equal_seconds(summary), *_targets(summary)]


def _course(summary: Summary) -> list[Captioned]:
    """Two tables, since one would be too wide to read: on the way, and how it went."""
    found, steps = courses(summary), summary.results.study.perplexity_at
    way = [[_named(one), *(with_interval(one.at[step]) for step in steps)] for one in found]
    rows = [
        [
            _named(one),
            *(with_interval(value) for value in (one.best, one.last)),
            *(number(value.mean if value else None) for value in (one.gain, one.scatter)),
            number(one.degradation.mean * 100 if one.degradation else None, 2),
        ]
        for one in found
    ]
    tables: list[Captioned] = (
        [(WAY, (["run", *(f"after {step:,} steps" for step in steps)], way))] if steps else []
    )
    tables.append((COURSE, (["run", "best", "last", "ΔPPL", "scatter", "degradation (%)"], rows)))
    return tables if found else []


def _named(one: Course | ToTarget) -> str:
    """The run, and why its figures are not to be ranked."""
    return f"{one.run} ({one.aside})" if one.aside else one.run


def _equal_seconds(summary: Summary) -> list[Captioned]:
    heads = ["run", "seconds", "looked at (s)", "validation loss", "difference", "p", "verdict"]
    metric = METRICS["val_loss"]
    rows = []
    for one in at_equal_seconds(summary):
        compared = one.comparison
        rows.append(
            [
                one.run,
                number(one.seconds.mean if one.seconds else None),
                number(one.limit.mean if one.limit else None),
                with_interval(one.loss),
                difference(compared.estimate, metric) if compared else "–",
                p_value(compared.p_holm if compared else None),
                (compared.verdict or one.why or "no verdict") if compared else "baseline",
            ]
        )
    return [(SECONDS, (heads, rows))] if rows else []


def _targets(summary: Summary) -> list[Captioned]:
    heads = ["run", "reached", "tokens", "ratio", "seconds", "ratio"]
    found = to_targets(summary)
    tables = []
    for target in summary.results.study.targets:
        rows = [
            [
                _named(one),
                f"{one.reached} of {one.seeds}",
                number(one.tokens.mean if one.tokens else None),
                ratio_text(one.tokens_ratio),
                with_interval(one.seconds),
                ratio_text(one.seconds_ratio),
            ]
            for one in found
            if one.target == target
        ]
        tables.append((TARGET.format(target=target), (heads, rows)))
    return tables
