"""Divergence and spikes: which updates are not applied, and when a run is over before its last step.

On the device, before each update and without a word from the host: a few operations that say whether to apply it.
On the host, later and between steps: what to conclude from the losses and gradient norms since. So a run that has
diverged may take some steps more, of which nothing is kept.

All ranks have the same numbers, and read them at the same steps.
"""

import math
import statistics
from collections import deque

import torch

from engine.config import Guards
from engine.ledger import Line

NORMS = 33  # of the last applied updates, whose median is the usual one; before there are so many, none is a spike
SMOOTHING = 0.9  # share of the old value in the smoothed training loss
GATHERED = 256  # steps' numbers that are separate tensors at most


class Diverged(Exception):
    """A run that a guard stopped: an outcome, not a crash. `step`: as in steps.csv."""

    def __init__(self, step: int, reason: str):
        super().__init__(f"at step {step}: {reason}")
        self.step, self.reason = step, reason


class Guard:
    """Judges the steps of one run."""

    def __init__(self, settings: Guards, device: torch.device, *, scaled: bool = False):
        """scaled: under fp16's loss scale, which sees to gradient norms that are not finite."""
        self.settings, self.device, self.scaled = settings, device, scaled
        self.active, self.skips = settings.on_divergence != "off", settings.on_divergence == "skip"
        self._spike = settings.spike_norms or math.inf
        self.steps = self.skipped = self.spikes = self.unlike = (
            0  # unlike: verdicts that the device gave otherwise
        )
        self.end: Diverged | None = None
        self._smoothed, self._lowest = math.nan, math.inf
        self._norms: deque[float] = deque(maxlen=NORMS)
        self._window = torch.full(
            (NORMS,), torch.nan, dtype=torch.float64, device=device
        )  # _norms on the device
        self._pending: list[torch.Tensor] = []  # of each step (3,): loss, norm, verdict
        self._gathered: list[torch.Tensor] = []  # (steps, 3)
        self._numbers: list[int] = []  # the steps of these
        self._sent: tuple | None = None  # on its way to the host

    @torch.no_grad()
    def judge(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """1 if this step's update must not be applied, else 0: a float32 scalar, still on the device.

        loss, grad_norm: scalars, the same on all ranks. A part of the step that a CUDA graph may hold.
        """
        refused = _is_not_finite(loss if self.scaled else loss + grad_norm)
        if self.skips:
            norm, norm_is_bad = grad_norm.double(), _is_not_finite(grad_norm)
            # A comparison with NaN is false: while norms are missing their median is NaN.
            refused |= (norm > self._spike * self._window.median()) & ~norm_is_bad
            window = torch.cat([self._window[1:], norm[None]])
            self._window.copy_(torch.where(refused | norm_is_bad, self._window, window))
        return refused.float()

    def note(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, refused: torch.Tensor) -> None:
        """Keep the numbers of a step that was judged, for the host to read later."""
        self._numbers.append(step)
        self._pending.append(torch.stack([loss, grad_norm, refused]))
        if len(self._pending) == GATHERED:
            self._gather()

    def _gather(self) -> None:
        if self._pending:
            self._gathered.append(torch.stack(self._pending))
            self._pending = []

    def stopped(self, *, wait: bool) -> Diverged | None:
        """The run's end, if it has diverged; every rank must make the same calls, and comes to the same answer.

        wait=False: as things stood at the last such call, so that the host need not wait for the device.
        """
        before, self._sent = self._sent, None
        if before:
            numbers, values, arrived = before
            arrived.synchronize()
            self._conclude(numbers, values.tolist())
        self._gather()
        if not self._gathered:
            return self.end
        numbers, values = self._numbers, torch.cat(self._gathered)
        self._numbers, self._gathered = [], []
        if wait or self.device.type == "cpu":
            self._conclude(numbers, values.tolist())
        else:
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._sent = (numbers, values, arrived)
        return self.end

    def _conclude(self, numbers: list[int], values: list[list[float]]) -> None:
        for step, (loss, norm, refused) in zip(numbers, values, strict=True):
            if self.end is None:
                reason = self._count(loss, norm, bool(refused))
                self.end = Diverged(step, reason) if reason else None

    def _count(self, loss: float, norm: float, refused: bool) -> str | None:
        """Take one step into account; return why the run is over, if it is."""
        s, norm_is_finite = self.settings, math.isfinite(norm)
        usable = math.isfinite(loss) and (self.scaled or norm_is_finite)
        is_full = len(self._norms) == NORMS
        spike = norm_is_finite and is_full and norm > self._spike * statistics.median(self._norms)
        unwanted = not usable or (self.skips and spike)
        self.steps += 1
        self.spikes += spike
        self.skipped += self.skips and unwanted
        self.unlike += unwanted != refused
        if norm_is_finite and not unwanted:
            self._norms.append(norm)
        if usable:
            old = loss if math.isnan(self._smoothed) else self._smoothed
            self._smoothed = SMOOTHING * old + (1 - SMOOTHING) * loss
            self._lowest = min(self._lowest, self._smoothed)
        if s.divergence_rise and self._smoothed - self._lowest > s.divergence_rise:
            return (
                f"the smoothed training loss {self._smoothed:.4g} is more than divergence_rise = "
                f"{s.divergence_rise:g} above its minimum {self._lowest:.4g}"
            )
        if self.skips and self.skipped > s.max_skipped_steps:
            return (
                f"{self.skipped} updates were not finite or a spike, more than max_skipped_steps = "
                f"{s.max_skipped_steps}"
            )
        if unwanted and not self.skips:
            return "the training loss or the gradient norm is not finite"
        return None

    def lines(self, steps_taken: int) -> list[Line]:
        """What became of the updates; disagrees when not every one of the `steps_taken` was judged as it should."""
        self.stopped(wait=True)
        how = f"verdicts on the device, {self.unlike} of them others than they should"
        if self.end:
            how += f"; diverged at step {self.end.step}"
        judged = self.steps == (steps_taken if self.active else 0)
        return [
            Line(
                "on_divergence",
                self.settings.on_divergence,
                f"{self.steps} updates judged, {self.skipped} skipped, {self.spikes} spikes",
                how,
                self.unlike == 0 and (judged or self.end is not None),
            )
        ]

    def state_dict(self) -> dict:
        """For a checkpoint; the host waits for the device."""
        self.stopped(wait=True)
        counts = [self.steps, self.skipped, self.spikes, self.unlike]
        end = [self.end.step, self.end.reason] if self.end else None
        loss = [self._smoothed, self._lowest]
        return {"counts": counts, "loss": loss, "norms": list(self._norms), "end": end}

    def load_state_dict(self, state: dict) -> None:
        """Take over a `state_dict`."""
        self.steps, self.skipped, self.spikes, self.unlike = state["counts"]
        self._smoothed, self._lowest = state["loss"]
        self.end = Diverged(*state["end"]) if state["end"] else None
        self._norms = deque(state["norms"], NORMS)
        window = [math.nan] * (NORMS - len(self._norms)) + list(self._norms)
        self._window = torch.tensor(window, dtype=torch.float64, device=self.device)


def _is_not_finite(x: torch.Tensor) -> torch.Tensor:
    """Whether the scalar `x` is NaN or infinite, in two operations: x − x is NaN then."""
    return (x - x).ne(0)


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
    spikes = guard.spikes if guard.active else None  # nobody looked
    return {"skipped_steps": guard.skipped + by_scale, "norm_spikes": spikes}
