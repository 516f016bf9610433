"""One optimizer step: forward, backward, clip, update. No I/O, no host synchronisation."""

from collections.abc import Callable

import torch

from engine import parallel, titan
from engine.config import Schedule, Training
from engine.data.batches import IGNORED
from engine.objectives import next_token
from engine.schedule import lr_scale


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
        data_parallel: str,
    ):
        self.model, self.optimizer, self.ranks = model, optimizer, ranks
        self.training, self.schedule, self.lr = training, schedule, lr
        self.loss_factor = parallel.loss_factor(data_parallel, ranks)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.after_forward: Callable[[], None] | None = None  # called once a micro-batch, for measuring
        self.logits_dtype: torch.dtype | None = None

    def set_lr(self, step: int) -> float:
        """Set every group's learning rate for `step`; return it."""
        s = self.schedule
        scale = lr_scale(
            step,
            schedule=s.schedule,
            warmup_steps=s.warmup_steps,
            min_lr_fraction=s.min_lr_fraction,
            steps=self.training.steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * scale
        return self.lr * scale

    def __call__(self, step: int, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict:
        """Train on this rank's micro-batches of (inputs, targets), each (B, T).

        The loss is a sum over valid targets divided by their number in the whole step: all micro-batches of
        all ranks. Accumulation and the number of ranks therefore change nothing but rounding.
        """
        lr = self.set_lr(step)
        count = parallel.total(sum((targets != IGNORED).sum() for _, targets in micro_batches).float())
        sums = None  # summed loss, then the mean square of each probed activation
        for i, (inputs, targets) in enumerate(micro_batches):
            with parallel.synchronise_if(self.model, last=i == len(micro_batches) - 1):
                with autocast(self.training.precision, self.ranks.device):
                    logits, norms = self.model(inputs)
                loss = next_token(logits, targets)
                if self.after_forward:
                    self.after_forward()
                self.logits_dtype = logits.dtype
                del logits  # it must not outlive its own backward pass
                (loss * (self.loss_factor / count)).backward()
            measured = torch.stack([loss.detach(), *(n.square() for n in norms)])
            sums = measured if sums is None else sums + measured
        grad_norm = titan.clip_gradients(self.parameters, self.training.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        sums = parallel.total(sums)
        forwards = len(micro_batches) * self.ranks.world_size
        return {
            "lr": lr,
            "train_loss": sums[0] / count,
            "grad_norm": grad_norm,
            "targets": count,
            "activation_norms": (sums[1:] / forwards).sqrt(),
        }


def autocast(precision: str, device: torch.device):
    """bf16 autocast for matrix products over fp32 weights, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
