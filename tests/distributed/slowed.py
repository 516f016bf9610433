"""Causes of bad scaling, made on purpose: what forked.py's `slow` does to the engine in one rank.

A delay is a sleep: it takes no core from the other rank, so a busy machine adds little to it. `sequence` is how long
a sequence takes to compute, in any run.
"""

import time

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from engine import parallel
from engine.data.batches import TrainOrder
from engine.step import Step


def install(*, sequence: float, loader: float = 0, exchange: float = 0, rank_1: float = 0, step: float = 0):
    """Seconds of delay: a batch's loading, an exchange of gradients, each micro-batch of rank 1, each step."""
    _slow_compute(sequence, rank_1)
    _before(TrainOrder, "gather", loader)
    _before(Step, "_clip", step)
    if exchange:
        _slow_exchange(exchange)


def _slow_compute(sequence: float, rank_1: float) -> None:
    own = Step._forward_backward

    def slow(self, inputs, targets, factor):
        time.sleep(sequence * len(inputs) + rank_1 * (self.ranks.rank == 1))
        return own(self, inputs, targets, factor)

    Step._forward_backward = slow


def _before(cls, name: str, seconds: float) -> None:
    own = getattr(cls, name)

    def slow(self, *arguments):
        time.sleep(seconds)
        return own(self, *arguments)

    if seconds:
        setattr(cls, name, slow)


def _slow_exchange(seconds: float) -> None:
    own = parallel.spread

    def hook(group, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        time.sleep(seconds)
        return allreduce_hook(group, bucket)

    def spread(*arguments):
        model = own(*arguments)
        model.register_comm_hook(None, hook)
        return model

    parallel.spread = spread
