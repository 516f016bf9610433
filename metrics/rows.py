"""Reads what the runs of one study left in its results directory, into frames and small dataclasses.

The only reader of result files. Must not compute a metric, and must not let a number of an unfinished run
out: such a run is listed with its state and the reason, nothing else. What files must be is in `metrics.checks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from metrics import checks, columns, files
from metrics.checks import ResultsError
from metrics.measures import AXES

# Keys of study.json that are kept as they are there.
KEPT = ("hypothesis", "budget", "margin", "grid", "chosen_from", "to_beat")


@dataclass(frozen=True)
class Study:
    """What the plan stage wrote down about the study."""

    name: str
    question: str
    baseline: str
    metric: str
    seeds: tuple[int, ...]
    dataset: str
    runs: dict[str, dict[str, Any]]  # run -> setting -> value, differences from the base only
    base: dict[str, Any]
    axis: str = "tokens"  # of metrics.measures.AXES: what every run has equally much of
    frozen: tuple[str, ...] = ()  # settings that no run may change
    scaling: dict[str, dict[str, str]] = field(default_factory=dict)  # run -> its reference and the kind
    criteria: tuple[dict[str, Any], ...] = ()  # run, measure, at_least, at_most
    hypothesis: str = ""
    falsified_by: dict[str, Any] = field(default_factory=dict)  # says, and when: a list of conditions
    budget: int = 0  # of the axis, for each run; 0: not said
    margin: float = 0.0  # smaller differences in the metric would change no choice; 0: not said
    grid: dict[str, Any] = field(default_factory=dict)  # of metrics.grids
    chosen_from: dict[str, Any] = field(default_factory=dict)  # study, metric, seeds that chose the runs
    own_budget: tuple[str, ...] = ()  # runs that are given another amount of the axis on purpose
    perplexity_at: tuple[int, ...] = ()  # steps done
    targets: tuple[float, ...] = ()  # validation losses, the time to which is asked
    left_out: tuple[str, ...] = ()  # runs of the study that `only` does not choose
    to_beat: dict[str, Any] = field(
        default_factory=dict
    )  # measure, value, says, not_comparable: from outside

    @property
    def follows_course(self) -> bool:
        """Whether it asks for the tables of how its runs got where they are."""
        return bool(self.perplexity_at or self.targets)


@dataclass(frozen=True)
class RunSeed:
    """One run and seed. Everything after `reason` is empty unless the state is 'complete'."""

    run: str
    seed: int
    state: str  # complete, missing, incomplete, failed, diverged
    reason: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    ledger: tuple[dict[str, Any], ...] = ()
    events: tuple[dict[str, Any], ...] = ()
    env: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    samples: tuple[dict[str, Any], ...] = ()  # step, prompt, text: what the model wrote
    scaling: dict[str, Any] = field(default_factory=dict)  # scaling.json, where its steps were probed
    latency: tuple[
        dict[str, float], ...
    ] = ()  # of latency.json: figures of each length, where it was measured

    @property
    def labelled(self) -> bool:
        """Whether it chooses: a classifier among classes, a model of dialogues among replies."""
        return _labelled(self.metrics)

    @property
    def prunes(self) -> bool:
        """Whether it sets weights to zero while it trains."""
        return self.config.get("pruning", "none") != "none"

    @property
    def starts(self) -> tuple[int, ...]:
        """The steps that were done where the training began again."""
        return tuple(event["step"] for event in self.events if event.get("event") == "resumed")


@dataclass(frozen=True)
class Results:
    """A study with all its runs and seeds, in the study's order.

    Frames hold complete runs only: `steps` (run, seed, columns.STEP_COLUMNS, peak_memory_gib, activation_norm_*,
    gradient_norm_*), `evals` (run, seed, columns.EVAL_COLUMNS, and of classifiers val_accuracy); and of runs that
    measured it `noise` (run, seed, columns.NOISE_COLUMNS), `attention` (run, seed, columns.ATTENTION_COLUMNS and
    those of more layers), `device` (run, seed, columns.DEVICE_COLUMNS) and, of runs that prune, `sparsity` (run,
    seed, columns.SPARSITY_COLUMNS).
    """

    study: Study
    runs: tuple[RunSeed, ...]
    steps: pl.DataFrame
    evals: pl.DataFrame
    noise: pl.DataFrame = field(default_factory=lambda: _concat([], columns.NOISE_COLUMNS))
    attention: pl.DataFrame = field(default_factory=lambda: _concat([], columns.COUNT_COLUMNS))
    device: pl.DataFrame = field(default_factory=lambda: _concat([], columns.DEVICE_COLUMNS))
    sparsity: pl.DataFrame = field(default_factory=lambda: _concat([], columns.SPARSITY_COLUMNS))

    def of(self, run: str) -> tuple[RunSeed, ...]:
        """The run's seeds, complete or not."""
        return tuple(one for one in self.runs if one.run == run)

    @property
    def labelled(self) -> bool:
        """Whether its runs choose."""
        return any(one.labelled for one in self.runs)


