"""What the gradients of a study's runs say: norms of blocks over steps, and the gradient noise scale.

Rows in, frames and sentences' numbers out. Must not read or write files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import polars as pl

from metrics import statistics
from metrics.frames import curves
from metrics.rows import Results
from metrics.statistics import Estimate
from metrics.words import number, of_seeds, with_interval

PREFIX = "gradient_norm_"  # columns of steps.csv, each with the number of its block
SPREAD = "gradient_norm_spread"
ENDS = 0.1  # share of the steps that is called the start, and the end
VANISHED = 1e5  # a ratio of norms of which only the order of magnitude is worth saying


def blocks(results: Results) -> list[int]:
    """The blocks whose gradient norm any run recorded."""
    return sorted(int(name.removeprefix(PREFIX)) for name in results.steps.columns if name.startswith(PREFIX))


def block_norms(results: Results, points: int = 200) -> pl.DataFrame:
    """Columns run, step, block, gradient_norm: means over seeds, thinned as `frames.curves` does; what is there."""
    names = [f"{PREFIX}{block}" for block in blocks(results)]
    if not names:
        return pl.DataFrame(
            schema={"run": pl.String, "step": pl.Int64, "block": pl.Int64, "gradient_norm": pl.Float64}
        )
    frame = curves(results, results.steps, tuple(names), points).select("run", "step", *names)
    long = frame.unpivot(names, index=["run", "step"], variable_name="block", value_name="gradient_norm")
    block = pl.col("block").str.strip_prefix(PREFIX).cast(pl.Int64)
    return long.with_columns(block).filter(pl.col("gradient_norm").is_finite())


def with_spread(results: Results) -> pl.DataFrame:
    """Rows of steps with a column more: the largest gradient norm of a block over the smallest; null of one block."""
    names = [f"{PREFIX}{block}" for block in blocks(results)]
    if not names:
        return results.steps.with_columns(pl.lit(None, pl.Float64).alias(SPREAD))
    count = pl.sum_horizontal(pl.col(name).is_not_null() for name in names)
    spread = pl.max_horizontal(names) / pl.min_horizontal(names)
    return results.steps.with_columns(pl.when(count > 1).then(spread).alias(SPREAD))


@dataclass(frozen=True)
class Spread:
    """One run's: medians over the first and the last tenth of its steps, means of their logarithms over seeds."""

    run: str
    start: float
    end: float
    seeds: int

    @property
    def words(self) -> str:
        """Both, in a sentence."""
        start, end = (f"{one:.1e}" if one >= VANISHED else number(one, 3) for one in (self.start, self.end))
        return (
            f"{self.run}: the largest gradient norm of a block was {start} × the smallest in the "
            f"first tenth of the steps, {end} × in the last; {of_seeds(self.seeds)}."
        )


def spreads(results: Results) -> tuple[Spread, ...]:
    """Of the runs that recorded the gradient norms of two blocks or more."""
    frame = with_spread(results).filter(pl.col(SPREAD).is_finite())
    found = []
    for run in results.study.runs:
        ends: list[tuple[float, float]] = []
        for (_seed,), rows in frame.filter(pl.col("run") == run).group_by("seed", maintain_order=True):
            values = rows.sort("step")[SPREAD].to_list()
            length = max(1, round(ENDS * len(values)))
            ends.append((_median(values[:length]), _median(values[-length:])))
        if ends:
            start, end = (math.exp(sum(math.log(pair[i]) for pair in ends) / len(ends)) for i in range(2))
            found.append(Spread(run, start, end, len(ends)))
    return tuple(found)


def _median(values: list[float]) -> float:
    return float(pl.Series(values).median())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Noise:
    """One run's noise scale, in samples: S over |G|², each averaged first; over seeds.

    `early` and `late` are of the first and the last third of the measurements; None where |G|² came out negative, so
    that there is no more to say than that the batch is far below the noise scale.
    """

    run: str
    scale: Estimate | None
    early: Estimate | None
    late: Estimate | None
    coherence: Estimate
    small_batch: int
    large_batch: int
    measurements: int  # of a seed

    @property
    def words(self) -> str:
        """The noise scale, its course, on which side of it the batch is, and the coherence, in a sentence."""
        if self.scale is None:
            said = (
                f"no gradient stands out of the noise of batches of {self.large_batch:,}, so its noise scale is far "
                "above that"
            )
        else:
            course = ""
            if self.early and self.late:
                early, late = number(self.early.mean, 3), number(self.late.mean, 3)
                course = f" ({early} in the first third, {late} in the last)"
            side = self._side(self.scale)
            said = (
                f"its gradient noise scale is {with_interval(self.scale)} sequences{course}; its batch of "
                f"{self.large_batch:,} is {side} that"
            )
            if self.late and self._side(self.late) != side:  # the mean is mostly of the start
                said += f", but {self._side(self.late)} that of the last third"
        count = f"{self.measurements} measurement{'s' if self.measurements > 1 else ''} a run"
        return (
            f"{self.run}: {said}; coherence of micro-batches of {self.small_batch:,} "
            f"{with_interval(self.coherence)}; {count}, {of_seeds(self.coherence.count)}."
        )

    def _side(self, scale: Estimate) -> str:
        return "below" if self.large_batch < scale.mean else "above"


def noise(results: Results) -> tuple[Noise, ...]:
    """Of the runs that measured it."""
    found = []
    for run in results.study.runs:
        own = results.noise.filter(pl.col("run") == run)
        if own.is_empty():
            continue
        seeds = [rows.sort("step") for _, rows in own.group_by("seed", maintain_order=True)]
        third = max(1, seeds[0].height // 3)
        found.append(
            Noise(
                run,
                *(
                    _scale(part)
                    for part in (seeds, [s.head(third) for s in seeds], [s.tail(third) for s in seeds])
                ),
                coherence=statistics.mean_interval([float(s["coherence"].mean()) for s in seeds]),  # type: ignore[arg-type]
                small_batch=int(own["small_batch"][0]),
                large_batch=int(own["large_batch"][0]),
                measurements=seeds[0].height,
            )
        )
    return tuple(found)


def _scale(seeds: list[pl.DataFrame]) -> Estimate | None:
    """Mean and interval over seeds of mean S / mean |G|²; None unless every seed's |G|² is positive."""
    means = [(float(s["noise"].mean()), float(s["gradient_square"].mean())) for s in seeds]  # type: ignore[arg-type]
    if not all(gradient > 0 and math.isfinite(noise) for noise, gradient in means):
        return None
    return statistics.mean_interval([noise / gradient for noise, gradient in means])
