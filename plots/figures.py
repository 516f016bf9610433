"""The figures of one study's report, each an SVG with what its caption says. Must not compute a result."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from metrics import attention, devices, gradients
from metrics.epochs import epoch_bars, mean_epochs
from metrics.frames import bars, curves
from metrics.grid_results import grid_frame
from metrics.measures import METRICS, speed
from metrics.scaling import scaling_points
from metrics.summary import Summary
from metrics.trade_offs import natural, trade_offs
from metrics.words import short
from plots import attention_charts, charts, gradient_charts, grid_charts, scaling_charts
from plots.svg import svg

FROM_ZERO = ("test_perplexity",)  # bars, where others are points on an axis that need not start there
BARS = ("peak_memory_gib", "activation_mib")
NORM = "activation_norm_"  # columns of steps.csv, each with the number of its block
MOST_BLOCKS = 4  # more than that: the first, the middle and the last
MOST_PANELS = 12  # charts of blocks' gradient norms, or of layers' attention, one a run
# Steps in one chart: of a run; and of all its runs together, so that many are drawn with fewer steps each.
MOST_POINTS, FEWEST_POINTS, POINTS_OF_ALL = 200, 40, 1500
FRONTIER = (
    "Filled circles: no other run is at least as good in quality, speed and memory, by the means over seeds, and "
    "better in one."
)
NOISE = (
    "Single measurements scatter, and may be negative, which a logarithmic axis leaves out: see the findings."
)
ZEROS = "Counted in the weights, whenever they were ranked and at evaluations; runs that prune nothing are not drawn."
GRID = "Means over seeds; × marks a cell whose runs diverged, a frame the best."
EPOCH = (
    "What one pass over the training rows takes at each run's median step, compiling not counted. Says nothing of "
    "scaling: that is measured in samples a second."
)
ATTENTION = {
    "entropy": "Of a few fixed validation sequences, means over heads and rows.",
    "reciprocity": "Of the scores ⟨q, k⟩ / √d within the window, before the mask and any reciprocal term.",
}
DEVICE = "One seed of each run, sampled while it took its steps: evaluations leave gaps."
SCALING = (
    "Different samples a second, against the declared run in one process; 95 % intervals over paired seeds."
)


@dataclass(frozen=True)
class Figure:
    """A chart's SVG and what is said below it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Drawn:
    """A chart, what it is called in files and on the page, and what is said below it."""

    name: str
    title: str
    chart: charts.Chart
    caption: str = ""


def comparisons(summary: Summary) -> list[Figure]:
    """The study's metric, the costs, and the trade-off between them, where there is something to show."""
    return _figures("bar", _comparisons(summary), summary)


def of_scaling(summary: Summary) -> list[Figure]:
    """Speedup and efficiency over processes, where the study declares and has measured any."""
    return _figures("scaling", _scaling(summary), summary)


def over_steps(summary: Summary) -> list[Figure]:
    """Accuracy over epochs; losses, learning rate and norms over steps, where there is something to show."""
    return _figures("curve", _curves(summary), summary)


def every(summary: Summary) -> dict[str, Drawn]:
    """All charts of the report, by name."""
    drawn = [*_comparisons(summary), *_scaling(summary), *_curves(summary)]
    return {one.name: one for one in drawn}


def picture(one: Drawn, prefix: str, summary: Summary) -> str:
    """The SVG of a chart; `prefix` keeps its ids apart from others'."""
    return svg(one.chart, prefix, f"Chart: {one.title}, of {', '.join(run.run for run in summary.complete)}")


def _figures(prefix: str, drawn: list[Drawn], summary: Summary) -> list[Figure]:
    return [Figure(picture(one, f"{prefix}{place}", summary), one.caption) for place, one in enumerate(drawn)]


def _comparisons(summary: Summary) -> list[Drawn]:
    metric, runs = summary.metric, list(summary.results.study.runs)
    left_out = _left_out(summary)
    drawn = []
    pace = speed(summary.labelled)
    # A loss is commonly told as perplexity, whose runs all have the same tokens: a study's data are not a run's.
    for name in dict.fromkeys((summary.results.study.metric, natural(summary), pace, *BARS)):
        frame, one = bars(summary, (name,)), summary.measure(name)
        if not frame.is_empty():
            draw = charts.costs if one.cost or name in FROM_ZERO else charts.intervals
            title = f"{_capital(one.label)}, mean and 95 % interval"
            chart = draw(frame, title, _better(one.axis, one.better), runs)
            drawn.append(Drawn(name, title, chart, left_out))
            left_out = ""  # said once
    seconds = epoch_bars(summary) if summary.labelled else pl.DataFrame()
    if not seconds.is_empty():
        title = "Time of an epoch at the median step, 95 % interval"
        axis = _better("seconds of training", "lower")
        drawn.append(Drawn("epoch_seconds", title, charts.costs(seconds, title, axis, runs), EPOCH))
    drawn += _grids(summary)
    frame = trade_offs(summary)
    if frame.height > 1:
        title = f"{_capital(metric.label)}, speed and memory"
        axes = (_better(METRICS[pace].axis, METRICS[pace].better), _better(metric.axis, metric.better))
        area = "Area of a circle: peak memory. " if frame["memory"].null_count() == 0 else ""
        chart = charts.trade_off(frame, title, axes, runs)
        drawn.append(Drawn("trade_off", title, chart, f"{area}{FRONTIER}"))
    return [*drawn, *_perplexity_and_time(summary)]


