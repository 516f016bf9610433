"""Tables as words: criteria, choices, batches, optimizers, scaling, the course; those that a study has rows for.

Must not compute a result: numbers and sentences come from metrics/.
"""

from __future__ import annotations

from metrics.batches import batches
from metrics.counting import any_prunes
from metrics.criteria import criteria
from metrics.epochs import best_by, mean_epochs
from metrics.measures import COUNTED, METRICS, Metric
from metrics.outside import outside
from metrics.pruning import layers
from metrics.ranking import ranking
from metrics.scaling import PARTS, TOGETHER, Scaling, scalings
from metrics.statistics import Estimate, Ratio
from metrics.summary import RunSummary, Summary
from metrics.words import difference, number, p_value, with_interval

Table = tuple[list[str], list[list[str]]]  # heads, rows of cells
Captioned = tuple[str, Table]

SPEEDUP = (
    "Scaling: different samples a second of all processes together, against a run in one process; 95 % interval over "
    "paired seeds"
)
LOST = "Scaling, where the time goes: % of a step, 95 % interval over seeds; the parts add up to what is lost"
SHARES = ("sparsity", "sparsity_low", "sparsity_high", "target")
BATCHES = (
    "Batch, learning rate and recomputing: samples a step = micro-batch × accumulation × replicas; best of a seed's "
    "evaluations and training time of an epoch, mean over seeds"
)
CRITERIA = "Criteria: what the study set out to reach"
OPTIMIZERS = (
    "Optimizers: weight decay in effect; weights, state and masks over weights; single gradients cut, g² / v before; "
    "mean over seeds"
)
EPOCHS = (  # step → head
    ("step", "steps"),
    ("epoch", "epoch"),
    ("train_loss", METRICS["train_loss"].label),
    ("seconds", "training (s)"),
    ("seconds_total", "so far (s)"),
    ("val_loss", METRICS["val_loss"].label),
    ("val_accuracy", METRICS["val_accuracy"].axis),
    ("val_lm_loss", METRICS["val_lm_loss"].label),
    ("val_mc_loss", METRICS["val_mc_loss"].label),
    ("eval_train_loss", "loss of training rows, as validation's"),
    ("eval_train_accuracy", "accuracy of training rows (%)"),
    ("best", "best"),
)


def ratio_text(ratio: Ratio | None) -> str:
    """`0.78 (0.75–0.81)`: the mean and its interval."""
    if ratio is None:
        return "–"
    mean, low, high = (
        None if v is None else f"{v:.2f}" if v >= 0.1 else number(v, 2)  # noqa: PLR2004
        for v in (ratio.mean, ratio.low, ratio.high)
    )
    return str(mean) if low is None or low == high else f"{mean} ({low}–{high})"


def criteria_tables(summary: Summary) -> list[Captioned]:
    """Run, measure, value, what was wanted, pass or fail: a row a criterion; nothing for a study without any."""
    rows = [[one.run, one.metric.label, one.shown, one.bound, one.result] for one in criteria(summary)]
    return [(CRITERIA, (["run", "measure", "value", "wanted", "result"], rows))] if rows else []


def outside_tables(summary: Summary) -> list[Captioned]:
    """Each run's distance to the figure that the study declares to beat; nothing where it is not comparable."""
    found = outside(summary)
    if not found or not found.comparisons:
        return []
    factor = found.metric.factor
    rows = [
        [
            run,
            with_interval(found.estimates[run].times(factor)),
            difference(one.estimate, found.metric),
            p_value(one.p_holm),
            one.verdict or "no verdict",
        ]
        for run, one in found.comparisons.items()
    ]
    caption = (
        f"To beat: {found.figure}, {found.says}; 95 % interval over seeds, p Holm-adjusted over the runs"
    )
    return [(caption, (["run", found.metric.axis, "difference", "p", "verdict"], rows))]


