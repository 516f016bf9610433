"""The learning rate as a pure function of the step. No torch, no state."""

import math


def of_step(settings, step: int, steps: int) -> float:
    """lr_scale under the `settings`, an engine.config.Schedule."""
    return lr_scale(
        step,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        min_lr_fraction=settings.min_lr_fraction,
        steps=steps,
    )


def lr_scale(step: int, *, schedule: str, warmup_steps: int, min_lr_fraction: float, steps: int) -> float:
    """The factor on the peak learning rate at `step` (0-based) of `steps`.

    Warm-up is linear and reaches 1 at its last step; cosine and linear decay then reach `min_lr_fraction`
    exactly at the last step, where warm-up leaves them at least two steps.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_lr_fraction + (1 - min_lr_fraction) * decay
