"""The search for the largest micro-batch that fits: which one to try next, and when enough is known.

It runs nothing itself. Memory grows with the micro-batch along a straight line, nearly: what a trial was seen to
hold says how far the line goes, and the next trial is where it ends. Only trials decide: the search ends between one
that fits and one that does not, neighbours or nearer than a sixteenth. Where the line was wrong, steps from its end
double; where it stays wrong, or nothing was measured, micro-batches double until one does not fit, then bisect.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

SUCCESS, NO_MEMORY, ERROR = "success", "out_of_memory", "error"
PRECISION = 16  # the search ends where the next micro-batch would be nearer than a 16th
REACH = 8  # times as large, or as small, as any tried before: more is not believed at once
GUESSES = 8  # trials that follow the line, at most


@dataclass(frozen=True)
class Result:
    """One trial. What was not measured is None."""

    micro_batch: int  # sequences
    status: str
    peak_memory_gib: float | None = None  # of tensors
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    reserved_gib: float | None = None  # what the allocator of a GPU held for them
    limit_gib: float | None = None  # of memory: the run's own, or all that the GPU has
    message: str = ""

    @property
    def held_gib(self) -> float | None:
        """What the limit is for."""
        return self.peak_memory_gib if self.reserved_gib is None else self.reserved_gib


def search(
    trial: Callable[[int], Result],
    known: list[Result],
    largest: int,
    keep: Callable[[list[Result]], None],
    start: int = 1,
) -> list[Result]:
    """Try micro-batches up to `largest`, first `start`, until the largest that fits is known or a trial is an error.

    known: results from before; only errors are tried again. keep: is given all results after each trial.
    """
    results = {r.micro_batch: r for r in known if r.status != ERROR}
    # surprises: of the line, in a row; above 0: more fits than it has room for; below: less
    guesses = surprises = 0
    while True:
        fits, too_much = _bounds(results, largest)
        if _is_settled(fits, too_much, largest):
            break
        end = _end_of_line(results) if guesses < GUESSES else None
        micro = _next(fits, too_much, largest, start, end, surprises)
        results[micro] = trial(micro)
        keep(_ordered(results))
        if results[micro].status == ERROR:
            break
        if end is not None:
            fitted, guesses = results[micro].status == SUCCESS, guesses + 1
            surprises = 0 if fitted == (micro <= end) else surprises + (1 if fitted else -1)
    return _ordered(results)


def _ordered(results: dict[int, Result]) -> list[Result]:
    return [results[micro] for micro in sorted(results)]


def _bounds(results: dict[int, Result], largest: int) -> tuple[int, int]:
    """The largest that fits so far (0: none), and the smallest that does not or may not be tried."""
    fits = max((m for m, r in results.items() if r.status == SUCCESS), default=0)
    return fits, min([largest + 1, *(m for m, r in results.items() if r.status == NO_MEMORY)])


def _is_settled(fits: int, too_much: int, largest: int) -> bool:
    near = fits // PRECISION if too_much <= largest else 0
    return too_much - fits <= max(near, 1)


def _end_of_line(results: dict[int, Result]) -> int | None:
    """The largest micro-batch on this side of the limit; None where there is no line.

    It goes through the largest that fits and one about half as large, if there is one. The first success has only the
    origin: in proportion memory seems to grow faster than it does, because a part of it does not grow at all.
    """
    fitting = [r for r in _ordered(results) if r.status == SUCCESS]
    if not fitting or fitting[-1].limit_gib is None or fitting[-1].held_gib is None:
        return None
    last = fitting[-1]
    others = [(0, 0.0), *((r.micro_batch, r.held_gib) for r in fitting[:-1] if r.held_gib is not None)]
    micro, held = min(others, key=lambda other: abs(other[0] - last.micro_batch / 2))
    slope = (last.held_gib - held) / (last.micro_batch - micro)
    return last.micro_batch + math.floor((last.limit_gib - last.held_gib) / slope) if slope > 0 else None


def _next(fits: int, too_much: int, largest: int, start: int, end: int | None, surprises: int) -> int:
    """The next to try, above `fits` and below `too_much`; end: of the line, if there is one."""
    if not fits:
        first = min(start, largest)
        return first if first < too_much else max(too_much // REACH, 1)
    failed, middle = too_much <= largest, fits + (too_much - fits) // 2
    if end is None:
        return middle if failed else min(2 * fits, largest)
    up = fits + (_stride(fits // PRECISION, surprises) if surprises > 0 else 1)
    if not failed:
        return min(max(end, up), REACH * fits, largest)
    if end < too_much:
        return max(end, min(up, middle))
    # As far below as ends the search if it fits: a 16th of what is there.
    return max(too_much - _stride(too_much // (PRECISION + 1), -surprises), middle)


def _stride(first: int, surprises: int) -> int:
    """`first`, doubled with each surprise in a row after the first."""
    return max(first, 1) << max(surprises - 1, 0)