def _perplexity_and_time(summary: Summary) -> list[Drawn]:
    """Perplexity × training time × memory, of a study on text that follows the course of its runs."""
    frame = trade_offs(summary, "test_perplexity", "train_seconds")
    if not summary.results.study.follows_course or frame.height < 2:  # noqa: PLR2004
        return []
    quality, time = METRICS["test_perplexity"], METRICS["train_seconds"]
    title = "Perplexity, training time and memory"
    axes = (_better(f"{time.axis}, with compiling", time.better), _better(quality.axis, quality.better))
    area = "Area of a circle: peak memory. " if frame["memory"].null_count() == 0 else ""
    chart = charts.trade_off(frame, title, axes, list(summary.results.study.runs))
    caption = f"{area}{FRONTIER.replace('quality, speed', 'perplexity, time')}"
    return [Drawn("perplexity_time", title, chart, caption)]


def _grids(summary: Summary) -> list[Drawn]:
    """A heat map a grid, of the study's metric."""
    frame, metric = grid_frame(summary), summary.metric
    drawn = []
    for name in frame["grid"].unique(maintain_order=True):
        own = frame.filter(pl.col("grid") == name)
        axes = " × ".join(axis for axis in (own["x_axis"][0], own["y_axis"][0]) if axis)
        title = f"{_capital(metric.label)}: {axes}, {name}"
        chart = grid_charts.heat_map(own, title, metric.axis, higher=metric.better == "higher")
        drawn.append(Drawn(f"grid_{name}", title, chart, GRID))
    return drawn


def _scaling(summary: Summary) -> list[Drawn]:
    runs = list(summary.results.study.runs)
    drawn = []
    for name, unit, draw in (
        ("speedup", "×", scaling_charts.speedup),
        ("efficiency", "%", scaling_charts.efficiency),
    ):
        frame = scaling_points(summary, efficiency=name == "efficiency")
        if not frame.is_empty():
            title = f"{_capital(name)} over processes"
            chart = draw(frame, title, _better(f"{name} ({unit})", "higher"), runs)
            drawn.append(Drawn(name, title, chart, SCALING))
    return drawn


def _better(axis: str, better: str) -> str:
    return f"{axis}, {better} is better"


def _left_out(summary: Summary) -> str:
    """Which runs are not drawn, and for which of two reasons: a budget of its own makes no run a wrong one."""
    aside = [run for run in summary.complete if run not in summary.comparable]
    own = [run.run for run in aside if run.status == "own budget"]
    others = [run.run for run in aside if run.run not in own]
    said = [f"Not drawn, since not comparable: {', '.join(others)}."] * bool(others)
    said += [f"Not drawn, for a budget of its own: {', '.join(own)}."] * bool(own)
    return " ".join(said)