def read(directory: Path) -> Results:
    """All results of one study, from `results/<study>`.

    Raises:
        ResultsError: no such study, or a malformed file, which it names.
    """
    plan = directory / "configs" / "study.json"
    if not plan.is_file():
        raise ResultsError(f"{plan} is missing: there are no results here yet. Run `dvc repro` first.")
    study = _study(plan)
    runs = tuple(_run_seed(directory, study.name, run, seed) for run in study.runs for seed in study.seeds)
    done = [one for one in runs if one.state == "complete"]

    def table(
        name: str, wanted: tuple[str, ...], of: list[RunSeed], empty: tuple[str, ...] = ()
    ) -> pl.DataFrame:
        return _concat([_rows(directory, one, name, wanted) for one in of], empty or wanted)

    def asked(setting: str) -> list[RunSeed]:
        return [one for one in done if one.config.get(setting)]

    evals = [
        _rows(
            directory,
            one,
            "evals.csv",
            columns.LABELLED_EVAL_COLUMNS if one.labelled else columns.EVAL_COLUMNS,
        )
        for one in done
    ]
    return Results(
        study,
        runs,
        table("steps.csv", columns.STEP_COLUMNS, done),
        _concat(evals, columns.EVAL_COLUMNS),
        table("noise_scale.csv", columns.NOISE_COLUMNS, asked("noise_scale_interval")),
        table(
            "attention.csv", columns.ATTENTION_COLUMNS, asked("attention_sequences"), columns.COUNT_COLUMNS
        ),
        table("device.csv", columns.DEVICE_COLUMNS, asked("monitor_interval")),
        table("sparsity.csv", columns.SPARSITY_COLUMNS, [one for one in done if one.prunes]),
    )


def _labelled(metrics: dict[str, Any]) -> bool:
    return any(key in metrics for key in ("classes", "choices"))


def _study(path: Path) -> Study:
    raw = files.json_object(path)
    keys = ("study", "question", "baseline", "metric", "seeds", "dataset", "runs", "base")
    if absent := [key for key in keys if key not in raw]:
        raise ResultsError(f"{path} lacks {', '.join(absent)}: run the plan stage again (`dvc repro plan`).")
    if raw["baseline"] not in raw["runs"]:
        runs = ", ".join(raw["runs"])
        raise ResultsError(f"{path}: the baseline {raw['baseline']!r} is not one of its runs: {runs}")
    axis = raw.get("axis", "tokens")
    if axis not in AXES:
        raise ResultsError(f"{path}: axis must be one of {', '.join(AXES)}, got {axis!r}")
    values = {key: raw[key] for key in keys if key not in ("study", "seeds")}
    more = {"scaling": raw.get("scaling", {}), "criteria": tuple(raw.get("criteria", ()))}
    more |= {key: raw[key] for key in KEPT if key in raw}
    more |= {key: tuple(raw.get(key, ())) for key in ("own_budget", "perplexity_at", "targets", "left_out")}
    against = raw.get("falsified_by") or {}
    more["falsified_by"] = {"says": against} if isinstance(against, str) else against
    frozen = tuple(raw.get("frozen", ()))
    return Study(name=raw["study"], seeds=tuple(raw["seeds"]), axis=axis, frozen=frozen, **values, **more)


