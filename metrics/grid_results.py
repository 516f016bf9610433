"""A study's grids as cells: the metric where runs ended, a mark where they diverged; and what that says in words.

Must not read or write files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from metrics.grids import Point, places, points
from metrics.statistics import Estimate
from metrics.summary import RunSummary, Summary
from metrics.words import number, with_interval

SCHEMA = {
    "grid": pl.String,
    "run": pl.String,
    "x_axis": pl.String,
    "x": pl.String,
    "y_axis": pl.String,
    "y": pl.String,
    "value": pl.Float64,
    "seeds": pl.Int64,
    "diverged": pl.Int64,
    "text": pl.String,
    "best": pl.String,
}
TWO = 2  # axes of a heat map


@dataclass(frozen=True)
class Cell:
    """A run in its grid: the study's metric over its complete seeds, and how many seeds diverged."""

    point: Point
    estimate: Estimate | None
    complete: int
    diverged: int
    seeds: int

    @property
    def stable(self) -> bool:
        """Every seed ended, with a finite result."""
        return self.complete == self.seeds and self.estimate is not None and math.isfinite(self.estimate.mean)

    @property
    def text(self) -> str:
        """What a cell of a table or of a map says."""
        value = number(self.estimate.mean, 4) if self.estimate else ""
        if self.diverged:
            mark = "×" if self.diverged == self.seeds else f"× {self.diverged} of {self.seeds}"
            return f"{value} {mark}".strip() if value else mark
        return value or "–"


def cells(summary: Summary) -> list[Cell]:
    """Every run of every grid, in the order of the study."""
    return [_cell(summary, point) for point in points(summary.results.study.grid)]


def _cell(summary: Summary, point: Point) -> Cell:
    run, study = summary.of(point.run), summary.results.study
    states = [one.state for one in summary.results.of(point.run)]
    usable = not (run.invalid or run.not_comparable) or _only_diverged(run)
    estimate = run.estimates[study.metric] if usable else None
    return Cell(point, estimate, states.count("complete"), states.count("diverged"), len(study.seeds))


def _only_diverged(run: RunSummary) -> bool:
    """Whether all that keeps the run from being compared is that seeds, its own or the baseline's, diverged."""
    return not run.invalid and all("diverged" in reason for reason in run.not_comparable)


def best(summary: Summary) -> dict[str, Cell]:
    """Of each grid the stable cell with the best mean of the study's metric; the first of equals."""
    sign = 1 if summary.metric.better == "lower" else -1
    found: dict[str, Cell] = {}
    for cell in cells(summary):
        if not cell.stable:
            continue
        assert cell.estimate is not None
        other = found.get(cell.point.grid)
        if other is None or sign * cell.estimate.mean < sign * other.estimate.mean:  # type: ignore[union-attr]
            found[cell.point.grid] = cell
    return found


def grid_frame(summary: Summary) -> pl.DataFrame:
    """One row a run of a grid of one or two axes; x is the first axis, shares are from 0 to 1."""
    grid, winners = summary.results.study.grid, best(summary)
    rows = []
    for cell in cells(summary):
        point = cell.point
        axes = list(grid[point.grid]["over"])
        if len(axes) > TWO:
            continue
        (x_axis, x), (y_axis, y) = [*zip(axes, point.labels, strict=True), ("", "")][:TWO]
        value = cell.estimate and cell.estimate.mean
        mark = "yes" if winners.get(point.grid) == cell else "no"
        counts = (value, cell.complete, cell.diverged, cell.text, mark)
        rows.append((point.grid, point.run, x_axis, x, y_axis, y, *counts))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def sentences(summary: Summary) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The stable range of the first axis, for each place on the other axes, and the best; each with its runs."""
    grid, label = summary.results.study.grid, summary.metric.label
    lines: dict[tuple[str, tuple[str, ...]], list[Cell]] = {}
    for cell in cells(summary):
        lines.setdefault((cell.point.grid, cell.point.labels[1:]), []).append(cell)
    for (name, rest), line in lines.items():
        axes = list(grid[name]["over"])
        where = ", ".join([name, *(f"{axis} {place}" for axis, place in zip(axes[1:], rest, strict=True))])
        known = [cell for cell in line if cell.complete or cell.diverged]
        if not known:
            continue
        yield f"{where}: {_range(axes[0], known)}", tuple(cell.point.run for cell in known)
    for name, cell in best(summary).items():
        axes = list(grid[name]["over"])
        place = ", ".join(f"{axis} {at}" for axis, at in zip(axes, cell.point.labels, strict=True))
        runs = len(list(points({name: grid[name]})))
        edge = _edge(grid[name]["over"], cell.point)
        yield (
            f"{name}: of {runs} runs the best {label} is {with_interval(cell.estimate)}, at {place}{edge}.",
            (cell.point.run,),
        )


def _range(axis: str, line: list[Cell]) -> str:
    """Which of the values were stable, as ranges without a gap, and which diverged."""
    spans: list[list[Cell]] = []
    for before, cell in zip([None, *line], line, strict=False):
        if cell.stable:
            if before is not None and before.stable and spans:
                spans[-1].append(cell)
            else:
                spans.append([cell])
    said = [
        span[0].point.labels[0]
        if len(span) == 1
        else f"{span[0].point.labels[0]} to {span[-1].point.labels[0]}"
        for span in spans
    ]
    words = f"every seed ended at {axis} {' and '.join(said)}" if said else f"no {axis} was stable"
    lost = [
        f"{cell.point.labels[0]} ({cell.diverged} of {cell.seeds} seeds)" for cell in line if cell.diverged
    ]
    return f"{words}; diverged at {', '.join(lost)}." if lost else f"{words}; none diverged."


def _edge(over: dict, point: Point) -> str:
    """A best value at the end of an axis may lie beyond it."""
    ends = []
    for (axis, values), place in zip(over.items(), point.labels, strict=True):
        names = [shown for shown, _, _ in places(axis, values)]
        if len(names) > 1 and place in (names[0], names[-1]):
            ends.append(axis)
    return f" (the end of its range of {' and '.join(ends)}: a better one may lie beyond)" if ends else ""