def _curves(summary: Summary) -> list[Drawn]:
    results, runs = summary.results, list(summary.results.study.runs)
    points = max(FEWEST_POINTS, min(MOST_POINTS, POINTS_OF_ALL // max(len(summary.complete), 1)))
    norms = [name for name in results.steps.columns if name.startswith(NORM)]
    shown = sorted(norms, key=lambda name: int(name.removeprefix(NORM)))
    if len(shown) > MOST_BLOCKS:
        shown = [shown[0], shown[len(shown) // 2], shown[-1]]
    training = curves(results, results.steps, ("train_loss", "lr", "grad_norm", *shown), points)
    validation = curves(results, results.evals, ("val_loss",), points)
    nats = f"loss ({summary.measure('val_loss').unit})"
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
    drawn = [
        Drawn(
            name,
            title,
            charts.curve(frame, name, title, axis, runs, **how),
            left_out if name in norms else "",
        )
        for frame, name, title, axis, how in asked
        if _has_values(frame, name)
    ]
    return [*_accuracy(summary), *drawn, *_sparsity(summary, points), *_gradients(summary, points)]


def _sparsity(summary: Summary, points: int) -> list[Drawn]:
    """The share of zeros over steps, of runs that prune."""
    if summary.results.sparsity.is_empty():
        return []
    frame = curves(summary.results, summary.results.sparsity, ("sparsity",), points)
    title, axis = "Sparsity of the prunable weights", "share that is zero"
    chart = charts.curve(frame, "sparsity", title, axis, list(summary.results.study.runs), points=True)
    return [Drawn("sparsity", title, chart, ZEROS)]


def _gradients(summary: Summary, points: int) -> list[Drawn]:
    """Gradient norms of blocks: how far apart they are, of all runs; and each run's own, on one scale."""
    results, runs = summary.results, list(summary.results.study.runs)
    drawn = []
    if gradients.blocks(results):
        spread = curves(results, gradients.with_spread(results), (gradients.SPREAD,), points)
        if _has_values(spread, gradients.SPREAD):
            title, axis = "Gradient norms of blocks: largest over smallest", "ratio of norms"
            chart = charts.curve(spread, gradients.SPREAD, title, axis, runs, log=True)
            drawn.append(Drawn(gradients.SPREAD, title, chart))
    frame = gradients.block_norms(results, points)
    positive = frame.filter(pl.col("gradient_norm") > 0)
    shown = [run for run in runs if run in set(positive["run"])]
    for run in shown[:MOST_PANELS]:
        title = f"Gradient norms of blocks: {short(run)}"
        own = frame.filter(pl.col("run") == run)
        chart = gradient_charts.blocks(own, title, gradient_charts.domain(positive))
        left_out = f"Of {len(shown)} runs these are {MOST_PANELS}." if len(shown) > MOST_PANELS else ""
        drawn.append(Drawn(f"gradient_norms_{run}", title, chart, left_out))
    return [*drawn, *_noise(summary, points), *_attention(summary, points), *_device(summary, points)]


def _attention(summary: Summary, points: int) -> list[Drawn]:
    """Entropy and reciprocity of attention: means over layers of all runs, and each run's layers on one scale."""
    results, runs = summary.results, list(summary.results.study.runs)
    drawn, means = [], attention.over_layers(results, points)
    for what, axis in (("entropy", "entropy (nats)"), ("reciprocity", "correlation of S_ij and S_ji")):
        frame = attention.by_layer(results, what, points)
        if frame.is_empty():
            continue
        title = f"{_capital(what)} of attention"
        chart = charts.curve(means, what, f"{title}, mean over layers", axis, runs, points=True)
        drawn.append(Drawn(f"attention_{what}", f"{title}, mean over layers", chart, ATTENTION[what]))
        shown = [run for run in runs if run in set(frame["run"])]
        for run in attention.of_each_form(results, shown, MOST_PANELS):
            own, limits = frame.filter(pl.col("run") == run), attention_charts.domain(frame)
            chart = attention_charts.layers(own, f"{title}: {short(run)}", axis, limits)
            left_out = f"Of {len(shown)} runs these are {MOST_PANELS}." if len(shown) > MOST_PANELS else ""
            drawn.append(Drawn(f"attention_{what}_{run}", f"{title}: {short(run)}", chart, left_out))
    return drawn


def _device(summary: Summary, points: int) -> list[Drawn]:
    """What the machine did over the seconds of training; of the process only where nothing is known of a GPU."""
    frame, drawn = devices.over_seconds(summary.results, points), []
    if frame.is_empty():
        return []
    kinds = [
        {name: axis for name, axis in kind.items() if _has_values(frame, name)}
        for kind in (devices.OF_GPU, devices.OF_PROCESS)
    ]
    for name, axis in (kinds[0] or kinds[1]).items():
        title = _capital(axis.rpartition(" (")[0])
        chart = charts.curve(frame, name, title, axis, list(summary.results.study.runs), x="seconds")
        drawn.append(Drawn(f"device_{name}", title, chart, DEVICE))
    return drawn


def _noise(summary: Summary, points: int) -> list[Drawn]:
    """The gradient noise scale over steps."""
    results, runs = summary.results, list(summary.results.study.runs)
    if results.noise.is_empty():
        return []
    frame = curves(results, results.noise, ("noise_scale", "coherence"), points)
    drawn = []
    for name, title, axis, log in (
        ("noise_scale", "Gradient noise scale", "noise scale (sequences)", True),
        ("coherence", "Coherence of micro-batch gradients", "coherence", False),
    ):
        if _has_values(frame, name):
            chart = charts.curve(frame, name, title, axis, runs, log=log, points=True)
            drawn.append(Drawn(name, title, chart, NOISE if log else ""))
    return drawn


def _accuracy(summary: Summary) -> list[Drawn]:
    """Validation accuracy in percent, over epochs where the runs say how long one is."""
    if not summary.labelled:
        return []
    name, metric = "val_accuracy", METRICS["val_accuracy"]
    frame = mean_epochs(summary.results)
    if not _has_values(frame, name):
        return []
    frame = frame.with_columns(pl.col(c) * metric.factor for c in (name, f"{name}_low", f"{name}_high"))
    x = "epoch" if frame["epoch"].null_count() == 0 else "step"
    title, runs = _capital(metric.label), list(summary.results.study.runs)
    return [Drawn(name, title, charts.curve(frame, name, title, metric.axis, runs, x=x, points=True))]


def _has_values(frame: pl.DataFrame, name: str) -> bool:
    return not frame.filter(pl.col(name).is_finite()).is_empty()


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
