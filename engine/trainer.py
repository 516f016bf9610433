"""The training loop of one process: build in a fixed order, run the steps, leave the run directory complete.

Build order: seeded weights on the CPU → activation checkpointing → compile → spread over ranks → optimizer.
Sharding comes after the seeded initialisation, so it cannot change the weights a run starts from.
"""

import contextlib
import importlib
import shutil
import time

import torch
import torch.nn as nn

from engine import checkpoint, compiling, ledger, parallel, probes, rundir
from engine.config import Config
from engine.data.batches import Prefetcher, TrainOrder
from engine.data.prepare import Tokens
from engine.environment import describe
from engine.errors import ConfigError
from engine.evaluate import figures, mean_loss
from engine.memory import StepMemory, apply_activation_checkpointing
from engine.models import MODELS
from engine.optimizers import OPTIMIZERS
from engine.optimizers.groups import decay_groups
from engine.step import Step


def run(config: Config, tokens: Tokens) -> None:
    """Train the run that `config` describes, resuming where an interrupted one stopped."""
    ranks = parallel.start(config.parallel, config.run.device)
    try:
        if config.training.batch_size % ranks.world_size:
            raise ConfigError(
                f"batch_size = {config.training.batch_size}: must be a multiple of the "
                f"{ranks.world_size} processes launched"
            )
        writer = rundir.only_writer(config.directory) if ranks.is_first else contextlib.nullcontext()
        with writer:
            Trainer(config, tokens, ranks).train()
    finally:
        parallel.stop()


def build_model(config: Config, vocabulary_size: int, ranks: parallel.Ranks) -> nn.Module:
    """The run's model, wrapped and spread; its weights depend on the seed alone."""
    torch.manual_seed(config.run.seed)
    build = importlib.import_module(MODELS[config.model.model]).build
    model = build(config.model, vocabulary_size, config.logging.activation_norm_layers).to(ranks.device)
    apply_activation_checkpointing(model, config.memory, dropout=config.model.dropout)
    compiling.apply(model, config.compile.compile)
    torch.manual_seed(config.run.seed * 1_000_003 + ranks.rank)  # dropout: its own stream on every rank
    return parallel.spread(model, config.parallel.data_parallel, ranks)


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The run's optimizer over its decay groups."""
    build = importlib.import_module(OPTIMIZERS[config.optimizer.optimizer]).build
    return build(decay_groups(model, config.optimizer.weight_decay), config.optimizer)


