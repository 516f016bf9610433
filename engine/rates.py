"""The learning rates that the optimizer's groups had, against the schedule and what lr_rule makes of lr.

A schedule may end at 0, where every peak looks the same. So a process keeps the rates of its step that has most of
the peak; the ledger's line is about that step and the newest one. Nothing is read off the device before the line is
made.
"""

import math
from collections.abc import Iterator

import torch

from engine import schedule
from engine.config import Config
from engine.ledger import Line
from engine.optimizers import groups

EXACT, FLOAT32 = 1e-9, 1e-6  # relative: a learning rate that is a tensor has 24 bits


class Seen:
    """What the groups of `optimizer` had in this process's steps."""

    def __init__(self, config: Config, optimizer: torch.optim.Optimizer):
        self.config, self.optimizer = config, optimizer
        o = config.optimizer
        self.factor = {groups.MATRICES: o.muon_lr / o.lr} if o.optimizer == "muon" else {}
        self.first = self.step = -1  # this process's first step, and the one with most of the peak
        self.rates: list[float | torch.Tensor] = []  # of each group in that step

    def scale(self, step: int) -> float:
        """What the schedule has of its peak at `step`."""
        return schedule.of_step(self.config.schedule, step, self.config.training.steps)

    def add(self, step: int) -> None:
        """Call it after `step`, before the next one: of several steps with as much of the peak, the first is kept."""
        if self.first < 0:
            self.first = step
        if not self.rates or self.scale(step) > self.scale(self.step):
            self.step, self.rates = step, self._now()

    def _now(self) -> list[float | torch.Tensor]:
        """A tensor is written anew for every step, so a copy is kept, which is made without waiting for it."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]

    def line(self, newest: int) -> Line:
        """The ledger's line after step `newest`."""
        o, b, peak = self.config.optimizer, self.config.training.batch_size, self.config.peak_lr
        rule = (
            f" = {o.lr:g} × {'√' * (o.lr_rule == 'sqrt')}({b} / {o.lr_batch_size})"
            if o.lr_rule != "none"
            else ""
        )
        looked_at = {self.step: self.rates, newest: self._now()}
        found = [one for step, rates in looked_at.items() for one in self._against(step, rates)]
        told = dict.fromkeys(words for words, _ in found if words)
        return Line(
            "lr",
            f"{peak:g}{rule}",
            " and ".join(told) or "not seen: 0 of it in every step of this process",
            f"param_groups at step {self.step}, where the schedule has {self.scale(self.step):g} of its peak"
            + (f", the most from step {self.first} on" if self.first else "")
            + (f", and at step {newest}, where it has {self.scale(newest):g}" if newest != self.step else "")
            + "".join(f"; times {f:g} in the group {name}" for name, f in self.factor.items()),
            all(agrees for _, agrees in found),
        )

    def _against(self, step: int, rates: list[float | torch.Tensor]) -> Iterator[tuple[str, bool]]:
        """Of each group: the peak that its rate means, in words, and whether that is the one asked for."""
        peak, scale = self.config.peak_lr, self.scale(step)
        exact = FLOAT32 if self.config.compile.step_graph else EXACT
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            lr = float(rate) / self.factor.get(group["name"], 1.0)
            if math.isclose(lr, peak * scale, rel_tol=exact):
                yield f"{peak:g}" if scale else "", True
            elif scale:
                short = f"{lr / scale:g}"
                yield short if short != f"{peak:g}" else f"{lr / scale:.12g}", False
            else:
                yield f"{lr:g} where it should be 0", False
