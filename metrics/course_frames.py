"""How the runs of a study got where they are, as the tables of its files. Computes no figure, writes no file."""

from __future__ import annotations

import polars as pl

from metrics.course import at_equal_seconds, courses, to_targets
from metrics.summary import Summary


def frames(summary: Summary) -> dict[str, pl.DataFrame]:
    """The tables by the names of their files; empty ones of a study that does not ask for them."""
    made = {
        "course.csv": course_frame,
        "equal_seconds.csv": equal_seconds_frame,
        "targets.csv": targets_frame,
    }
    asked = summary.results.study.follows_course
    return {name: make(summary) if asked else pl.DataFrame() for name, make in made.items()}


def course_frame(summary: Summary) -> pl.DataFrame:
    """One row a run, unrounded: means and half-widths of what `courses` has."""
    rows = []
    for one in courses(summary):
        named = {f"perplexity_at_{step}": estimate for step, estimate in one.at.items()}
        named |= {name: getattr(one, name) for name in ("best", "last", "gain", "scatter", "degradation")}
        row = {"run": one.run, "not_ranked": one.aside or None}
        for name, estimate in named.items():
            row |= {name: estimate and estimate.mean, f"{name}_half_width": estimate and estimate.half_width}
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def equal_seconds_frame(summary: Summary) -> pl.DataFrame:
    """One row a run, unrounded."""
    rows = [
        {
            "run": one.run,
            "seconds": one.seconds and one.seconds.mean,
            "looked_at_seconds": one.limit and one.limit.mean,
            "val_loss": one.loss and one.loss.mean,
            "val_loss_half_width": one.loss and one.loss.half_width,
            "difference": difference and difference.mean,
            "difference_half_width": difference and difference.half_width,
            "p_holm": one.comparison and one.comparison.p_holm,
            "verdict": one.comparison.verdict if one.comparison else "baseline",
            "why_no_loss": one.why or None,
        }
        for one in at_equal_seconds(summary)
        for difference in [one.comparison and one.comparison.estimate]
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def targets_frame(summary: Summary) -> pl.DataFrame:
    """One row a run and target, unrounded."""
    rows = [
        {
            "run": one.run,
            "not_ranked": one.aside or None,
            "target": one.target,
            "reached": one.reached,
            "seeds": one.seeds,
            "tokens": one.tokens and one.tokens.mean,
            "tokens_ratio": one.tokens_ratio and one.tokens_ratio.mean,
            "tokens_ratio_low": one.tokens_ratio and one.tokens_ratio.low,
            "tokens_ratio_high": one.tokens_ratio and one.tokens_ratio.high,
            "seconds": one.seconds and one.seconds.mean,
            "seconds_half_width": one.seconds and one.seconds.half_width,
            "seconds_ratio": one.seconds_ratio and one.seconds_ratio.mean,
            "seconds_ratio_low": one.seconds_ratio and one.seconds_ratio.low,
            "seconds_ratio_high": one.seconds_ratio and one.seconds_ratio.high,
        }
        for one in to_targets(summary)
    ]
    return pl.DataFrame(rows, infer_schema_length=None)
