"""What every task's evaluation is made of: sums over a split, whatever the batch size and the number of ranks."""

from collections.abc import Callable, Iterable

import torch

from engine import compiling, parallel
from engine.config import Config
from engine.step import autocast


@torch.no_grad()
def sums(
    model,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    config: Config,
    ranks: parallel.Ranks,
) -> list[float]:
    """The sums of `score`(inputs, targets), a vector, over the batches of all ranks; uncompiled, in eval mode."""
    was_training, found = model.training, None
    model.eval()
    with compiling.eager(config.compile.compile):
        for inputs, targets in batches:
            with autocast(config.eval_precision, ranks.device):
                scored = score(inputs.to(ranks.device), targets.to(ranks.device)).double()
            found = scored if found is None else found + scored
    model.train(was_training)
    return parallel.total(found).tolist()
