"""How long runs' final models take to answer, where that was measured. Must not read or write files."""

from __future__ import annotations

from dataclasses import dataclass

from metrics import statistics
from metrics.statistics import Estimate, Ratio
from metrics.summary import Summary

FIGURES = ("prefill_p50_ms", "prefill_p95_ms", "token_p50_ms", "token_p95_ms", "cache_bytes_per_token")


@dataclass(frozen=True)
class Latency:
    """One run at one length: means over seeds, and medians against the baseline's over paired seeds."""

    run: str
    length: int  # tokens
    figures: dict[str, Estimate]  # of FIGURES
    prefill_ratio: Ratio | None
    token_ratio: Ratio | None
    cache_ratio: Ratio | None


def latencies(summary: Summary) -> list[Latency]:
    """A row a length and complete run that measured it: shorter lengths first, in the study's order."""
    found = {run.run: _by_length(summary, run.run) for run in summary.complete}
    base = summary.results.study.baseline
    compared = {run.run for run in summary.comparable if not run.costs_not_comparable} - {base}
    rows = []
    for length in sorted({length for own in found.values() for length in own}):
        for run, own in found.items():
            if length not in own:
                continue
            seeds = own[length]
            theirs = found.get(base, {}).get(length, {}) if run in compared else {}
            ratios = {
                name: statistics.paired_ratio(
                    {seed: one[name] for seed, one in seeds.items()},
                    {seed: one[name] for seed, one in theirs.items()},
                )
                for name in ("prefill_p50_ms", "token_p50_ms", "cache_bytes_per_token")
            }
            means = {
                name: statistics.mean_interval([one[name] for one in seeds.values()]) for name in FIGURES
            }
            rows.append(Latency(run, length, means, *ratios.values()))
    return rows


def _by_length(summary: Summary, run: str) -> dict[int, dict[int, dict[str, float]]]:
    """length → seed → figures."""
    found: dict[int, dict[int, dict[str, float]]] = {}
    for one in summary.results.of(run):
        for row in one.latency:
            found.setdefault(int(row["length"]), {})[one.seed] = row
    return found
