"""One training step without memory: every tensor is fake, and every byte that it would take is written down.

The run's own model, checkpointing, loss and optimizer go through whole steps on torch's fake tensors, so that what is
alive at each moment is found, not estimated. Fakes are always CPU tensors, because a machine without CUDA cannot
fake others; what differs on a GPU is in engine/dry_gpu.py, compiled regions are in engine/dry_compile.py, and what
other ranks change is in engine/dry_spread.py. It starts no process group and touches no device.
"""

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import dry_compile, dry_gpu, dry_spread, float8, objectives, parallel, tasks, world
from engine.config import Config
from engine.gradient_sums import GradientSums
from engine.memory import apply_activation_checkpointing
from engine.models import MODELS
from engine.offload import offload, to_host
from engine.optimizers import LIBRARIES, OPTIMIZERS, groups, is_installed
from engine.pruning.masks import Pruner
from engine.step import AUTOCAST
from engine.tape import Tape, Trace


@dataclass(frozen=True)
class Place:
    """Where a run is planned for: the kind of device, and the number of processes."""

    device_type: str
    ranks: int


def trace(config: Config, vocabulary_size: int, place: Place, micro: int, classes: int = 0) -> Trace:
    """What one steady training step of one rank would take, in micro-batches of `micro` sequences."""
    build = importlib.import_module(MODELS[config.model.model]).build
    with torch.device("meta"):
        model = build(config.model, vocabulary_size, config.logging.activation_norm_layers, classes)
        dry_spread.keep_first_part(model, config.parallel.tensor_parallel)
    # Compiling fakes makes torch warn of what matters to real tensors alone.
    with warnings.catch_warnings(action="ignore"), FakeTensorMode(), _pretend(config, place) as tape:
        return DryRun(config, model, place, micro, tape).trace()


@contextlib.contextmanager
def _pretend(config: Config, place: Place) -> Iterator[Tape]:
    """No rank is waited for; on a GPU, its rules hold."""
    on_gpu = place.device_type == "cuda"
    tape = Tape(rounding=dry_gpu.ROUNDING if on_gpu else 1)
    with contextlib.ExitStack() as stack:
        for name in ("summed", "largest"):
            stack.enter_context(mock.patch.object(parallel, name, lambda tensor, group: tensor))
        if on_gpu:
            stack.enter_context(dry_gpu.rules(config.model.attention))
            tape.work_memory = dry_gpu.work_memory
        if config.compile.compile != "none":
            stack.enter_context(dry_compile.settings(config))
        yield tape


