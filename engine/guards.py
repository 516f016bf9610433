"""Divergence and spikes: which updates are not applied, and when a run is over before its last step.

Each step is judged on the device, before its update, from the loss and the gradient norm of all ranks; the host reads
the verdict later, between steps, and never waits for it in one. Once a run has diverged no further update is applied,
so it does not matter how much later that is.

Only applied updates count for the median of gradient norms. All that a verdict depends on is in `state_dict`.
"""

import torch

from engine.config import Guards
from engine.ledger import Line

NORMS = 33  # gradient norms whose median says what is usual; before there are so many, none is a spike
SMOOTHING = 0.9  # share of the old value in the smoothed training loss
NONE, NOT_FINITE, RISEN, TOO_MANY_SKIPPED = range(4)  # why a run diverged
# What the host reads of a guard, in one copy: (FIELDS,) float64 on the device.
FIELDS = ("smoothed", "lowest", "steps", "skipped", "spikes", "cause", "step")


class Diverged(Exception):
    """A run that a guard stopped: an outcome, not a crash. `step`: as in steps.csv."""

    def __init__(self, step: int, reason: str):
        super().__init__(f"at step {step}: {reason}")
        self.step, self.reason = step, reason


class Guard:
    """Judges the steps of one run; every rank has its own, which comes to the same verdicts."""

    def __init__(self, settings: Guards, device: torch.device):
        self.settings, self.device = settings, device
        self.active = settings.on_divergence != "off"
        self._rise, self._spike = settings.divergence_rise or torch.inf, settings.spike_norms or torch.inf
        self._norms = torch.full((NORMS,), torch.nan, dtype=torch.float64, device=device)
        nan, inf = torch.nan, torch.inf
        self._state = torch.tensor([nan, inf, 0, 0, 0, NONE, -1], dtype=torch.float64, device=device)
        self._note: tuple | None = None

    @torch.no_grad()
    def judge(
        self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, *, scaled: bool = False
    ) -> torch.Tensor:
        """1 if this step's update must not be applied, else 0: a float32 scalar, still on the device.

        loss, grad_norm: scalars, the same on all ranks. scaled: fp16's loss scale sees to norms that are not finite.
        """
        skips = self.settings.on_divergence == "skip"
        loss, norm = loss.double(), grad_norm.double()
        smoothed, lowest, steps, skipped, spikes, cause, _ = self._state.unbind()
        norm_is_finite = norm.isfinite()
        usable = loss.isfinite() if scaled else loss.isfinite() & norm_is_finite
        # A comparison with NaN is false: while norms are missing their median is NaN.
        spike = (norm > self._spike * self._norms.median()) & norm_is_finite
        unwanted = ~usable | spike if skips else ~usable
        newest = torch.where(smoothed.isnan(), loss, torch.lerp(loss, smoothed, SMOOTHING))
        newest = torch.where(usable, newest, smoothed)
        newest_lowest = torch.fmin(lowest, newest)
        risen = newest - newest_lowest > self._rise
        if skips:
            skipped = skipped + unwanted
            over = torch.where(skipped > self.settings.max_skipped_steps, TOO_MANY_SKIPPED, NONE)
        else:
            over = torch.where(unwanted, NOT_FINITE, NONE)
        found = torch.where(risen, RISEN, over)
        at = torch.where(found > NONE, step, -1)
        new = torch.stack([newest, newest_lowest, steps + 1, skipped, spikes + spike, found, at])
        is_over = cause > NONE
        self._state = torch.where(is_over, self._state, new)
        refused = unwanted | (found > NONE) | is_over
        norms = torch.cat([self._norms[1:], norm[None]])
        self._norms = torch.where(refused | ~norm_is_finite, self._norms, norms)
        return refused.float()

    def stopped(self, *, wait: bool) -> Diverged | None:
        """The run's end, if it has diverged; every rank must make the same calls, and comes to the same answer.

        wait=False: as things stood at the last such call, so that the host need not wait for the device.
        """
        if wait or self.device.type == "cpu":
            return self._ended(self._state.tolist())
        before, now = self._note, torch.empty_like(self._state, device="cpu", pin_memory=True)
        now.copy_(self._state, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._note = (now, arrived)
        if before is None:
            return None
        before[1].synchronize()
        return self._ended(before[0].tolist())

    @property
    def found(self) -> dict[str, float]:
        """FIELDS as they stand; the host waits for the device."""
        return _named(self._state.tolist())

    def _ended(self, values: list[float]) -> Diverged | None:
        now, s = _named(values), self.settings
        if now["cause"] == NONE:
            return None
        reason = {
            NOT_FINITE: "the training loss or the gradient norm is not finite",
            RISEN: f"the smoothed training loss {now['smoothed']:.4g} is more than divergence_rise = "
            f"{s.divergence_rise:g} above its minimum {now['lowest']:.4g}",
            TOO_MANY_SKIPPED: f"{now['skipped']:.0f} updates were not finite or a spike, more than "
            f"max_skipped_steps = {s.max_skipped_steps}",
        }[now["cause"]]
        return Diverged(int(now["step"]), reason)

    def lines(self, steps_taken: int) -> list[Line]:
        """What became of the updates; disagrees when not every one of the `steps_taken` was judged."""
        now, wanted = self.found, self.settings.on_divergence
        how = "counters on the device"
        if over := now["cause"] != NONE:
            how += f"; diverged at step {now['step']:.0f}, and no update was applied from then on"
        return [
            Line(
                "on_divergence",
                wanted,
                f"{now['steps']:.0f} updates judged, {now['skipped']:.0f} skipped, {now['spikes']:.0f} spikes",
                how,
                now["steps"] == (steps_taken if wanted != "off" else 0) or over,
            )
        ]

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {"state": self._state, "norms": self._norms}

    def load_state_dict(self, state: dict) -> None:
        """Take over a `state_dict`, from any device."""
        self._state = state["state"].to(self.device)
        self._norms = state["norms"].to(self.device)


def _named(values: list[float]) -> dict[str, float]:
    return dict(zip(FIELDS, values, strict=True))


def step_unless(refused: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()`, or nothing at all where `refused` is 1: weights and state stay as they are.

    An optimizer that cannot skip on the device (adamw8bit) costs one host sync.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's fused kernels
        optimizer.found_inf = refused
        optimizer.step()
        del optimizer.found_inf
    elif not refused.item():
        optimizer.step()


def counts(guard: Guard, loss_scale=None) -> dict[str, int]:
    """For metrics.json: updates skipped, by the guard or by fp16's `loss_scale`, and spikes of the gradient norm."""
    by_scale = int(loss_scale.skipped.item()) if loss_scale else 0
    return {
        "skipped_steps": int(guard.found["skipped"]) + by_scale,
        "loss_spikes": int(guard.found["spikes"]),
    }
