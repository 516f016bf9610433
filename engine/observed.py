"""The ledger of a run: the lines of every module that owns a technique, and those that need the whole run.

It must not decide anything about the run; it only looks.
"""

from dataclasses import dataclass

import torch

from engine import (
    compiling,
    epochs,
    float8,
    gradient_sums,
    ladder,
    memory,
    optimizers,
    parallel,
    placement,
    pretrained,
    random_replay,
    runtime,
    seeds,
    step_graph,
)
from engine.config import Config
from engine.ledger import Line
from engine.operations import Operations
from engine.parallel import Ranks
from engine.step import AUTOCAST

DTYPES = {"fp32": torch.float32, **AUTOCAST}


@dataclass(frozen=True)
class Observed:
    """What the run's measured step showed."""

    ranks: Ranks
    accumulation: int  # micro-batches of this rank
    targets: int  # counted on all ranks
    sample_ids: list[int]  # of all ranks
    operations: Operations
    task: list[Line]  # about what is its own
    head_sums: int  # of the head's products, those whose gradient the loss added in place
    operand_dtype: torch.dtype  # of the head's product
    stream_dtype: torch.dtype  # of the residual stream before the last norm


def of_run(config: Config, seen: Observed, run) -> list[Line]:
    """The ledger of `run`, a Trainer that has taken its measured step."""
    model = parallel.unwrapped(run.model)
    return [
        *launch(config, seen, next(model.parameters()).device),
        *placement.lines(run.model, config.parallel, seen.ranks),
        *batch(config, seen, run.task.targets_per_sample(config), run.task.tokens_per_sample(config)),
        *precision(config, seen),
        *evaluation(config, run.evaluations.dtype),
        *loss_scale(config, run.step.loss_scale),
        *gradient_sums.lines(
            model.gradient_sums,
            config.training.gradient_sums,
            seen.operations.counts,
            head=seen.head_sums,
            accumulation=seen.accumulation,
            steps=run.steps_here,
        ),
        *run.noise.lines(run.first_step, run.steps_taken),
        *run.step.guard.lines(run.steps_taken),
        *float8.lines(model, config.training.float8),
        *attention(config, seen),
        *seen.task,
        *memory.lines(config, seen, run.memory),
        *random_replay.lines(model.draws, config),
        ladder.limit_line(config.memory, seen.ranks.device, run.memory.peak_bytes),
        *compiling.lines(config.compile, seen.operations.graph_replays),
        *step_graph.lines(run.step.graph, config.compile.step_graph, run.steps_here),
        *data(config, run, model.drawn_with),
        run.rates.line(run.steps_taken - 1),
        *epochs.lines(run.asked, run.order, run.steps_taken, run.step.schedule.warmup_steps),
        *optimizers.lines(config.optimizer, run.optimizer),
        *runtime.lines(config.runtime, seen.ranks.device, run.collector),
        *run.shards.lines(),
        *run.batches.lines(config.runtime.prefetch),
        *run.profiler.lines(),
        *run.lengths.lines(),
        *run.curriculum.lines(),
        *run.redrawn.lines(run.first_step),
        *run.monitor.lines(),
        *run.attention.lines(run.evaluations.count),
        *run.sparsity.lines(config.pruning, run.steps_taken, seen.ranks, config.parallel),
        *run.average.lines(config.training.average_decay, run.steps_taken, run.evaluations.count),
        *run.best.lines(config.saving.keep_best, run.directory, run.evaluations),
        *pretrained.lines(model, config.model),
        *ladder.lines(run.events),
    ]


def launch(config: Config, seen: Observed, device: torch.device) -> list[Line]:
    """The device and the processes."""
    wanted, processes, size = config.run.device, config.parallel.processes, seen.ranks.world_size
    return [
        Line("device", wanted, str(device), "device of the parameters", wanted in ("auto", device.type)),
        Line(
            "processes",
            str(processes or "as launched"),
            str(size),
            "size of the process group",
            processes in (0, size),
        ),
    ]


def batch(config: Config, seen: Observed, targets: int, length: int) -> list[Line]:
    """How many samples a step had, and whether they were all different; targets, length: of one sample, in tokens."""
    size, replicas = config.training.batch_size, seen.ranks.data_size
    tokens = seen.targets // targets * length
    distinct, drawn = len(set(seen.sample_ids)), len(seen.sample_ids)
    micro = drawn // replicas // seen.accumulation
    return [
        Line(
            "batch_size",
            str(size),
            f"{seen.targets / targets:g}",
            f"targets counted on all ranks; micro-batch {micro} × accumulation {seen.accumulation} × replicas "
            f"{replicas}, {tokens} tokens a step",
            seen.targets == size * targets,
        ),
        Line(
            "samples",
            f"{size} distinct",
            f"{distinct} distinct" + (f" of {drawn} drawn" if distinct != drawn else ""),
            f"ids of the samples of one step, from all ranks: {drawn} in all",
            distinct == drawn == size,
        ),
    ]


