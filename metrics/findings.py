"""Findings: what the rows of a study say beyond the verdicts, in sentences, each with the runs it came from.

Only what rows can say, with an interval or the number of seeds. Must not read or write files.
"""

from __future__ import annotations

from dataclasses import dataclass

from metrics.summary import Summary


@dataclass(frozen=True)
class Finding:
    """A sentence, and the runs whose rows it was made from."""

    text: str
    runs: tuple[str, ...]


def findings(summary: Summary) -> tuple[Finding, ...]:
    """Every finding that the rows of the study give, in a fixed order."""
    return ()
