"""Who chooses the true reply how often, of the same candidates: runs, a ranker that only counts words, and chance.

Frames only. Must not read or write files.
"""

from __future__ import annotations

import polars as pl

from metrics import statistics
from metrics.rows import RunSeed
from metrics.summary import Summary

CHANCE, RANKER = "chance", "TF-IDF ranker"
SCHEMA = {
    "chooser": pl.String,
    "candidates": pl.Int64,
    "accuracy": pl.Float64,  # share, of a run mean over seeds
    "low": pl.Float64,  # binomial interval, Wilson's, 95 %; null of chance
    "high": pl.Float64,
    "examples": pl.Int64,
    "hits_candidates": pl.Int64,  # among which hits@1 is; null where it was not asked for
    "hits_at_1": pl.Float64,
    "hits_low": pl.Float64,
    "hits_high": pl.Float64,
}


def ranking(summary: Summary) -> pl.DataFrame:
    """SCHEMA: chance, the ranker, then a row a comparable run; empty where no run chose among candidates.

    Runs that are comparable were scored on the same candidates, so what the ranker gets is the same beside each.
    """
    done = {
        run.run: [one for one in summary.results.of(run.run) if _chose(one)] for run in summary.comparable
    }
    first = next((one for seeds in done.values() for one in seeds), None)
    if first is None:
        return pl.DataFrame(schema=SCHEMA)
    count, candidates = int(first.test["examples"]), int(first.test["candidates"])
    ranker = statistics.proportion(first.test["tfidf_accuracy"], count)
    rows = [
        (CHANCE, candidates, first.test["chance_accuracy"], None, None, count, *_hits_by_chance(first)),
        (RANKER, candidates, ranker.mean, ranker.low, ranker.high, count, *_hits([first], "tfidf_hits_at_1")),
    ]
    for run in summary.comparable:
        if done[run.run] and (share := run.proportions.get("test_accuracy")):
            hits = _hits(done[run.run], "hits_at_1")
            rows.append((run.run, candidates, share.mean, share.low, share.high, share.count, *hits))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _chose(one: RunSeed) -> bool:
    return one.state == "complete" and "tfidf_accuracy" in one.test


def _hits(seeds: list[RunSeed], key: str) -> tuple:
    """(candidates, mean over seeds of `key` among them, low, high); nulls where not every seed has it."""
    found = [one.test.get(key) for one in seeds]
    if None in found:
        return None, None, None, None
    share = statistics.proportion(sum(found) / len(found), int(seeds[0].test["examples"]))
    return int(seeds[0].test["hits_candidates"]), share.mean, share.low, share.high


def _hits_by_chance(one: RunSeed) -> tuple:
    candidates = one.test.get("hits_candidates")
    return candidates, candidates and 1 / candidates, None, None
