"""One optimizer step: forward, backward, clip, update. No I/O, no host synchronisation."""

from collections.abc import Callable

import torch

from engine import parallel, titan
from engine.block_norms import BlockNorms
from engine.config import Guards, Schedule, Training
from engine.guards import Guard, step_unless
from engine.loss_scale import LossScale
from engine.objectives import scalar
from engine.optimizers import counters
from engine.optimizers.around_clipping import AroundClipping
from engine.profiling import part
from engine.pruning.masks import Pruner
from engine.schedule import of_step
from engine.step_graph import StepGraph

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Step:
    """Callable (step, micro-batches) → what was measured, as tensors still on the device."""

    def __init__(
        self,
        model,
        optimizer,
        ranks: parallel.Ranks,
        *,
        training: Training,
        schedule: Schedule,
        lr: float,
        guards: Guards = Guards(),  # noqa: B008  frozen
        keep_gradients: bool = False,
        as_graph: bool = False,
        gradient_norm_layers: tuple[int, ...] = (),
        pruner: Pruner | None = None,
    ):
        self.model, self.optimizer, self.ranks = model, optimizer, ranks
        self.training, self.schedule, self.lr = training, schedule, lr
        self.loss_factor = parallel.loss_factor(model)
        self.objective = parallel.unwrapped(model).loss
        self.sums = parallel.unwrapped(model).gradient_sums
        self.in_cuda_graphs = keep_gradients
        self.keep_gradients = keep_gradients or as_graph or self.sums is not None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if keep_gradients or as_graph:
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
        self.loss_scale = (
            LossScale(training.loss_scale, ranks.device) if training.precision == "fp16" else None
        )
        self.guard = Guard(guards, ranks.device, scaled=training.precision == "fp16")
        self.block_norms = BlockNorms(parallel.unwrapped(model), gradient_norm_layers, ranks)
        self.pruner, self.number = pruner, -1  # of the newest step
        self.ranked = False  # whether weights were ranked in it
        self.after_forward: Callable[[], None] | None = None  # called once a micro-batch, for measuring
        self.graph = StepGraph(self.compute, optimizer, ranks.device) if as_graph else None

    @property
    def stateful(self) -> dict:
        """What a checkpoint must hold besides weights, optimizer and random states."""
        found = {"guard": self.guard} | ({"loss_scale": self.loss_scale} if self.loss_scale else {})
        around = isinstance(self.optimizer, AroundClipping)
        return found | ({"optimizer_history": self.optimizer.history} if around else {})

    def set_lr(self, step: int) -> float:
        """Set every group's learning rate for `step`; return that of groups without a factor of their own."""
        groups, lr = self.optimizer.param_groups, self.lr * of_step(self.schedule, step, self.training.steps)
        rates = [lr * group.get("lr_factor", 1.0) for group in groups]
        if self.graph:
            self.graph.set_rates(rates)
        else:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        return lr

    def __call__(self, step: int, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict:
        """Train on this rank's micro-batches of (inputs, targets), each (B, T)."""
        self.number, lr = step, self.set_lr(step)
        measured = (self.graph or self.compute)(micro_batches)
        refused = measured.pop("refused")
        if self.guard.active:
            self.guard.note(step, measured["train_loss"], measured["grad_norm"], refused)
        return {"lr": lr, **measured}

    def compute(self, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """All that a step does on the device, with the learning rates as they are.

        The loss is a sum over valid targets divided by their number in the whole step: all micro-batches of
        all ranks. Accumulation and the number of ranks therefore change nothing but rounding. An objective of
        several parts has a sum and a count of each.
        """
        weighed = self.objective.weighed
        count = parallel.total(sum(self.objective.counts(targets) for _, targets in micro_batches).float())
        factor = weighed(self.loss_factor, count)
        if self.loss_scale:
            factor = factor * self.loss_scale.scale
        if self.sums:
            self.sums.refresh()
        sums = None  # summed loss, then the mean square of each probed activation
        for i, (inputs, targets) in enumerate(micro_batches):
            with parallel.synchronise_if(self.model, last=i == len(micro_batches) - 1):
                measured = self._forward_backward(inputs, targets, factor)
            sums = measured if sums is None else sums + measured
        if self.sums:
            self.sums.exchange()
        with part("optimizer"):
            grad_norm, squares = self._clip()
            # Summed too, so that all ranks come to one verdict even where one rank's own norm is not finite.
            probed, parts = len(sums), count.numel()
            sums = parallel.total(torch.cat([sums, grad_norm[None], squares]))
            loss = scalar(weighed(sums[:parts].view_as(count), count))
            grad_norm = sums[probed] / self.ranks.data_size
            refused = self._update(loss, grad_norm)
            counted = counters.of_update(self.optimizer, self.ranks)
        forwards = len(micro_batches) * self.ranks.data_size
        return {
            "train_loss": loss,
            "grad_norm": grad_norm,
            "targets": self.objective.samples(count),
            "parts": sums[:parts] / count if self.objective.PARTS else sums[:0],
            "activation_norms": (sums[parts:probed] / forwards).sqrt(),
            "gradient_norms": sums[probed + 1 :].sqrt(),
            "counters": counted,
            "refused": refused,
        }

    def gradient_norm(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The norm of the gradient of this micro-batch, with those of the other ranks, by itself; no update."""
        count = parallel.total(self.objective.counts(targets).float())
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        if self.sums:
            self.sums.copy()
        with parallel.synchronise_if(self.model, last=True):
            self._forward_backward(inputs, targets, self.objective.weighed(scale * self.loss_factor, count))
        if self.sums:
            self.sums.exchange()
        if self.pruner:
            self.pruner.mask_gradients()
        norm = titan.clip_gradients(self.parameters, 0)
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        return norm / scale

    def _forward_backward(self, inputs, targets, factor: torch.Tensor) -> torch.Tensor:
        """One micro-batch; return its summed loss, or parts of it, and the mean squares of the probed activations."""
        if self.in_cuda_graphs:  # this micro-batch may reuse the last one's memory
            torch.compiler.cudagraph_mark_step_begin()
        with part("forward"), autocast(self.training.precision, self.ranks.device):
            loss, norms = self.model(inputs, targets, factor)
        if self.after_forward:
            self.after_forward()
        with part("backward"):
            scalar(loss).backward()
        return torch.cat([loss.detach().view(-1), *(n.square().view(1) for n in norms)])

    def _clip(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip the gradients; return their norm before, and this rank's share of the squares of the blocks' own.

        Both are of what an optimizer's `before_clipping` has left.
        """
        if self.loss_scale:
            self.loss_scale.unscale(self.parameters)
        if self.pruner:
            self.pruner.mask_gradients()
        if isinstance(self.optimizer, AroundClipping):
            self.optimizer.before_clipping()
        squares = self.block_norms.squares()  # of the same gradient as the norm of the whole
        return titan.clip_gradients(self.parameters, self.training.clip_norm), squares

    def _update(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor | None:
        """Apply the gradients, unless the guard is against it, and clear them; return its verdict."""
        refused = self.guard.judge(loss, grad_norm) if self.guard.active else None
        if isinstance(self.optimizer, AroundClipping):
            self.optimizer.grad_norm = grad_norm
        if self.pruner:
            self.pruner.before_update(grad_norm, refused)
        if self.loss_scale:
            self.loss_scale.step(self.optimizer, grad_norm, refused)
        elif refused is not None:
            step_unless(refused, self.optimizer)
        else:
            self.optimizer.step()
        if self.pruner:
            self.ranked = self.pruner.after_update(self.number)
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        return refused


def autocast(precision: str, device: torch.device):
    """Autocast of matrix products over fp32 weights to bf16 or fp16, or nothing."""
    return torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)
