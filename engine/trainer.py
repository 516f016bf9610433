"""The training loop of one process: run the steps, with what is due between them.

What is built before is in engine/build.py; how the run's directory begins, in engine/opening.py; what the run leaves,
in engine/outcome.py.
"""

import contextlib
import time

import torch

from engine import (
    averaging,
    checkpoint,
    compiling,
    epochs,
    ladder,
    lengths,
    observed,
    opening,
    outcome,
    parallel,
    preflight,
    probes,
    rates,
    redrawn,
    rundir,
    runtime,
    tasks,
    vocabulary,
)
from engine.attention_metrics import AttentionMetrics
from engine.best import Best
from engine.build import build_model, build_optimizer, check
from engine.config import Config
from engine.data import curriculum
from engine.data.batches import Prefetcher
from engine.data.prepare import Tokens
from engine.due import Due
from engine.evaluations import Evaluations
from engine.guards import Diverged
from engine.ledger import as_dict
from engine.memory import StepMemory
from engine.monitor import Monitor
from engine.noise_scale import NoiseScale
from engine.operations import Operations
from engine.profiling import Profiler, part
from engine.pruning.masks import Pruner
from engine.pruning.sparsity import Sparsity
from engine.samples import Sampler
from engine.shards import Shards
from engine.step import Step


def run(config: Config, tokens: Tokens) -> None:
    """Train the run that `config` describes, resuming where an interrupted one stopped."""
    ranks = parallel.start(config.parallel, config.run.device)
    try:
        preflight.tell(ranks)
        check(config, ranks)
        runtime.after_torch(config.runtime, ranks.device)
        ladder.limit_memory(config.memory, ranks.device)
        writer = rundir.only_writer(config.directory) if ranks.is_first else contextlib.nullcontext()
        with writer:
            planned = epochs.in_steps(config, tokens.meta)
            ladder.run_with_ladder(
                planned, lambda used, events: Trainer(used, tokens, ranks, events, asked=config).train()
            )
    finally:
        parallel.stop()


