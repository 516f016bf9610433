"""The training loop of one process: build in a fixed order, run the steps, leave the run directory complete.

Build order: seeded weights on the CPU → given weights → tensor parallel → float8 → gradient sums → activation
checkpointing → compile → spread over ranks → optimizer. Sharding comes after the seeded initialisation, so it cannot
change the weights a run starts from.
"""

import contextlib
import importlib
import time

import torch
import torch.nn as nn

from engine import (
    checkpoint,
    compiling,
    float8,
    guards,
    ladder,
    losses,
    observed,
    parallel,
    pretrained,
    probes,
    rundir,
    runtime,
)
from engine.config import Config
from engine.data.batches import Drawn, Prefetcher, TrainOrder
from engine.data.prepare import Tokens
from engine.environment import describe
from engine.errors import ConfigError
from engine.evaluate import evaluated, figures, mean_loss
from engine.gradient_sums import GradientSums
from engine.guards import Diverged
from engine.ledger import as_dict
from engine.memory import StepMemory, apply_activation_checkpointing
from engine.models import MODELS
from engine.models.attention import kernel_problems, select_attention
from engine.objectives import NextToken
from engine.offload import offload
from engine.operations import Operations
from engine.optimizers import OPTIMIZERS
from engine.optimizers.groups import decay_groups
from engine.profiling import Profiler, part
from engine.samples import Sampler
from engine.step import AUTOCAST, Step


def run(config: Config, tokens: Tokens) -> None:
    """Train the run that `config` describes, resuming where an interrupted one stopped."""
    ranks = parallel.start(config.parallel, config.run.device)
    try:
        check(config, ranks)
        runtime.after_torch(config.runtime, ranks.device)
        ladder.limit_memory(config.memory, ranks.device)
        writer = rundir.only_writer(config.directory) if ranks.is_first else contextlib.nullcontext()
        with writer:
            ladder.run_with_ladder(
                config, lambda used, events: Trainer(used, tokens, ranks, events, asked=config).train()
            )
    finally:
        parallel.stop()


def check(config: Config, ranks: parallel.Ranks) -> None:
    """Raise ConfigError for what only shows once devices and processes are known."""
    t = config.training
    per_rank, rest = divmod(t.batch_size, ranks.data_size)
    micro = t.micro_batch_size or per_rank
    problems = [
        *parallel.check(config, ranks.world_size),
        *kernel_problems(
            config.model.attention, ranks.device, precision=t.precision, dropout=config.model.dropout
        ),
        *runtime.check(config.runtime, ranks.device.type),
        *ladder.check(config, ranks.world_size, ranks.device.type),
        *float8.check(t.float8, ranks.device, micro * config.model.context),
    ]
    if rest:
        problems.append(
            f"batch_size = {t.batch_size}: must be a multiple of the {ranks.data_size} processes that read "
            "different data"
        )
    elif per_rank % micro:
        problems.append(
            f"micro_batch_size = {micro}: must divide the {per_rank} sequences that each of {ranks.data_size} "
            "ranks has in a step"
        )
    if problems:
        raise ConfigError(problems)


def build_model(config: Config, vocabulary_size: int, ranks: parallel.Ranks) -> nn.Module:
    """The run's model, wrapped and spread; unless it was given weights, they depend on the seed alone."""
    m = config.model
    torch.manual_seed(config.run.seed)
    build = importlib.import_module(MODELS[m.model]).build
    model = build(m, vocabulary_size, config.logging.activation_norm_layers)
    model.drawn_with = torch.initial_seed()  # the generator's own
    model.given_weights = pretrained.load_into(model, m) if m.init_from else []
    model.to(ranks.device)
    model.loss = NextToken(
        vocabulary_size,
        kernel=config.training.loss_kernel,
        chunk_tokens=config.training.loss_chunk_tokens,
        group=ranks.tensor_group,
    )
    select_attention(m.attention, ranks.device)
    parallel.apply_tensor_parallel(model, ranks)
    if config.training.float8:
        float8.convert(model)
    if config.training.gradient_sums == "fused":
        model.gradient_sums = GradientSums(model, AUTOCAST[config.training.precision], ranks.data_size)
    apply_activation_checkpointing(model, config.memory, width=m.width, dropout=m.dropout)
    budget = config.memory.activation_checkpointing == "budget"
    compiling.apply(model, config.compile, kept=config.memory.memory_budget if budget else 1.0)
    # Dropout draws from a stream of its own for every part of the data.
    torch.manual_seed(config.run.seed * 1_000_003 + ranks.data_rank)
    return parallel.spread(model, config.parallel, ranks)


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The run's optimizer over its decay groups."""
    build = importlib.import_module(OPTIMIZERS[config.optimizer.optimizer]).build
    optimizer = build(decay_groups(model, config.optimizer.weight_decay), config.optimizer)
    return offload(optimizer) if config.optimizer.optimizer_offload else optimizer