def _run_seed(directory: Path, study: str, run: str, seed: int) -> RunSeed:
    home = directory / f"{run}-{seed}"
    if not home.is_dir():
        return RunSeed(run, seed, "missing", "has not run")
    if not (home / "metrics.json").is_file():
        return RunSeed(run, seed, "incomplete", "interrupted or still running (no metrics.json)")
    metrics = files.json_object(home / "metrics.json")
    expected = {"study": study, "run": run, "seed": seed}
    checks.require_identity(home / "metrics.json", metrics, expected)
    plan = directory / "configs" / f"{run}-{seed}.toml"
    if not checks.is_of(plan, metrics):
        reason = f"its results are of other settings than {plan} has: run it again (`dvc repro`)"
        return RunSeed(run, seed, "incomplete", reason)
    status = metrics.get("status")
    if status != "complete":
        state = status if status in ("failed", "diverged") else "incomplete"
        reason = metrics.get("reason") or metrics.get("error") or f"its status is {status!r}"
        return RunSeed(
            run,
            seed,
            state,
            f"at step {metrics.get('step')}: {reason}" if state == "diverged" else str(reason),
        )
    labelled = _labelled(metrics)
    checks.require_numbers(
        home / "metrics.json", metrics, columns.LABELLED_METRIC_KEYS if labelled else columns.METRIC_KEYS
    )
    checks.require_budgets(home / "metrics.json", metrics)
    mine = {key: metrics[key] for key in (*expected, "config_sha256") if key in metrics}
    test = _test(directory / "test" / f"{run}-{seed}.json", mine, labelled)
    config = files.config(home / "config.toml")
    checks.require_identity(home / "config.toml", config, expected)
    ledger = files.ledger(home / "ledger.json")
    return RunSeed(
        run,
        seed,
        "complete",
        metrics=metrics,
        test=test,
        ledger=ledger,
        events=files.events(home / "events.jsonl"),
        env=files.json_object(home / "env.json"),
        config=config,
        samples=files.samples(home / "samples.jsonl"),
        scaling=files.scaling(home / "scaling.json", config),
        latency=files.latency(home / "latency.json", config, ledger),
    )


def _test(path: Path, mine: dict[str, Any], labelled: bool) -> dict[str, Any]:
    """What the model scored on the test split; nothing where nobody scored it, or there is no such split.

    mine: what says whose scores they must be.
    """
    found = files.json_object(path) if path.is_file() else {}
    if found:
        checks.require_identity(path, found, {**mine, "weights": "final"})
    if not found or "reason" in found:  # why nothing was scored: there is no test text
        return {}
    checks.require_numbers(path, found, columns.LABELLED_TEST_KEYS if labelled else columns.TEST_KEYS)
    return found


def _rows(directory: Path, one: RunSeed, name: str, wanted: tuple[str, ...]) -> pl.DataFrame:
    path = directory / f"{one.run}-{one.seed}" / name
    if not path.is_file():
        raise ResultsError(f"{path} is missing although the run is complete: run it again.")
    try:
        frame = pl.read_csv(path, infer_schema=False)
        if absent := [column for column in wanted if column not in frame.columns]:
            raise ResultsError(f"{path} lacks the column {', '.join(absent)}")
        frame = frame.with_columns(pl.col(c).cast(_type(c)) for c in frame.columns)
    except pl.exceptions.PolarsError as error:
        raise ResultsError(f"{path} is not a table of numbers: {error}") from error
    every = wanted is columns.STEP_COLUMNS
    if wanted is not columns.DEVICE_COLUMNS:  # of which a step has many, or none
        checks.require_order(path, frame["step"], every, one.metrics.get("steps") if every else None)
    return frame.select(pl.lit(one.run).alias("run"), pl.lit(one.seed).alias("seed"), pl.all())


def _concat(frames: list[pl.DataFrame], wanted: tuple[str, ...]) -> pl.DataFrame:
    if frames:
        return pl.concat(frames, how="diagonal")  # runs may log the activation norms of different layers
    numbers = {column: _type(column) for column in wanted}
    return pl.DataFrame(schema={"run": pl.String, "seed": pl.Int32, **numbers})


def _type(column: str) -> type[pl.DataType]:
    return pl.Int64 if column in columns.COUNT_COLUMNS else pl.Float64