def batch_tables(summary: Summary) -> list[Captioned]:
    """A row a run: batch, learning rate, checkpointing, best loss and accuracy, time of an epoch.

    Nothing for a study whose runs do not differ in both batch and checkpointing.
    """
    frame = batches(summary)
    if frame.is_empty():
        return []
    best = [name for name in ("best_val_loss", "best_val_accuracy") if frame[name].null_count() < len(frame)]
    heads = ["run", "samples a step", "micro × accumulation × replicas", "peak lr", "checkpointing"]
    heads += [summary.measure(name).axis for name in best] + ["epoch (s)"]
    rows = [
        [
            row["run"],
            f"{row['batch_size']:,}",
            f"{row['micro_batch']} × {row['accumulation']} × {row['replicas']}",
            f"{row['peak_lr']:.4g}",
            row["activation_checkpointing"],
            *(_best(row[name], METRICS[name]) for name in best),
            number(row["epoch_seconds"]),
        ]
        for row in frame.to_dicts()
    ]
    return [(BATCHES, (heads, rows))]


def _best(value: float | None, metric: Metric) -> str:
    return number(None if value is None else value * metric.factor)


def ranking_tables(summary: Summary) -> list[Captioned]:
    """Accuracy of chance, a TF-IDF ranker and each run among the same candidates; nothing where there are none."""
    frame = ranking(summary)
    if frame.is_empty():
        return []
    chance, among_more = frame["accuracy"][0], frame["hits_candidates"][0]
    rows = [
        [
            row["chooser"],
            number(100 * row["accuracy"]),
            "–" if row["low"] is None else f"{100 * row['low']:.2f}–{100 * row['high']:.2f}",
            f"{row['accuracy'] / chance:.2f}",
            *_hits_cells(row, among_more),
        ]
        for row in frame.to_dicts()
    ]
    among = f"{frame['candidates'][0]} replies, {frame['examples'][0]:,} times"
    heads = ["chooser", "accuracy (%)", "binomial interval (%)", "× chance"]
    heads += [f"hits@1 among {among_more} (%)", "binomial interval (%)"] if among_more else []
    caption = f"Choosing the true one of {among}: runs (mean over seeds), and a ranker that only counts words"
    return [(caption, (heads, rows))]


def _hits_cells(row: dict, asked: int | None) -> list[str]:
    """hits@1 and its interval; nothing where it was not asked for."""
    if not asked:
        return []
    if row["hits_at_1"] is None:
        return ["–", "–"]
    ends = "–" if row["hits_low"] is None else f"{100 * row['hits_low']:.2f}–{100 * row['hits_high']:.2f}"
    return [number(100 * row["hits_at_1"]), ends]


def optimizer_tables(summary: Summary) -> list[Captioned]:
    """What each run's optimizer held and counted; nothing for a study in which none counts."""
    counted = [name for name in COUNTED if any(run.estimates[name] for run in summary.runs)]
    if not counted:
        return []
    names = ["optimizer_memory_multiple", *counted]
    decays = {run.run: _weight_decay(summary, run.run) for run in summary.runs}
    shown = any(decays.values())  # results may be older than that line of the ledger
    rows = [
        [run.run, *([decays[run.run] or "–"] if shown else []), *(_mean(run, name) for name in names)]
        for run in summary.runs
    ]
    heads = ["run", *(["weight decay"] if shown else []), *(METRICS[name].axis for name in names)]
    return [(OPTIMIZERS, (heads, rows))]


def _weight_decay(summary: Summary, run: str) -> str:
    """What a run's seeds had in effect, `0.1 of matrices, 0 of vectors`; empty where no ledger says."""
    lines = (line for one in summary.results.of(run) for line in one.ledger if line["what"] == "weight_decay")
    return "; ".join(dict.fromkeys(line["in_effect"] for line in lines))


def _mean(run: RunSummary, name: str) -> str:
    estimate = run.estimates[name]
    return number(estimate.mean * METRICS[name].factor if estimate else None)


def scaling_tables(summary: Summary, wide: bool = False) -> list[Captioned]:
    """Speedup, and where the time goes: two tables, or one where there is room for it. A row a declared pair."""
    found = scalings(summary)
    if not found:
        return []
    speedup, lost = _speedup(found, wide), _lost(found)
    if not wide:
        return [(SPEEDUP, speedup), (LOST, lost)]
    rows = [[*one, *other[1:]] for one, other in zip(speedup[1], lost[1], strict=True)]
    return [(f"{SPEEDUP}. {LOST[len('Scaling, ') :].capitalize()}", ([*speedup[0], *lost[0][1:]], rows))]


