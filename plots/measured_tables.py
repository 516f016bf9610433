"""The tables of peak memory, of inference latency and of what runs took of their machines, where there are rows.

Must not compute a result: numbers come from metrics/.
"""

from __future__ import annotations

from metrics.devices import OF_GPU, OF_PROCESS, Use, uses
from metrics.latencies import latencies
from metrics.statistics import Ratio
from metrics.summary import Summary
from metrics.trade_offs import by_memory, natural
from metrics.words import WORTH_SAYING, difference, number, with_interval
from plots.outcome_tables import Captioned, ratio_text

LATENCY = (
    "Inference latency: one sequence, uncompiled; prefill: all its tokens, token: the last with a cache of the rest; "
    "means over seeds, ratios of medians"
)
MEMORY = (
    "Memory, ranked: peak, least first; saved, and differences with their 95 % interval, against {baseline} over "
    f"paired seeds, for each GiB where its peak is at least {100 * WORTH_SAYING:g} % away"
)
DEVICE = "Machine during the steps: mean / maximum of the samples, means over seeds"
MOST_TOLD = ("device_memory_gib", "device_utilization_percent", "temperature_celsius", "power_watts")
LATENCY_HEADS = [
    "run",
    "tokens",
    "prefill p50 (ms)",
    "p95 (ms)",
    "ratio",
    "token p50 (ms)",
    "p95 (ms)",
    "ratio",
    "cache (bytes a token)",
    "ratio",
]


def measured_tables(summary: Summary, wide: bool = False) -> list[Captioned]:
    """Latency, then the machine; `wide`: where there is room for intervals and for every figure."""
    return [*latency_tables(summary, wide), *device_tables(summary, wide)]


def memory_tables(summary: Summary) -> list[Captioned]:
    """A row a run, least peak memory first, and what a GiB of it costs in quality; nothing where all are alike."""
    found = by_memory(summary)
    if not found:
        return []
    metric, baseline = summary.measure(natural(summary)), summary.results.study.baseline
    sides = [("per_gib_saved", "for each GiB saved"), ("per_gib_more", "for each GiB more")]
    sides = [(name, head) for name, head in sides if any(getattr(one, name) for one in found)]
    heads = ["run", "rank", "peak memory (GiB)", "saved (GiB)", "ratio", metric.axis, "difference"]
    rows = [
        [
            one.run,
            str(one.rank),
            number(one.peak),
            number(one.saved),
            ratio_text(one.ratio),
            with_interval(one.quality and one.quality.times(metric.factor)),
            difference(one.difference, metric),
            *(difference(getattr(one, name), metric) for name, _ in sides),
        ]
        for one in found
    ]
    return [(MEMORY.format(baseline=baseline), ([*heads, *(head for _, head in sides)], rows))]


def latency_tables(summary: Summary, wide: bool = False) -> list[Captioned]:
    """A row a length and run; nothing where no run measured any."""

    def ratio(found: Ratio | None) -> str:
        return ratio_text(found if wide or not found else Ratio(found.mean, None, None, found.count))

    rows = []
    for one in latencies(summary):
        cells = {name: number(estimate.mean) for name, estimate in one.figures.items()}
        prefill = [cells["prefill_p50_ms"], cells["prefill_p95_ms"], ratio(one.prefill_ratio)]
        token = [cells["token_p50_ms"], cells["token_p95_ms"], ratio(one.token_ratio)]
        cache = [f"{one.figures['cache_bytes_per_token'].mean:,.0f}", ratio(one.cache_ratio)]
        rows.append([one.run, f"{one.length:,}", *prefill, *token, *cache])
    caption = f"{LATENCY} with their 95 % interval" if wide else LATENCY
    return [(caption, (LATENCY_HEADS, rows))] if rows else []


def device_tables(summary: Summary, wide: bool = False) -> list[Captioned]:
    """A row a run that was watched; figures that no run has get no column."""
    found = uses(summary)
    names = {
        name: head for name, head in (OF_GPU | OF_PROCESS).items() if any(name in one.mean for one in found)
    }
    if not wide and names.keys() & set(MOST_TOLD):
        names = {name: head for name, head in names.items() if name in MOST_TOLD}
    rows = [[one.run, *(_mean_and_most(one, name) for name in names)] for one in found]
    return [(DEVICE, (["run", *names.values()], rows))] if names else []


def _mean_and_most(one: Use, name: str) -> str:
    if name not in one.mean:
        return "–"
    return f"{number(one.mean[name].mean, 3)} / {number(one.highest[name].mean, 3)}"