class DryRun:
    """A model and its optimizer of fake tensors, and the steps they take."""

    def __init__(self, config: Config, model: nn.Module, place: Place, micro: int, tape: Tape):
        """`model` is this rank's part, on the meta device."""
        self.config, self.micro, self.tape = config, micro, tape
        self.on_gpu = place.device_type == "cuda"
        replicas, shards, tensor = world.sizes(config.parallel, place.ranks)
        self.spread = dry_spread.Spread(config.parallel, replicas, shards, tape)
        self.sequences = config.training.batch_size // (replicas * shards)
        self.accumulation = min(2, self.sequences // micro)  # the second micro-batch meets gradients
        self.model = self._prepared(model, tensor)
        self.optimizer = self._optimizer()

    def _prepared(self, model: nn.Module, tensor: int) -> nn.Module:
        """As build.build_model does it, but spread."""
        c = self.config
        group = dry_spread.FakeGroup(tensor) if tensor > 1 else None
        model.loss = tasks.of(c).loss(c, model.vocabulary_size, group)
        _make_fake(model)
        if c.training.float8:
            float8.convert(model)
        if c.training.gradient_sums == "fused":
            model.gradient_sums = GradientSums(model, AUTOCAST[c.training.precision], 1)
        apply_activation_checkpointing(model, c.memory, width=c.model.width, dropout=0.0)  # nothing is drawn
        if c.compile.compile == "none":
            _label_parts(model, self.tape)
        else:
            dry_compile.apply(model, c.compile, self.tape)
        return model

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.config.optimizer
        own = groups.of(self.model, settings, seed=self.config.run.seed)
        if settings.optimizer == "adamw8bit" and (
            settings.optimizer_fallback == "none" or is_installed(LIBRARIES["adamw8bit"])
        ):
            optimizer = EightBit(own)
        else:
            optimizer = importlib.import_module(OPTIMIZERS[settings.optimizer]).build(own, settings)
        if settings.optimizer_offload:
            offload(optimizer, to_host=self._to_host if self.on_gpu else to_host, to_device=_copied)
        return optimizer

    def _name_state(self) -> None:
        """The optimizer's state is on the device, unless it is kept elsewhere."""
        if self.on_gpu and self.config.optimizer.optimizer_offload:
            return
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    self.tape.relabel(value, ("optimizer", "optimizer state"), self.spread.share)

    def _to_host(self, tensor: torch.Tensor, _buffer) -> torch.Tensor:
        with self.tape.off():
            return torch.empty_like(tensor)

    def trace(self) -> Trace:
        """The trace of the second step: compiled regions, gradients' buckets and optimizer state exist by then."""
        tape, parameters = self.tape, list(self.model.parameters())
        with tape:
            for p in parameters:
                tape.relabel(p, ("parameters", "parameters"), self.spread.share)
            for b in self.model.buffers():
                tape.relabel(b, ("parameters", "buffers"))
            if self.model.gradient_sums:
                for p in parameters:
                    tape.relabel(p.grad, ("gradients", "gradients"))
                for copy in self.model.gradient_sums.held:
                    tape.relabel(copy, ("parameters", "copies for the products"))
            else:
                self.spread.watch_gradients(self.model)
            if self.config.training.average_decay:
                size = sum(p.untyped_storage().nbytes() for p in parameters)
                tape.take(size * self.spread.share, ("parameters", "averaged weights"))
            pruner = Pruner(
                self.model, self.optimizer, self.config.pruning, steps=self.config.training.steps, seed=0
            )
            for tensor in pruner.held:
                tape.relabel(tensor, ("optimizer", "pruning masks"), self.spread.share)
            self._step()
            self._name_state()
            if self.on_gpu:
                tape.take(dry_gpu.BLAS_WORKSPACE, ("libraries", "cuBLAS workspace"))
            tape.restart()
            self._step()
        return tape.trace()

    def _step(self) -> None:
        tape = self.tape
        with tape.labelled("temporary", "batch"):
            batch = tasks.of(self.config).empty_batch(self.config, self.sequences)
            inputs, targets = (whole.split(self.micro) for whole in batch)
        tape.mark("start")
        if self.model.gradient_sums:
            self.model.gradient_sums.refresh()
        for i in range(self.accumulation):
            with self.spread.micro_batch(is_last=i == self.accumulation - 1):
                with self._autocast(), tape.labelled("activations", "residual stream"):
                    loss, _norms = self.model(inputs[i], targets[i], torch.ones(()))
                tape.mark("forward")
                with tape.labelled("temporary", "backward pass"):
                    objectives.scalar(loss).backward()
                    del loss, _norms
        with tape.labelled("temporary", "optimizer"):
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
            torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm, foreach=True)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.model.gradient_sums is None)

    def _autocast(self):
        dtype = AUTOCAST.get(self.config.training.precision)
        return torch.autocast("cpu", dtype, enabled=dtype is not None)


class EightBit(torch.optim.Optimizer):
    """The state of bitsandbytes' AdamW8bit, which knows no fake tensors: 8 bits a value, a scale for each 256."""

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {})

    def step(self, closure=None) -> None:
        """Make the state; the kernel works in place."""
        for p in (p for group in self.param_groups for p in group["params"] if not self.state[p]):
            for moment in ("1", "2"):
                if p.numel() < 4096:
                    self.state[p][moment] = torch.empty_like(p, dtype=torch.float32)
                    continue
                self.state[p][moment] = torch.empty_like(p, dtype=torch.uint8)
                self.state[p]["scale" + moment] = torch.empty(-(-p.numel() // 256))


def _copied(tensor: torch.Tensor, _device) -> torch.Tensor:
    return torch.empty_like(tensor)


def _make_fake(model: nn.Module) -> None:
    """Parameters and buffers on the meta device become fake ones on the CPU; shared ones stay shared."""
    made: dict[torch.Tensor, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype)
            made[tensor] = (
                nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            )
        return made[tensor]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: fake(tensor) for name, tensor in held.items() if tensor is not None})


def _label_parts(model: nn.Module, tape: Tape) -> None:
    """In the forward pass, what a submodule of a block makes is labelled with its name."""
    for block in model.layers:
        for name, part in block.named_children():
            if name == "_checkpoint_wrapped_module":
                for inner, module in part.named_children():
                    tape.label_calls(module, inner)
            else:
                tape.label_calls(part, name)
    tape.label_calls(model.loss, "logits", kind="logits")