def _speedup(found: tuple[Scaling, ...], wide: bool) -> Table:
    heads = ["run", "reference", "kind", "processes", "batch", "samples/s", "speedup", "efficiency (%)"]
    rows = []
    for one in found:
        efficiency = one.efficiency and one.efficiency.times(100)
        measured = ["–"] * 5
        if not one.reason:
            speed = one.samples_per_second
            measured = [str(one.processes), f"{one.batch_size:,}"]
            measured.append(with_interval(speed) if wide else number(speed.mean if speed else None))
            measured += [ratio_text(one.speedup), _percents(efficiency)]
        rows.append([one.run, one.reference, one.kind, *measured])
    return heads, rows


def _percents(ratio: Ratio | None) -> str:
    """`61.2 (58.0–64.5)`."""
    if ratio is None:
        return "–"
    interval = "" if ratio.low is None else f" ({ratio.low:.1f}–{ratio.high:.1f})"
    return f"{ratio.mean:.1f}{interval}"


def _lost(found: tuple[Scaling, ...]) -> Table:
    names = [*PARTS, *([TOGETHER] if any(one.untold for one in found) else [])]
    rows = [[one.run, _share(one.lost), *(_share(one.parts.get(name)) for name in names)] for one in found]
    return ["run", "lost", *names], rows


def _share(estimate: Estimate | None) -> str:
    """In percent, to a tenth: finer is noise."""
    if estimate is None:
        return "–"
    half = estimate.half_width
    mean = f"{100 * estimate.mean:z.1f}"  # z: what is rounded to 0 has no sign
    return mean if half is None else f"{mean} ± {100 * half:.1f}"


def sparsity_tables(summary: Summary) -> dict[str, Table]:
    """run -> a row a prunable tensor, then all together: share that is zero, in percent; of runs that prune."""
    runs = layers(summary.results).partition_by("run", as_dict=True, maintain_order=True)
    return {
        run: (
            ["tensor", "weights", "zero (%)", "lowest seed", "highest seed", "target (%)"],
            [
                [row["tensor"], f"{row['weights']:,}", *(_percent(row[c]) for c in SHARES)]
                for row in own.to_dicts()
            ],
        )
        for (run,), own in runs.items()
    }


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"


def epoch_tables(summary: Summary) -> dict[str, Table]:
    """run -> a row an evaluation, means over seeds, the best marked; columns that the run has."""
    runs = mean_epochs(summary.results).partition_by("run", as_dict=True, maintain_order=True)
    tables = {}
    for run in summary.results.study.runs:
        if (own := runs.get((run,))) is not None:
            columns = [(name, head) for name, head in EPOCHS if own[name].null_count() < own.height]
            rows = [[_epoch_cell(name, row[name]) for name, _ in columns] for row in own.to_dicts()]
            tables[run] = ([head for _, head in columns], rows)
    return tables


def _epoch_cell(name: str, value: float | str | int | None) -> str:
    if name == "best":
        return "best" if value == "yes" else ""
    if name == "step":
        return f"{value + 1:,}"  # done, as everywhere in tables; rows count from 0
    assert not isinstance(value, str)
    if value is not None and name == "epoch":
        return f"{value:.2f}"
    factor = METRICS["val_accuracy"].factor if name.endswith("accuracy") else 1
    return number(None if value is None else value * factor)


def epoch_caption(summary: Summary, run: str) -> str:
    """What a run's epoch table shows, and by what the best row is."""
    by: Metric = METRICS[best_by(summary.results)]
    seeds = len(summary.of(run).complete_seeds)
    sparse = ", at the target sparsity" if any_prunes(summary.results, run) else ""
    means = f"means over {seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"{run}: each evaluation, {means}; training loss since the one before; seconds at the median step, compiling "
        f"not counted; best by {by.label}{sparse}"
    )