class Trainer:
    """One process's part of a run. Its public method is `train`."""

    def __init__(
        self, config: Config, tokens: Tokens, ranks: parallel.Ranks, events: list[dict], *, asked: Config
    ):
        """`events`: what happened to this run before, when it ran out of memory and was started again.

        asked: the configuration at first, of which `config` has what is left then.
        """
        self.config, self.tokens, self.ranks, self.events = config, tokens, ranks, events
        self.identity = rundir.identity(asked)
        t = config.training
        self.order = TrainOrder(tokens.train, config.model.context, t.batch_size, config.run.seed)
        self.drawn = Drawn(self.order)
        self.micro = t.micro_batch_size or t.batch_size // ranks.data_size
        self.sampler = Sampler(config, tokens) if config.evaluation.sample_tokens else None
        self.model = build_model(config, tokens.meta["vocabulary_size"], ranks)
        self.parameter_count = sum(p.numel() for p in self.model.parameters())
        self.optimizer = build_optimizer(self.model, config)
        self.step = Step(
            self.model,
            self.optimizer,
            ranks,
            training=t,
            schedule=config.schedule,
            lr=config.optimizer.lr,
            guards=config.guards,
            keep_gradients=compiling.keeps_gradients(config.compile),
        )
        self.memory = StepMemory(
            parallel.unwrapped(self.model),
            self.optimizer,
            ranks.device,
            compiled=config.compile.compile != "none",
        )
        self.seconds = {"eval_seconds": 0.0, "checkpoint_seconds": 0.0}  # since this process started
        self.eval_peak_bytes: int | None = None
        self.evaluated_in: torch.dtype | None = None  # of the newest evaluation
        self.steps_taken = 0
        self.seen: observed.Observed | None = None
        self.directory = config.directory
        self.collector = runtime.Collector(config.runtime.gc_interval)
        hashes = {s: tokens.meta["splits"][s]["sha256_tokens"] for s in tokens.meta["splits"]}
        name = checkpoint.fingerprint(config, hashes, ranks, parallel.unwrapped(self.model).given_weights)
        self.checkpoints = checkpoint.Checkpoints(name, ranks)

    def train(self) -> None:
        """Run the steps that are left, then write what a complete run leaves.

        Raises Diverged, having written what such a run leaves.
        """
        first = self._open_run_directory()
        self.drawn.resumed(first, self.ranks.data_rank, self.ranks.data_size)
        steps = self.config.training.steps
        # Not the first two: the optimizer's state and DDP's buckets are made there.
        self.measured_step = min(first + 2, steps - 1)
        self.batches = Prefetcher(
            self.order,
            first_step=first,
            last_step=steps,
            rank=self.ranks.data_rank,
            world=self.ranks.data_size,
            device=self.ranks.device,
            depth=self.config.runtime.prefetch,
        )
        self.profiler = Profiler(
            self.config.runtime,
            self.directory,
            first_step=self.measured_step + 1,
            active=self.ranks.is_first,
        )
        try:
            with self.collector, self.batches, self.profiler:
                self._uncounted()
                for batch in self.batches:
                    self._one_step(batch)
                    if self.profiler.step(batch.step):
                        self._uncounted()
                    if batch.step == first:
                        compiling.require_compiled(self.config.compile.compile)
                    self._between_steps(batch.step)
        except Diverged as end:
            self._finish_diverged(end)
            raise
        self._finish()

    def _between_steps(self, step: int) -> None:
        """What is due after a step: collecting garbage, progress, evaluation, a checkpoint; first of all, the end."""
        self.collector.between_steps(step)
        self._stop_if_diverged(step)
        if self._due(step, self.config.logging.log_interval):
            self._report(step)
        if self._due(step, self.config.evaluation.eval_interval):
            with self._timed("eval_seconds"):
                self._evaluate(step)
                if self.sampler:
                    self._sample(step)
        if self._checkpoint_due(step):
            with self._timed("checkpoint_seconds"):
                self._save_checkpoint(step)

    def _stop_if_diverged(self, step: int) -> None:
        """Raise Diverged if a guard has stopped the run: found out with the progress, and before anything is kept."""
        keeps = self._due(step, self.config.evaluation.eval_interval) or self._checkpoint_due(step)
        if step < self.measured_step or not (keeps or self._due(step, self.config.logging.log_interval)):
            return  # the ledger is written from the measured step
        if self.step.guard.active and (end := self.step.guard.stopped(wait=keeps)):
            raise end

    def _due(self, step: int, interval: int) -> bool:
        return (step + 1) % interval == 0 or step + 1 == self.config.training.steps

    def _checkpoint_due(self, step: int) -> bool:
        """Never after the last step: a run resumed there would have no step left to measure."""
        interval = self.config.saving.checkpoint_interval
        return bool(interval) and (step + 1) % interval == 0 and step + 1 < self.config.training.steps

    @contextlib.contextmanager
    def _timed(self, what: str):
        """Add the time inside to a total, apart from the steps' own."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)  # the steps before must not be counted here
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start
        self._uncounted()

    def _uncounted(self) -> None:
        """What happened since the last step is no part of the next one's time and memory."""
        if self.ranks.is_first:
            self.recorder.interrupted()

    def _open_run_directory(self) -> int:
        """Make the directory anew, or as it was at the newest checkpoint; return the first step to take."""
        if self.ranks.is_first:
            rundir.make_anew(self.directory)
        parallel.wait_for_all()
        done = 0
        if self.config.saving.checkpoint_interval:
            done = self.checkpoints.restore(self.model, self.optimizer, self.directory, self.step.stateful)
        if self.ranks.is_first:
            for event in self.events:
                rundir.append_event(self.directory, **event)
            environment = describe(self.ranks.device, self.ranks.world_size)
            rundir.write_json(self.directory / "env.json", environment)
            (self.directory / "config.toml").write_text(rundir.toml(self.config), encoding="utf-8")
            self.evals = rundir.Table(self.directory / "evals.csv", ["step", "tokens_seen", "val_loss"])
            self.recorder = probes.Recorder(
                self.directory,
                self.ranks.device,
                batch_tokens=self._tokens_seen(0),
                norm_layers=self.config.logging.activation_norm_layers,
                sees_memory=not compiling.keeps_gradients(self.config.compile),
            )
        return done

    def _tokens_seen(self, step: int) -> int:
        return (step + 1) * self.config.training.batch_size * self.config.model.context

    def _one_step(self, batch) -> None:
        device = self.ranks.device
        with part("data"):
            inputs = batch.inputs.to(device, non_blocking=True).split(self.micro)
            targets = batch.targets.to(device, non_blocking=True).split(self.micro)
        micro_batches = list(zip(inputs, targets, strict=True))
        is_measured = batch.step == self.measured_step
        measured = (
            self._measured_step(batch, micro_batches) if is_measured else self.step(batch.step, micro_batches)
        )
        self.steps_taken = batch.step + 1
        self.drawn.add(batch.step, batch.sample_ids)
        if self.ranks.is_first:
            self.recorder.add(batch.step, measured, data_wait_seconds=batch.wait_seconds)
            if is_measured:
                self._uncounted()

    def _measured_step(self, batch, micro_batches) -> dict:
        """The step whose memory and operations are looked at, and from which the ledger is written."""
        operations, model = Operations(), parallel.unwrapped(self.model)
        model.loss.forget()
        with self.memory.measured(self.step, micro_batches), operations:
            measured = self.step(batch.step, micro_batches)
        ladder.check_limit(self.memory.peak_bytes, self.config.memory)
        self.seen = observed.Observed(
            ranks=self.ranks,
            accumulation=len(micro_batches),
            targets=int(measured["targets"].item()),
            sample_ids=parallel.gathered(torch.from_numpy(batch.sample_ids).to(self.ranks.device)).tolist(),
            operations=operations,
            loss=losses.lines(model.loss, self.config.training, self.micro * self.config.model.context),
            operand_dtype=model.loss.operand_dtype,
            stream_dtype=model.stream_dtype,
        )
        self._write_ledger()
        return measured

    def _write_ledger(self) -> None:
        lines = observed.of_run(self.config, self.seen, self)
        if self.ranks.is_first:
            rundir.write_json(self.directory / "ledger.json", as_dict(lines))

    def _report(self, step: int) -> None:
        if not self.ranks.is_first:
            return
        rows = self.recorder.flush(wait=step + 1 == self.config.training.steps)
        if not rows:
            return  # the device has finished none of them yet
        seconds = probes.steady([row["step_seconds"] for row in rows])
        last = rows[-1]
        left = (self.config.training.steps - last["step"] - 1) * seconds
        probes.progress_line(
            event="step",
            study=self.config.run.study,
            run=self.config.run.run,
            seed=self.config.run.seed,
            step=last["step"] + 1,
            steps=self.config.training.steps,
            train_loss=round(last["train_loss"], 4),
            lr=last["lr"],
            tokens_per_second=round(self._tokens_seen(0) / seconds),
            seconds_left=round(left, 1),
        )

    def _evaluate(self, step: int) -> None:
        on_gpu = self.ranks.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.ranks.device)
        loss, _ = mean_loss(
            self.model,
            self.tokens.validation,
            self.config,
            self.ranks,
            limit=self.config.evaluation.eval_tokens,
        )
        self.evaluated_in = parallel.unwrapped(self.model).loss.operand_dtype
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self.ranks.device)
            self.eval_peak_bytes = max(peak, self.eval_peak_bytes or 0)
        if self.ranks.is_first:
            self.evals.append([{"step": step, "tokens_seen": self._tokens_seen(step), "val_loss": loss}])
            probes.progress_line(
                event="evaluation",
                run=self.config.run.run,
                seed=self.config.run.seed,
                step=step + 1,
                val_loss=round(loss, 4),
            )

    def _sample(self, step: int) -> None:
        weights = full_weights(self.model)
        if self.ranks.is_first:
            rundir.append_sample(self.directory, step, self.sampler(weights, self.ranks.device))

    def _save_checkpoint(self, step: int) -> None:
        if self.ranks.is_first:
            self.recorder.flush()
        self.checkpoints.save(step + 1, self.model, self.optimizer, self.directory, self.step.stateful)

    @property
    def reserved_bytes(self) -> int | None:
        """What CUDA's allocator held at its most, with what it lost between tensors; None on a CPU."""
        on_gpu = self.ranks.device.type == "cuda"
        return torch.cuda.max_memory_reserved(self.ranks.device) if on_gpu else None

    def _finish_diverged(self, end: Diverged) -> None:
        """Write what a run leaves that a guard stopped: its rows until then, no model and no other figures."""
        self._write_ledger()
        if self.ranks.is_first:
            self.recorder.flush()
            for table in (self.recorder.table, self.evals):
                table.cut(end.step)
            outcome = {"step": end.step, "reason": end.reason}
            rundir.append_event(self.directory, "diverged", **outcome)
            counts = guards.counts(self.step.guard, self.step.loss_scale)
            metrics = {"status": "diverged", **self.identity, **outcome, **counts}
            rundir.write_json(self.directory / "metrics.json", metrics)
            probes.progress_line(event="diverged", **outcome)
        self.checkpoints.discard()
        parallel.wait_for_all()  # no rank ends, and has the others stopped, before this is written

    def _finish(self) -> None:
        self._write_ledger()
        drawn = parallel.total(torch.from_numpy(self.drawn.sums).to(self.ranks.device)).cpu().numpy()
        data_order = self.drawn.digest(drawn, self.tokens.meta["splits"]["train"]["sha256_tokens"])
        weights = full_weights(self.model)
        if self.ranks.is_first:
            from safetensors.torch import save_file

            save_file(weights, self.directory / "model.safetensors")
            rundir.write_json(self.directory / "metrics.json", self._summary(data_order))
        self.checkpoints.discard()

    def _summary(self, data_order: str) -> dict:
        rows = self.recorder.table.read()
        evals = [float(row["val_loss"]) for row in self.evals.read()]
        seconds = probes.steady([float(row["step_seconds"]) for row in rows])
        last = [float(row["train_loss"]) for row in rows[-10:]]
        peaks = [float(row["peak_memory_gib"]) for row in rows if row["peak_memory_gib"]]
        peak = max(peaks) if peaks else _scaled(self.memory.peak_bytes, 2**30)
        return {
            "status": "complete",
            **self.identity,
            "parameters": self.parameter_count,
            "steps": len(rows),
            "tokens": self._tokens_seen(len(rows) - 1),
            "train_loss": sum(last) / len(last),
            **figures(evals[-1], self.tokens.bytes_per_token("validation"), "val"),
            "best_val_loss": min(evals),
            **evaluated(
                parallel.unwrapped(self.model),
                self.tokens.validation,
                self.config,
                limit=self.config.evaluation.eval_tokens,
            ),
            "data_order_sha256": data_order,
            "flops": probes.training_flops(
                self.parameter_count, self.config.model, self._tokens_seen(len(rows) - 1)
            ),
            "step_seconds_median": seconds,
            "tokens_per_second": self._tokens_seen(0) / seconds,
            "peak_memory_gib": peak,
            "peak_reserved_gib": _scaled(self.reserved_bytes, 2**30),
            "eval_peak_memory_gib": _scaled(self.eval_peak_bytes, 2**30),
            "activation_mib": _scaled(self.memory.activation_bytes, 2**20),
            **guards.counts(self.step.guard, self.step.loss_scale),
            "train_seconds": sum(float(row["step_seconds"]) for row in rows),
            **self.seconds,
            "compile_seconds": compiling.proof().seconds,
        }


def _scaled(value: int | None, unit: int) -> float | None:
    return None if value is None else value / unit


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights, whole and on the CPU, by their plain names (every rank must call this)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        name: tensor.contiguous() for name, tensor in get_model_state_dict(model, options=options).items()
    }