class Trainer:
    """One process's part of a run. Its public method is `train`."""

    def __init__(self, config: Config, tokens: Tokens, ranks: parallel.Ranks):
        self.config, self.tokens, self.ranks = config, tokens, ranks
        t = config.training
        self.order = TrainOrder(tokens.train, config.model.context, t.batch_size, config.run.seed)
        self.per_rank = t.batch_size // ranks.world_size
        self.micro = t.micro_batch_size or self.per_rank
        if self.per_rank % self.micro:
            raise ConfigError(
                f"micro_batch_size = {self.micro}: must divide the {self.per_rank} sequences that each "
                f"of {ranks.world_size} ranks has in a step"
            )
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
            data_parallel=config.parallel.data_parallel,
        )
        self.memory = StepMemory(
            parallel.unwrapped(self.model),
            self.optimizer,
            ranks.device,
            compiled=config.compile.compile != "none",
        )
        self.seconds = {"eval_seconds": 0.0, "checkpoint_seconds": 0.0}  # since this process started
        self.directory = config.directory
        hashes = {s: tokens.meta["splits"][s]["sha256_tokens"] for s in tokens.meta["splits"]}
        name = checkpoint.fingerprint(config, hashes, ranks)
        self.checkpoints = checkpoint.Checkpoints(name, ranks)

    def train(self) -> None:
        """Run the steps that are left, then write what a complete run leaves."""
        first = self._open_run_directory()
        steps = self.config.training.steps
        with Prefetcher(
            self.order,
            first_step=first,
            last_step=steps,
            rank=self.ranks.rank,
            world=self.ranks.world_size,
            device=self.ranks.device,
        ) as batches:
            for batch in batches:
                step = batch.step
                # Not the first two: the optimizer's state and DDP's buckets are made there.
                self._one_step(step, batch, measure=step == min(first + 2, steps - 1))
                if step == first:
                    compiling.require_compiled(self.config.compile.compile)
                if self._due(step, self.config.logging.log_interval):
                    self._report(step)
                if self._due(step, self.config.evaluation.eval_interval):
                    with self._timed("eval_seconds"):
                        self._evaluate(step)
                if self._checkpoint_due(step):
                    with self._timed("checkpoint_seconds"):
                        self._save_checkpoint(step)
        self._finish()

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

    def _open_run_directory(self) -> int:
        """Make the directory anew, or as it was at the newest checkpoint; return the first step to take."""
        if self.ranks.is_first:
            if self.directory.exists():
                shutil.rmtree(self.directory)
            self.directory.mkdir(parents=True)
            (self.directory / "events.jsonl").touch()
        parallel.wait_for_all()
        done = 0
        if self.config.saving.checkpoint_interval:
            done = self.checkpoints.restore(self.model, self.optimizer, self.directory)
        if self.ranks.is_first:
            environment = describe(self.ranks.device, self.ranks.world_size)
            rundir.write_json(self.directory / "env.json", environment)
            (self.directory / "config.toml").write_text(rundir.toml(self.config), encoding="utf-8")
            self.evals = rundir.Table(self.directory / "evals.csv", ["step", "tokens_seen", "val_loss"])
            self.recorder = probes.Recorder(
                self.directory,
                self.ranks.device,
                batch_tokens=self._tokens_seen(0),
                norm_layers=self.config.logging.activation_norm_layers,
            )
        return done

    def _tokens_seen(self, step: int) -> int:
        return (step + 1) * self.config.training.batch_size * self.config.model.context

    def _one_step(self, step: int, batch, *, measure: bool) -> None:
        device = self.ranks.device
        clock = probes.StepClock(device)
        start = clock.now()
        inputs = batch.inputs.to(device, non_blocking=True).split(self.micro)
        targets = batch.targets.to(device, non_blocking=True).split(self.micro)
        micro_batches = list(zip(inputs, targets, strict=True))
        measured = self._measured_step(batch, micro_batches) if measure else self.step(step, micro_batches)
        if self.ranks.is_first:
            self.recorder.add(step, measured, start, clock.now())

    def _measured_step(self, batch, micro_batches) -> dict:
        """The step whose memory is measured, and from which the ledger is written."""
        calls = ledger.SdpaCalls()
        watched = calls if self.config.compile.compile == "none" else contextlib.nullcontext()
        with self.memory.measured(self.step, micro_batches), watched:
            measured = self.step(batch.step, micro_batches)
        seen = ledger.Observed(
            ranks=self.ranks,
            accumulation=len(micro_batches),
            targets=int(measured["targets"].item()),
            sample_ids=parallel.gathered(torch.from_numpy(batch.sample_ids).to(self.ranks.device)).tolist(),
            sdpa_calls=calls.count,
            logits_dtype=self.step.logits_dtype,
            parameter_device=next(self.model.parameters()).device,
        )
        book = ledger.of_run(
            self.config,
            seen,
            tokens=self.tokens,
            order=self.order,
            optimizer=self.optimizer,
            memory=self.memory,
        )
        if self.ranks.is_first:
            rundir.write_json(self.directory / "ledger.json", book.as_dict())
        return measured

    def _report(self, step: int) -> None:
        if not self.ranks.is_first:
            return
        rows = self.recorder.flush()
        seconds = probes.steady([row["step_seconds"] for row in rows])
        left = (self.config.training.steps - step - 1) * seconds
        probes.progress_line(
            event="step",
            study=self.config.run.study,
            run=self.config.run.run,
            seed=self.config.run.seed,
            step=step + 1,
            steps=self.config.training.steps,
            train_loss=round(rows[-1]["train_loss"], 4),
            lr=rows[-1]["lr"],
            tokens_per_second=round(self._tokens_seen(0) / seconds),
            seconds_left=round(left, 1),
        )

    def _evaluate(self, step: int) -> None:
        loss, _ = mean_loss(
            self.model,
            self.tokens.validation,
            self.config,
            self.ranks,
            limit=self.config.evaluation.eval_tokens,
        )
        if self.ranks.is_first:
            self.evals.append([{"step": step, "tokens_seen": self._tokens_seen(step), "val_loss": loss}])
            probes.progress_line(
                event="evaluation",
                run=self.config.run.run,
                seed=self.config.run.seed,
                step=step + 1,
                val_loss=round(loss, 4),
            )

    def _save_checkpoint(self, step: int) -> None:
        if self.ranks.is_first:
            self.recorder.flush()
        self.checkpoints.save(step + 1, self.model, self.optimizer, self.directory)

    def _finish(self) -> None:
        weights = full_weights(self.model)
        if self.ranks.is_first:
            from safetensors.torch import save_file

            save_file(weights, self.directory / "model.safetensors")
            rundir.write_json(self.directory / "metrics.json", self._summary())
        self.checkpoints.discard()

    def _summary(self) -> dict:
        rows = self.recorder.table.read()
        evals = [float(row["val_loss"]) for row in self.evals.read()]
        seconds = probes.steady([float(row["step_seconds"]) for row in rows])
        last = [float(row["train_loss"]) for row in rows[-10:]]
        peaks = [float(row["peak_memory_gib"]) for row in rows if row["peak_memory_gib"]]
        peak = max(peaks) if peaks else _scaled(self.memory.peak_bytes, 2**30)
        return {
            "status": "complete",
            "parameters": self.parameter_count,
            "steps": len(rows),
            "tokens": self._tokens_seen(len(rows) - 1),
            "train_loss": sum(last) / len(last),
            **figures(evals[-1], self.tokens.bytes_per_token("validation"), "val"),
            "best_val_loss": min(evals),
            "step_seconds_median": seconds,
            "tokens_per_second": self._tokens_seen(0) / seconds,
            "peak_memory_gib": peak,
            "activation_mib": _scaled(self.memory.activation_bytes, 2**20),
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
