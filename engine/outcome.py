"""What a run leaves at its end: its weights and figures, or that it diverged. `metrics.json` is written last."""

import torch

from engine import compiling, guards, latency, lengths, parallel, probes, rundir, scaling, vocabulary
from engine.evaluate import evaluated
from engine.guards import Diverged
from engine.optimizers import counters, observe


def diverged(run, end: Diverged) -> None:
    """Write what `run`, a Trainer, leaves if a guard stopped it: rows until then, no model and no other figures."""
    run.write_ledger()
    if run.ranks.is_first:
        run.recorder.flush()
        run.monitor.write(run.directory, end.step)
        run.write_beside()
        for table in (run.recorder.table, run.evaluations.table):
            table.cut(end.step)
        for beside in run.beside:
            beside.cut(run.directory, end.step)
        rundir.cut_samples(run.directory, end.step)
        run.best.discard(run.directory)
        outcome = {"step": end.step, "reason": end.reason}
        rundir.append_event(run.directory, "diverged", **outcome)
        counts = guards.counts(run.step.guard, run.step.loss_scale)
        metrics = {"status": "diverged", **run.identity, **outcome, **counts}
        rundir.write_json(run.directory / "metrics.json", metrics)
        probes.progress_line(event="diverged", **outcome)
    run.checkpoints.discard()
    parallel.wait_for_all()  # no rank ends, and has the others stopped, before this is written


def complete(run) -> None:
    """Write what `run`, a Trainer that took all its steps, leaves."""
    drawn = run.shards.prove(run.steps_taken)
    run.write_ledger()
    data_order = run.shards.drawn.digest(drawn, run.tokens.sha256("train"))
    with run.average.in_place():
        _save_model(run)
        run.sparsity.finish()
    if run.ranks.is_first:
        run.monitor.write(run.directory)
        run.write_beside()
        metrics = _summary(run, data_order)
    figures, lines = latency.of_run(run)
    run.ledger += lines + scaling.probe(run)
    if run.ranks.is_first:
        run.keep_ledger()
        rundir.write_json(run.directory / "metrics.json", metrics | figures)
    run.checkpoints.discard()


def _save_model(run) -> None:
    weights = parallel.full_weights(run.model)
    if run.ranks.is_first:
        from safetensors.torch import save_file

        save_file(weights, run.directory / "model.safetensors")


def _summary(run, data_order: str) -> dict:
    rows = run.recorder.table.read()
    evals = [
        {name: float(row[name]) for name in run.task.EVAL_COLUMNS} for row in run.evaluations.table.read()
    ]
    seconds = probes.steady([float(row["step_seconds"]) for row in rows])
    last, tokens = [float(row["train_loss"]) for row in rows[-10:]], run.tokens_seen(len(rows) - 1)
    return {
        "status": "complete",
        **run.identity,
        vocabulary.KEY: vocabulary.sha256(run.directory),
        "parameters": run.parameter_count,
        "steps": len(rows),
        "tokens": tokens,
        "train_loss": sum(last) / len(last),
        **_validation(run, evals),
        **run.sparsity.figures(run.directory, run.evaluations.table.read(), run.parameter_count),
        **evaluated(
            run.config,
            run.tokens.validation,
            run.evaluations.dtype,
            limit=run.config.evaluation.eval_tokens,
        ),
        "data_order_sha256": data_order,
        "train_sha256": run.tokens.sha256("train"),
        "samples_per_epoch": run.order.samples_per_epoch,
        **{key: run.tokens.meta[key] for key in ("classes", "choices") if key in run.tokens.meta},
        "flops": sum(
            probes.training_flops(run.flop_parameters, run.config.model, n * run.tokens_seen(0), length)
            for length, n in lengths.steps_at(
                run.config.training, run.config.model.context, len(rows)
            ).items()
        ),
        "step_seconds_median": seconds,
        "tokens_per_second": run.tokens_seen(0) / seconds,
        **run.shards.figures(seconds),
        **_memory(run, rows),
        **guards.counts(run.step.guard, run.step.loss_scale),
        **counters.figures(rows, counters.names(run.optimizer), run.parameter_count),
        "optimizer_memory_multiple": observe.memory_multiple(run.optimizer, run.pruner.held),
        **run.monitor.figures(),
        "train_seconds": sum(float(row["step_seconds"]) for row in rows),
        **run.seconds,
        "compile_seconds": compiling.proof().seconds,
    }


def _validation(run, evals: list[dict[str, float]]) -> dict[str, float]:
    """The last evaluation's figures, and the best of all."""
    scores = {name.removeprefix("val_"): value for name, value in evals[-1].items()}
    return run.task.figures(scores, run.tokens.meta["splits"]["validation"], "val") | {
        f"best_{name}": (max if name.endswith("accuracy") else min)(row[name] for row in evals)
        for name in run.task.EVAL_COLUMNS
    }


def _memory(run, rows: list[dict]) -> dict[str, float | None]:
    """Peaks of the steps, of what the allocator held, and of evaluation; None where they cannot be measured."""
    peaks = [float(row["peak_memory_gib"]) for row in rows if row["peak_memory_gib"]]
    on_gpu = run.ranks.device.type == "cuda"
    reserved = torch.cuda.max_memory_reserved(run.ranks.device) if on_gpu else None
    return {
        "peak_memory_gib": max(peaks) if peaks else _scaled(run.memory.peak_bytes, 2**30),
        "peak_reserved_gib": _scaled(reserved, 2**30),
        "eval_peak_memory_gib": _scaled(run.evaluations.peak_bytes, 2**30),
        "activation_mib": _scaled(run.memory.activation_bytes, 2**20),
    }


def _scaled(value: int | None, unit: int) -> float | None:
    return None if value is None else value / unit