def precision(config: Config, seen: Observed) -> list[Line]:
    """The dtypes that the matrix products and the residual stream really had."""
    wanted, stream = config.training.precision, config.model.residual_precision
    operands, found = seen.operand_dtype, seen.stream_dtype
    return [
        Line(
            "precision", wanted, _name(operands), "operands of the head's product", operands is DTYPES[wanted]
        ),
        Line(
            "residual_precision",
            stream,
            _name(found),
            "dtype of the residual stream before the last norm",
            found is DTYPES[stream],
        ),
    ]


def evaluation(config: Config, dtype: torch.dtype | None) -> list[Line]:
    """The dtype of the newest evaluation's product; no line before there was one."""
    if dtype is None:
        return []
    wanted = config.eval_precision
    how = "operands of the head's product in the newest evaluation"
    return [Line("eval_precision", wanted, _name(dtype), how, dtype is DTYPES[wanted])]


def loss_scale(config: Config, used) -> list[Line]:
    """The scale of an fp16 run; `used` is the step's engine.loss_scale.LossScale, or None."""
    if used:
        return used.lines(config.training.loss_scale)
    if config.training.precision == "fp16":
        return [
            Line(
                "loss_scale",
                f"{config.training.loss_scale:.15g} at first",
                "none",
                "the step has none",
                False,
            )
        ]
    return []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def attention(config: Config, seen: Observed) -> list[Line]:
    """Which attention kernel ran, from the operations of the measured step."""
    wanted, found = config.model.attention, seen.operations.attention_kernels
    if not seen.operations.visible:
        return [
            Line("attention", wanted, wanted, "inside a CUDA graph, so its operations were not seen", True)
        ]
    # What torch takes on a CPU for attention with dropout.
    is_math = wanted == "math" or (
        wanted == "sdpa" and config.model.dropout > 0 and seen.ranks.device.type == "cpu"
    )
    if is_math and not found and config.compile.compile != "none":
        how = "no other kernel ran in one step; compiled, its own parts have no name of their own"
        return [Line("attention", wanted, "sdpa math", how, True)]
    names = {kernel: kernel if kernel == "flex" else f"sdpa {kernel}" for kernel in sorted(found)}
    used = ", ".join(names.values()) or "manual"
    how = "; ".join(f"{n} calls of {kernel} in one step" for kernel, n in sorted(found.items()))
    agrees = bool(found) == (wanted != "manual") if wanted in ("sdpa", "manual") else set(found) == {wanted}
    return [Line("attention", wanted, used, how or "no SDPA kernel ran in one step", agrees)]


def data(config: Config, run, weights_seed: int) -> list[Line]:
    """The data set and its tokens, the seeds of their order and of the weights, the steps and tokens consumed."""
    meta, order, steps_taken = run.tokens.meta, run.order, run.steps_taken
    train, samples = meta["splits"]["train"], steps_taken * config.training.batch_size
    return [
        Line(
            "dataset",
            config.data.dataset,
            meta["dataset"],
            f"sha256 of the training text {train['sha256_text'][:12]}, tokens {run.tokens.sha256('train')[:12]}; "
            f"{run.task.amount(meta)}, vocabulary {meta['vocabulary_size']}; "
            f"{samples * run.task.tokens_per_sample(config)} tokens "
            f"consumed = {samples / order.samples_per_epoch:.2f} epochs"
            + (f"; a stand-in for {other}" if (other := meta.get("stands_in_for")) else "")
            + (f"; unverified: {said}" if (said := meta.get("unverified")) else ""),
            meta["dataset"] == config.data.dataset,
        ),
        Line(
            "tokenizer",
            config.data.tokenizer,
            meta["tokenizer"],
            "meta.json of the token files",
            meta["tokenizer"] == config.data.tokenizer,
        ),
        Line(
            "steps",
            str(config.training.steps),
            str(steps_taken),
            "batches that the loop was given",
            steps_taken == config.training.steps,
        ),
        *seeds.lines(config, order.seed, weights_seed),
    ]
