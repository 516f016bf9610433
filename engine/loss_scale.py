"""Dynamic loss scale of fp16 (Micikevicius et al. 2018), kept and updated on the device.

The loss is multiplied by `scale`, so that small gradients do not vanish in fp16; gradients are divided by it
before clipping. A step whose gradient norm is not finite is skipped, and halves the scale; 2,000 good steps
in a row double it. The norm is over all ranks, so all ranks skip the same steps.
"""

import torch

from engine.guards import step_unless
from engine.ledger import Line

GROWTH, BACKOFF, GROWTH_STEPS = 2.0, 0.5, 2000  # as torch.amp.GradScaler


class LossScale:
    """The scale, and how many of the `steps` so far were skipped."""

    def __init__(self, initial: float, device: torch.device):
        self.scale = torch.tensor(initial, dtype=torch.float32, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.steps = 0
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)  # in a row

    def unscale(self, parameters: list[torch.nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, self.scale.reciprocal())

    def step(
        self, optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor, refused: torch.Tensor | None = None
    ) -> None:
        """`optimizer.step()` unless `grad_norm` is not finite, or a guard has `refused` it; then adapt the scale."""
        not_finite = (~grad_norm.isfinite()).to(torch.float32)
        step_unless(not_finite if refused is None else torch.maximum(not_finite, refused), optimizer)
        self.steps += 1
        self.skipped += not_finite.to(torch.int64)
        torch._amp_update_scale_(self.scale, self._good_steps, not_finite, GROWTH, BACKOFF, GROWTH_STEPS)

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {
            "scale": self.scale,
            "skipped": self.skipped,
            "good_steps": self._good_steps,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over a `state_dict`, from any device."""
        self.scale.copy_(state["scale"])
        self.skipped.copy_(state["skipped"])
        self._good_steps.copy_(state["good_steps"])
        self.steps = state["steps"]

    def lines(self, initial: float) -> list[Line]:
        """The scale now, and the steps that were skipped; disagrees while no step has been taken."""
        skipped = int(self.skipped.item())
        return [
            Line(
                "loss_scale",
                f"{initial:.15g} at first",
                f"{self.scale.item():.15g}, {skipped} of {self.steps} steps skipped",
                "the scale and the counter on the device",
                skipped < self.steps,
            )
        ]
