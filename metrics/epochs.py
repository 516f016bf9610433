"""The course of a training, a row an evaluation: epoch, training loss and seconds since the one before, validation.

Frames only. An epoch is samples seen over those there are, never a time. Seconds are without compiling, which
would be most of a short run. Must not read or write files.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import polars as pl

from metrics import statistics
from metrics.counting import COUNTS, with_counts
from metrics.measures import distinct_share
from metrics.rows import Results, RunSeed
from metrics.summary import Summary
from metrics.words import short, with_interval

COLUMNS = (
    "epoch",  # different samples seen / samples of an epoch; null where the run does not say
    "train_loss",  # mean over the steps since the evaluation before
    "seconds",  # of training in those steps, each as long as the run's steady one; evaluating is not in it
    "seconds_total",  # of training up to here
    "val_loss",
    "val_accuracy",  # share; null of a language model
    "val_lm_loss",  # of replies, and of the choice among them; null where there are none
    "val_mc_loss",
    "eval_train_loss",  # of training rows that were scored as those of validation; null where none were
    "eval_train_accuracy",
)
OPTIONAL = COLUMNS[COLUMNS.index("val_accuracy") :]  # of evals.csv
WARM_UP_STEPS = 3  # the first of a run: they compile. As in engine.probes, which a test compares


def epochs(results: Results) -> pl.DataFrame:
    """Columns run, seed, step, tokens_seen, COLUMNS, counts, best: a row an evaluation of each complete run and seed.

    step: from 0. counts: of `metrics.counting`. best: "yes" at the evaluation that `best_by` finds best among those
    that count, the first of equals.
    """
    evals, steps = by_seed(results.evals), by_seed(results.steps)
    parts = [
        _of_seed(one, evals[one.run, one.seed], steps[one.run, one.seed])
        for one in results.runs
        if one.state == "complete" and (one.run, one.seed) in evals
    ]
    words = {"run": pl.String, "seed": pl.Int32, "step": pl.Int64, "tokens_seen": pl.Int64}
    schema = words | dict.fromkeys(COLUMNS, pl.Float64) | {COUNTS: pl.Boolean}
    frame = pl.concat(parts) if parts else pl.DataFrame(schema=schema)
    return _marked(frame.select(*schema), results, ("run", "seed"))


def mean_epochs(results: Results, frame: pl.DataFrame | None = None) -> pl.DataFrame:
    """The same over the seeds of a run: mean, and lowest and highest seed (COLUMNS, each also _low and _high).

    Only evaluations that every complete seed of the run has; one counts where it does in each.
    """
    frame = epochs(results) if frame is None else frame
    seeds = frame.group_by("run").agg(pl.col("seed").n_unique().alias("all"))
    stats = [pl.col(c).mean() for c in COLUMNS]
    stats += [pl.col(c).min().alias(f"{c}_low") for c in COLUMNS]
    stats += [pl.col(c).max().alias(f"{c}_high") for c in COLUMNS]
    mean = frame.group_by("run", "step", maintain_order=True).agg(
        pl.len().alias("seeds"), pl.col("tokens_seen").first(), *stats, pl.col(COUNTS).all()
    )
    mean = mean.join(seeds, on="run", maintain_order="left").filter(pl.col("seeds") == pl.col("all"))
    return _marked(mean.drop("seeds", "all"), results, ("run",))


def csv_frame(results: Results) -> pl.DataFrame:
    """Every seed's rows and, of each run, their mean (seed "mean"), without columns that no run has."""
    each = epochs(results)
    mean = mean_epochs(results, each).with_columns(pl.lit("mean").alias("seed")).select(*each.columns)
    whole = pl.concat([each.with_columns(pl.col("seed").cast(pl.String)), mean])
    whole = pl.concat([whole.filter(pl.col("run") == run) for run in results.study.runs]).drop(COUNTS)
    return whole.select(
        c for c in whole.columns if c in ("run", "seed") or whole[c].null_count() < whole.height
    )


def best_by(results: Results) -> str:
    """The column that says which evaluation is best: accuracy, where there is one."""
    return "val_accuracy" if results.labelled else "val_loss"


def epoch_seconds(results: Results) -> dict[str, dict[int, float]]:
    """run -> seed -> seconds of training for one epoch, at the run's steady step; empty where none is known."""
    last = epochs(results).group_by("run", "seed", maintain_order=True).last()
    found: dict[str, dict[int, float]] = {run: {} for run in results.study.runs}
    for row in last.filter(pl.col("epoch") > 0).to_dicts():
        found[row["run"]][row["seed"]] = row["seconds_total"] / row["epoch"]
    return found


