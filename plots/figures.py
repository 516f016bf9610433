"""The figures of one study's report, each an SVG with what its caption says. Must not compute a result."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from metrics.frames import bars, curves
from metrics.measures import METRICS
from metrics.summary import Summary
from metrics.trade_offs import trade_offs
from plots import charts
from plots.svg import svg

BARS = ("tokens_per_second", "peak_memory_gib", "activation_mib")
NORM = "activation_norm_"  # columns of steps.csv, each with the number of its block
MOST_BLOCKS = 4  # more than that: the first, the middle and the last
POINTS = 4000  # of all runs in one chart: many runs are drawn with fewer steps each
FRONTIER = (
    "Filled circles: no other run is at least as good in quality, speed and memory, by the means over seeds, and "
    "better in one."
)


@dataclass(frozen=True)
class Figure:
    """A chart's SVG and what is said below it."""

    svg: str
    caption: str


Drawn = tuple[str, charts.Chart, str]  # title, chart, caption


def comparisons(summary: Summary) -> list[Figure]:
    """The study's metric, the costs, and the trade-off between them, where there is something to show."""
    return _figures("bar", _comparisons(summary), summary)


def over_steps(summary: Summary) -> list[Figure]:
    """Losses, learning rate and norms over steps, where there is something to show."""
    return _figures("curve", _curves(summary), summary)


def _figures(prefix: str, drawn: list[Drawn], summary: Summary) -> list[Figure]:
    names = ", ".join(run.run for run in summary.complete)
    return [
        Figure(svg(chart, f"{prefix}{place}", f"Chart: {title}, of {names}"), caption)
        for place, (title, chart, caption) in enumerate(drawn)
    ]


def _comparisons(summary: Summary) -> list[Drawn]:
    metric, runs = summary.metric, list(summary.results.study.runs)
    left_out = _left_out(summary)
    drawn = []
    for name in (summary.results.study.metric, *BARS):
        frame, one = bars(summary, (name,)), METRICS[name]
        if not frame.is_empty():
            draw = charts.costs if one.cost else charts.intervals
            title = f"{_capital(one.label)}, mean and 95 % interval"
            drawn.append((title, draw(frame, title, _better(one.axis, one.better), runs), left_out))
            left_out = ""  # said once
    frame = trade_offs(summary)
    if frame.height > 1:
        title = f"{_capital(metric.label)}, speed and memory"
        speed = METRICS["tokens_per_second"]
        axes = (_better(speed.axis, speed.better), _better(metric.axis, metric.better))
        area = "Area of a circle: peak memory. " if frame["memory"].null_count() == 0 else ""
        drawn.append((title, charts.trade_off(frame, title, axes, runs), f"{area}{FRONTIER}"))
    return drawn


def _better(axis: str, better: str) -> str:
    return f"{axis}, {better} is better"


def _left_out(summary: Summary) -> str:
    names = [run.run for run in summary.complete if run not in summary.comparable]
    return f"Not drawn, since not comparable: {', '.join(names)}." if names else ""


def _curves(summary: Summary) -> list[Drawn]:
    results, runs = summary.results, list(summary.results.study.runs)
    points = max(40, min(200, POINTS // max(len(summary.complete), 1)))
    norms = [name for name in results.steps.columns if name.startswith(NORM)]
    shown = sorted(norms, key=lambda name: int(name.removeprefix(NORM)))
    if len(shown) > MOST_BLOCKS:
        shown = [shown[0], shown[len(shown) // 2], shown[-1]]
    training = curves(results, results.steps, ("train_loss", "lr", "grad_norm", *shown), points)
    validation = curves(results, results.evals, ("val_loss",), points)
    nats = "loss (nats/token)"
    asked = [
        (training, "train_loss", "Training loss", f"training {nats}", {}),
        (validation, "val_loss", "Validation loss", f"validation {nats}", {"points": True}),
        (training, "lr", "Learning rate", "learning rate", {}),
        (training, "grad_norm", "Gradient norm", "global gradient norm", {"log": True}),
    ]
    for name in shown:
        block = name.removeprefix(NORM)
        asked.append((training, name, f"Activations after block {block}", "root mean square", {}))
    left_out = f"Of {len(norms)} recorded blocks these are {len(shown)}." if len(shown) < len(norms) else ""
    return [
        (title, charts.curve(frame, name, title, axis, runs, **how), left_out if name in norms else "")
        for frame, name, title, axis, how in asked
        if _has_values(frame, name)
    ]


def _has_values(frame: pl.DataFrame, name: str) -> bool:
    return not frame.filter(pl.col(name).is_finite()).is_empty()


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
