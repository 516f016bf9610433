"""Spoils what one rank has in one step, and notes on every rank whether its weights and state stayed as they were."""

import json
import math
import os
from pathlib import Path

import torch

from engine import outcome
from engine.split import local
from engine.step import Step


def install(name: str, *, rank: int, step: int, where: str) -> None:
    """From `step` on, in `rank`; where: its `gradient`, its `loss`, or its gradient `after` the exchange.

    When the run has diverged, kept-NAME-RANK.json says whether weights and state are those before that step.
    """
    me = int(os.environ["RANK"])
    is_spoilt, before = [False], []
    call, pass_, clip, finish = Step.__call__, Step._forward_backward, Step._clip, outcome.diverged

    def stepping(self, number, micro_batches):
        if number == step:
            before.extend(t.clone() for t in held(self))
        is_spoilt[0] = me == rank and number >= step
        return call(self, number, micro_batches)

    def forward_backward(self, inputs, targets, factor, *more):
        spoilt = factor * math.nan if is_spoilt[0] and where == "gradient" else factor
        sums = pass_(self, inputs, targets, spoilt, *more)
        return sums * math.nan if is_spoilt[0] and where == "loss" else sums

    def clipping(self):
        if is_spoilt[0] and where == "after":
            local(self.parameters[0].grad).fill_(math.nan)
        return clip(self)

    def finishing(run, end):
        pairs = list(zip(before, held(run.step), strict=True))
        found = {
            "step": end.step,
            "same": all(torch.equal(a, b) for a, b in pairs),
            "finite": all(bool(b.isfinite().all()) for _, b in pairs),
            "tensors": len(pairs),
        }
        Path(f"kept-{name}-{me}.json").write_text(json.dumps(found), encoding="utf-8")
        finish(run, end)

    Step.__call__, Step._forward_backward, Step._clip = stepping, forward_backward, clipping
    outcome.diverged = finishing


def held(step: Step) -> list[torch.Tensor]:
    """This rank's part of the weights and of the optimizer's state."""
    states = (v for p in step.parameters for v in step.optimizer.state[p].values())
    return [local(t.detach()) for t in (*step.parameters, *states) if isinstance(t, torch.Tensor)]
