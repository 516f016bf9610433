"""A line of the ledger: what was requested, what was in effect, and how that was established.

Every line rests on something observed in this process, never on the request itself. The module that owns a technique
observes it; engine/observed.py puts the lines together. Tables show every line that does not agree.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One fact of a run."""

    what: str
    requested: str
    in_effect: str
    how: str  # how `in_effect` was established
    agrees: bool


def as_dict(lines: Iterable[Line]) -> dict:
    """The content of ledger.json."""
    return {"entries": [vars(line) for line in lines]}
