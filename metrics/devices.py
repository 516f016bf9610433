"""What runs took of their machines while they trained, where a monitor looked. Must not read or write files."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from metrics import statistics
from metrics.frames import thinned
from metrics.rows import Results
from metrics.statistics import Estimate
from metrics.summary import Summary
from metrics.words import number, of_seeds

# Columns of device.csv → what they are called.
OF_GPU = {
    "device_memory_gib": "GPU memory (GiB)",
    "device_utilization_percent": "GPU utilisation (%)",
    "temperature_celsius": "GPU temperature (°C)",
    "power_watts": "GPU power (W)",
    "sm_clock_mhz": "GPU clock (MHz)",
}
CAPPED = 0.5  # of the samples: then it is what a run's speed was
OF_PROCESS = {"process_memory_gib": "process memory (GiB)", "process_cpu_percent": "CPU, 100 a core (%)"}


@dataclass(frozen=True)
class Use:
    """One run's: mean and maximum of each figure, means over seeds; a figure that was not read is in neither."""

    run: str
    mean: dict[str, Estimate]
    highest: dict[str, Estimate]


def uses(summary: Summary) -> list[Use]:
    """A row a complete run that was watched, in the study's order."""
    found = []
    for run in summary.complete:
        seeds = [one.metrics for one in summary.results.of(run.run) if one.state == "complete"]
        if any(one.get("monitor_samples") for one in seeds):
            parts = [
                {
                    name: statistics.mean_interval(values)
                    for name in (*OF_GPU, *OF_PROCESS)
                    if (values := [one[key] for one in seeds if one.get(key := f"{name}_{of}") is not None])
                }
                for of in ("mean", "max")
            ]
            found.append(Use(run.run, *parts))
    return found


def over_seconds(results: Results, points: int = 200) -> pl.DataFrame:
    """Samples of each run's first seed that was watched: run, seconds, then each figure c as c, c_low and c_high."""
    figures = (*OF_GPU, *OF_PROCESS)
    parts = []
    for run in results.study.runs:
        own = results.device.filter(pl.col("run") == run)
        if own.is_empty():
            continue
        rows = own.filter(pl.col("seed") == own["seed"][0]).sort("seconds")
        ends = [pl.col(c).alias(f"{c}{end}") for c in figures for end in ("", "_low", "_high")]
        parts.append(thinned(rows, points).select("run", "seconds", *ends))
    return pl.concat(parts) if parts else pl.DataFrame()


def throttled(results: Results, run: str) -> str:
    """That the run's GPU was slowed down because it was hot, in a sentence; nothing where it was not."""
    done = [one.metrics for one in results.of(run) if one.state == "complete"]
    shares = [one["thermal_throttle_share"] for one in done if one.get("thermal_throttle_share") is not None]
    if not any(shares):
        return ""
    hottest = max(
        (one["temperature_celsius_max"] for one in done if one.get("temperature_celsius_max")), default=None
    )
    at = f", at up to {number(hottest, 3)} °C" if hottest else ""
    return (
        f"{run}: the GPU slowed its clocks because it was hot in {100 * sum(shares) / len(shares):.1f} % of the "
        f"samples{at}, so its times are longer than a cool one's; {of_seeds(len(shares))}."
    )


def capped(results: Results, run: str) -> str:
    """That the run's GPU was at its power limit for most of the time, in a sentence; nothing where it was not."""
    done = [one.metrics for one in results.of(run) if one.state == "complete"]
    shares = [one["power_cap_share"] for one in done if one.get("power_cap_share") is not None]
    if not shares or sum(shares) / len(shares) < CAPPED:
        return ""
    clocks = [[one[key] for one in done if one.get(key)] for key in ("sm_clock_mhz_mean", "sm_clock_mhz_max")]
    at = ""
    if all(clocks):
        at = f", at {number(sum(clocks[0]) / len(clocks[0]))} MHz in the mean, {number(max(clocks[1]))} at most"
    return (
        f"{run}: the GPU was at its power limit, which lowers its clocks, in {100 * sum(shares) / len(shares):.1f} % "
        f"of the samples{at}; {of_seeds(len(shares))}."
    )