def epoch_bars(summary: Summary) -> pl.DataFrame:
    """Columns run, label, value, low, high: seconds of training for one epoch, for runs whose costs compare."""
    seconds = epoch_seconds(summary.results)
    rows = []
    for run in summary.comparable:
        if seconds[run.run] and not run.costs_not_comparable:
            one = statistics.mean_interval(list(seconds[run.run].values()))
            rows.append((run.run, f"{short(run.run)}: {with_interval(one)}", one.mean, *one.ends(least=0.0)))
    words = dict.fromkeys(("run", "label"), pl.String)
    return pl.DataFrame(
        rows, schema=words | dict.fromkeys(("value", "low", "high"), pl.Float64), orient="row"
    )


def by_seed(frame: pl.DataFrame) -> dict[tuple[str, int], pl.DataFrame]:
    """(run, seed) -> its rows of the frame by step; nothing for one that has none."""
    parts = frame.sort("step").partition_by("run", "seed", as_dict=True)
    return {(str(run), int(seed)): rows for (run, seed), rows in parts.items()}


def steady_seconds(steps: pl.DataFrame) -> float:
    """Of a run-seed's rows of steps.csv: the median step, without the warm-up steps where there are more."""
    seconds = steps.sort("step")["step_seconds"]
    return float((seconds[WARM_UP_STEPS:] if len(seconds) > WARM_UP_STEPS else seconds).median() or 0.0)


def seconds_so_far(steps: pl.DataFrame, starts: tuple[int, ...] = ()) -> list[float]:
    """Seconds of training up to each row's step and with it, the first steps, which compile, as long as the median.

    steps: of one run and seed, by step. starts: the steps that were done wherever the training began again, which
    compiles as well.
    """
    steady = steady_seconds(steps)
    compiling = {place for start in (0, *starts) for place in range(start, start + WARM_UP_STEPS)}
    seconds = enumerate(steps["step_seconds"].to_list())
    return list(accumulate(steady if place in compiling else own for place, own in seconds))


def seconds_until(steps: pl.DataFrame, step: int, starts: tuple[int, ...] = ()) -> float:
    """The same up to one step and with it; 0 before the first."""
    steps = steps.sort("step")
    done = steps["step"].search_sorted(step, side="right")
    return seconds_so_far(steps, starts)[done - 1] if done else 0.0


def _of_seed(one: RunSeed, evals: pl.DataFrame, steps: pl.DataFrame) -> pl.DataFrame:
    """The rows of one run and seed; frames by step."""
    absent = [name for name in OPTIONAL if name not in evals.columns]
    evals = evals.with_columns(pl.lit(None, pl.Float64).alias(name) for name in absent)
    losses, steady = steps["train_loss"].to_list(), steady_seconds(steps)
    rows = []
    for start, end in pairwise([0, *steps["step"].search_sorted(evals["step"], side="right")]):
        known = [loss for loss in losses[start:end] if loss is not None]
        # Summed one after another: in a fixed order, the same figures every time.
        rows.append((sum(known) / len(known) if known else None, (end - start) * steady))
    types = {"train_loss": pl.Float64, "seconds": pl.Float64}
    frame = pl.concat([evals, pl.DataFrame(rows, schema=types, orient="row")], how="horizontal")
    return (
        with_counts(one, frame)
        .with_columns(
            (pl.col("tokens_seen") * pl.lit(_epochs_per_token(one), pl.Float64)).alias("epoch"),
            pl.col("seconds").cum_sum().alias("seconds_total"),
        )
        .select("run", "seed", "step", "tokens_seen", *COLUMNS, COUNTS)
    )


def _epochs_per_token(one: RunSeed) -> float | None:
    """Of different samples: reading one twice in a step is no progress through an epoch."""
    samples, epoch = one.metrics.get("samples"), one.metrics.get("samples_per_epoch")
    if not samples or not epoch or not one.metrics.get("tokens"):
        return None
    return samples * distinct_share(one) / one.metrics["tokens"] / epoch


def _marked(frame: pl.DataFrame, results: Results, by: tuple[str, ...]) -> pl.DataFrame:
    """With the column best."""
    name = best_by(results)
    finite = pl.when(pl.col(name).is_finite() & pl.col(COUNTS)).then(pl.col(name))
    best = finite.max() if name == "val_accuracy" else finite.min()
    there = (finite == best.over(by)).fill_null(False)
    first = there & (there.cast(pl.Int32).cum_sum().over(by) == 1)
    return frame.with_columns(pl.when(first).then(pl.lit("yes")).otherwise(pl.lit("no")).alias("best"))
