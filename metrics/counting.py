"""Which evaluations of a run count: for its best, for when it reached a loss, for how it stands at some time.

Of a run that prunes only those at its target sparsity: what it was before is another, denser model. Must not read
or write files.
"""

from __future__ import annotations

import polars as pl

from metrics.rows import Results, RunSeed

COUNTS = "counts"  # the column of `with_counts`


def counts(one: RunSeed, steps: list[int]) -> list[bool]:
    """Whether the evaluation of each row of evals.csv counts; steps: as there, from 0.

    The ramp ends where the hold begins; whether sparsity as measured was there at all, metrics.json says.
    """
    if not one.prunes:
        return [True] * len(steps)
    reached = one.metrics.get("best_val_loss_at_target") is not None
    first = one.config["steps"] - one.config.get("pruning_hold", 0)
    return [reached and step + 1 >= first for step in steps]


def with_counts(one: RunSeed, evals: pl.DataFrame) -> pl.DataFrame:
    """The run's rows of evals.csv with the column COUNTS."""
    return evals.with_columns(pl.Series(COUNTS, counts(one, evals["step"].to_list()), pl.Boolean))


def any_prunes(results: Results, run: str) -> bool:
    """Whether one of the run's finished seeds prunes."""
    return any(one.prunes for one in results.of(run) if one.state == "complete")