class Trainer:
    """One process's part of a run. Its public method is `train`."""

    def __init__(
        self, config: Config, tokens: Tokens, ranks: parallel.Ranks, events: list[dict], *, asked: Config
    ):
        """`events`: what happened to this run before, when it ran out of memory and was started again.

        asked: the configuration at first, of which `config` has what is left then.
        """
        self.config, self.tokens, self.ranks, self.events = config, tokens, ranks, events
        self.asked, self.identity = asked, rundir.identity(asked)
        t = config.training
        self.task = tasks.of(config)
        self.order = self.task.train_order(tokens, config)
        self.evaluations = Evaluations(config, self.task, tokens, ranks)
        self.shards = Shards(self.order, config.parallel, ranks)
        self.micro = t.micro_batch_size or config.rank_sequences(ranks.data_size)
        self.due = Due(config)
        self.lengths = lengths.Lengths(t, config.model.context)
        self.curriculum = curriculum.Seen(self.order, t)
        self.redrawn = redrawn.Seen(self.order, t.redraw_candidates)
        self.attention = AttentionMetrics(config, tokens.validation, ranks)
        self.monitor = Monitor(config.logging.monitor_interval if ranks.is_first else 0.0, ranks.device)
        self.sampler = Sampler(config, tokens) if config.evaluation.sample_tokens else None
        self.model = build_model(
            config, tokens.meta["vocabulary_size"], ranks, classes=tasks.class_count(tokens.meta)
        )
        self.parameter_count = sum(p.numel() for p in self.model.parameters())
        self.flop_parameters = self.task.flop_parameters(parallel.unwrapped(self.model))
        self.optimizer = build_optimizer(self.model, config)
        self.pruner = Pruner(self.model, self.optimizer, config.pruning, steps=t.steps, seed=config.run.seed)
        self.sparsity = Sparsity(self.pruner, self.tokens_seen)
        self.rates = rates.Seen(config, self.optimizer)
        self.step = Step(
            self.model,
            self.optimizer,
            ranks,
            training=t,
            schedule=config.schedule,
            lr=config.peak_lr,
            guards=config.guards,
            keep_gradients=compiling.keeps_gradients(config.compile),
            as_graph=config.compile.step_graph,
            gradient_norm_layers=config.logging.gradient_norm_layers,
            pruner=self.pruner,
        )
        self.average = averaging.Average(self.model, t.average_decay)
        self.best = Best(config, self.task, self.sparsity, ranks)
        self.noise = NoiseScale(self.step, config.logging.noise_scale_interval, t.batch_size)
        self.beside = (self.noise, self.sparsity, self.attention)
        self.memory = StepMemory(
            parallel.unwrapped(self.model),
            self.optimizer,
            ranks.device,
            compiled=config.compile.compile != "none",
            held=[*self.average.held, *self.pruner.held],
        )
        self.seconds = {"eval_seconds": 0.0, "checkpoint_seconds": 0.0}  # since this process started
        self.seconds |= {"noise_scale_seconds": 0.0} if self.noise.interval else {}
        self.steps_taken = 0
        self.waits: list[float] = []  # for data, of each step in this process
        self.seen: observed.Observed | None = None
        self.directory = config.directory
        self.collector = runtime.Collector(config.runtime.gc_interval)
        hashes = {split: tokens.sha256(split) for split in tokens.meta["splits"]}
        hashes["vocabulary"] = vocabulary.sha256(tokens.directory)
        name = checkpoint.fingerprint(config, hashes, ranks, parallel.unwrapped(self.model).given_weights)
        self.checkpoints = checkpoint.Checkpoints(name, ranks)

    def train(self) -> None:
        """Run the steps that are left, then write what a complete run leaves.

        Raises Diverged, having written what such a run leaves.
        """
        first = self.first_step = opening.open_directory(self)
        self.shards.resumed(first)
        steps = self.config.training.steps
        # Not the first two: the optimizer's state and DDP's buckets are made there.
        self.measured_step = min(first + 2, steps - 1)
        self.batches = Prefetcher(
            self.order,
            first_step=first,
            last_step=steps,
            rank=self.shards.reads[0],
            world=self.shards.reads[1],
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
            with self.collector, self.batches, self.profiler, self.monitor:
                self._uncounted()
                for batch in self.batches:
                    if batch.step == first:
                        self._look_at_samples(batch)
                    self._one_step(batch)
                    if self.profiler.step(batch.step):
                        self._uncounted()
                    if batch.step == first:
                        compiling.require_compiled(self.config.compile.compile)
                    self._between_steps(batch.step)
        except Diverged as end:
            outcome.diverged(self, end)
            raise
        outcome.complete(self)

    def _between_steps(self, step: int) -> None:
        """What is due after a step: collecting garbage, progress, evaluation, a checkpoint; first of all, the end."""
        self.collector.between_steps(step)
        self._stop_if_diverged(step)
        if self.due.progress(step):
            self._report(step)
        if self.due.evaluation(step):
            with self._timed("eval_seconds"), self.average.in_place():
                scores = self.evaluations.add(step, self.tokens_seen(step), self.model)
                self.sparsity.note(step)
                self.attention.note(step, self.tokens_seen(step), self.model, self.optimizer)
                if self.ranks.is_first:
                    self.write_beside()
                self.best.consider(step, scores, self.model, self.directory)
                if self.sampler:
                    self.sampler.leave(step, self.model, self.directory, self.ranks)
        if self.due.checkpoint(step):
            with self._timed("checkpoint_seconds"):
                self._save_checkpoint(step)

    def _stop_if_diverged(self, step: int) -> None:
        """Raise Diverged if a guard has stopped the run: found out with the progress, and before anything is kept."""
        keeps = self.due.evaluation(step) or self.due.checkpoint(step)
        if step < self.measured_step or not (keeps or self.due.progress(step)):
            return  # the ledger is written from the measured step
        if self.step.guard.active and (end := self.step.guard.stopped(wait=keeps)):
            raise end

    @contextlib.contextmanager
    def _timed(self, what: str):
        """Add the time inside to a total, apart from the steps' own."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)  # the steps before must not be counted here
        start = time.perf_counter()
        with self.monitor.paused():
            yield
        self.seconds[what] += time.perf_counter() - start
        self._uncounted()

    def _uncounted(self) -> None:
        """What happened since the last step is no part of the next one's time and memory."""
        if self.ranks.is_first:
            self.recorder.interrupted()

    def tokens_seen(self, step: int) -> int:
        """Tokens trained on up to the end of `step`; of samples that several ranks read, once."""
        return (step + 1) * self.shards.distinct * self.task.tokens_per_sample(self.config)

    @property
    def stateful(self) -> dict:
        """What a checkpoint must hold besides weights, optimizer and random states."""
        own = {"average": self.average} if self.average.decay else {}
        own |= {"pruner": self.pruner} if self.pruner.tensors else {}
        return self.step.stateful | own | ({"best": self.best} if self.best.on else {})

    @property
    def steps_here(self) -> int:
        """Steps taken in this process, which may have resumed the run."""
        return self.steps_taken - self.first_step

    def micro_batches(self, batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The batch on the device, in parts that are forward passes."""
        device = self.ranks.device
        with part("data"):
            inputs = batch.inputs.to(device, non_blocking=True).split(self.micro)
            targets = batch.targets.to(device, non_blocking=True).split(self.micro)
        return self.lengths.cut(batch.step, list(zip(inputs, targets, strict=True)))

    def _look_at_samples(self, batch) -> None:
        """Before the first step: whether the ranks drew different samples, and how many count."""
        self.shards.look(batch.step, batch.sample_ids)
        if self.ranks.is_first:
            self.recorder.count(self.tokens_seen(0), self.shards.distinct / self.shards.of_one_step)
            self._uncounted()

    def _one_step(self, batch) -> None:
        micro_batches = self.micro_batches(batch)
        self.lengths.add(batch.step, micro_batches[0][0])
        self.curriculum.add(batch.step, batch.inputs.numpy())
        self.redrawn.add(batch.sample_ids, batch.inputs.numpy(), batch.targets.numpy())
        is_measured = batch.step == self.measured_step
        self.monitor.step = batch.step
        self.steps_taken = batch.step + 1  # with this one, of which the ledger may be written
        squares = None
        if self.noise.due(batch.step):
            with self._timed("noise_scale_seconds"):
                squares = self.noise.squares(micro_batches)
        measured = (
            self._measured_step(batch, micro_batches)
            if is_measured
            else self._step(batch.step, micro_batches)
        )
        self.shards.drawn.add(batch.step, batch.sample_ids)
        self.waits.append(batch.wait_seconds)
        if squares is not None:
            self.noise.add(batch.step, self.tokens_seen(batch.step), squares, measured["grad_norm"])
        if self.ranks.is_first:
            self.recorder.add(batch.step, measured, data_wait_seconds=batch.wait_seconds)
            if is_measured:
                self._uncounted()

    def _step(self, step: int, micro_batches) -> dict:
        measured = self.step(step, micro_batches)
        self.rates.add(step)
        self.average.update()
        if self.step.ranked:
            self.pruner.mask_copies(self.average.held)
            self.sparsity.note(step)
        return measured

    def _measured_step(self, batch, micro_batches) -> dict:
        """The step whose memory and operations are looked at, and from which the ledger is written."""
        operations, model = Operations(), parallel.unwrapped(self.model)
        model.loss.forget()
        with self.memory.measured(self.step, micro_batches), operations:
            measured = self._step(batch.step, micro_batches)
        ladder.check_limit(self.memory.peak_bytes, self.config.memory)
        # As the step left them: the task's own look may run the model again.
        of_step = {
            "head_sums": model.loss.head_sums,
            "operand_dtype": model.loss.operand_dtype,
            "stream_dtype": model.stream_dtype,
        }
        self.seen = observed.Observed(
            ranks=self.ranks,
            accumulation=len(micro_batches),
            targets=int(measured["targets"].item()),
            sample_ids=parallel.gathered(torch.from_numpy(batch.sample_ids).to(self.ranks.device)).tolist(),
            operations=operations,
            task=self.task.lines(self, micro_batches[0][0]),
            **of_step,
        )
        self.write_ledger()
        return measured

    def write_beside(self) -> None:
        """Write the rows of what is measured beside the steps."""
        for table in self.beside:
            table.write(self.directory)

    def write_ledger(self) -> None:
        """As things are now; every rank must call this."""
        self.ledger = observed.of_run(self.config, self.seen, self)
        self.keep_ledger()

    def keep_ledger(self) -> None:
        if self.ranks.is_first:
            rundir.write_json(self.directory / "ledger.json", as_dict(self.ledger))

    def _report(self, step: int) -> None:
        if not self.ranks.is_first:
            return
        rows = self.recorder.flush(wait=self.due.is_last(step))
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
            tokens_per_second=round(self.tokens_seen(0) / seconds),
            seconds_left=round(left, 1),
        )

    def _save_checkpoint(self, step: int) -> None:
        if self.ranks.is_first:
            self.recorder.flush()
            self.write_beside()
        self.checkpoints.save(step + 1, self.model, self.optimizer, self.directory, self.stateful)
