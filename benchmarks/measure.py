"""What a peer's process measures: seconds of each step, peak memory, the loss. The same code for every peer but the
engine, which measures itself (engine/probes.py) with the same clock.
"""

import torch

from engine.probes import StepClock


class Meter:
    """Call `start` before the first step and `step_done` after each; then read `result`.

    Times are taken on device events, so that no step waits for the host. The peak of memory is that of the
    timed steps.
    """

    def __init__(self, device: str, warmup: int):
        self.device, self.warmup = torch.device(device), warmup
        self.clock = StepClock(self.device)
        self.moments, self.losses = [], []
        self.first_step_seconds = None

    def start(self) -> None:
        self.moments = [self.clock.now()]

    def step_done(self, loss: torch.Tensor | None = None) -> None:
        """A step ends now. `loss`: its mean loss, left on the device; None where the peer reports it otherwise."""
        self.moments.append(self.clock.now())
        if loss is not None:
            self.losses.append(loss.detach())
        if len(self.moments) == 2:
            self.first_step_seconds = self.clock.seconds(*self.moments)  # waits; the only time
        if len(self.moments) == 1 + self.warmup and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def result(self, **extra) -> dict:
        """The measurement as plain values. `extra` is added, and may give the losses."""
        seconds = [self.clock.seconds(a, b) for a, b in zip(self.moments, self.moments[1:], strict=False)]
        losses = [float(loss) for loss in self.losses]
        on_gpu = self.device.type == "cuda"
        return {
            "step_seconds": seconds[self.warmup :],
            "first_step_seconds": self.first_step_seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            **extra,
        }
