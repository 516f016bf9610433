"""Which samples the ranks of a run really drew: none two ranks' at once, and over the run those that were planned.

Looked at where batches are used, so that a sampler that was never built is found out whatever the settings say. It
must not choose samples: engine/data does, and is told here only as which rank of how many this process reads.
"""

import numpy as np
import torch

from engine import parallel
from engine.config import Parallel
from engine.data.batches import Drawn
from engine.errors import ConfigError
from engine.ledger import Line

SHOWN = 4  # ids in a message


def part(settings: Parallel, ranks: parallel.Ranks) -> tuple[int, int]:
    """(rank, world): as which rank of how many this process reads. Unsharded, each reads as if it were alone."""
    return (ranks.data_rank, ranks.data_size) if settings.shard_samples else (0, 1)


class Shards:
    """What the ranks of one run drew. Every rank makes the same calls."""

    def __init__(self, order, settings: Parallel, ranks: parallel.Ranks):
        self.order, self.settings, self.ranks = order, settings, ranks
        self.reads = part(settings, ranks)
        self.drawn = Drawn(order)
        self.of_one_step = self.distinct = (
            order.batch_size
        )  # of all ranks; as planned, until `look` has counted
        self.samples = 0  # drawn over the whole run by all ranks, once `prove` has counted
        self._proof: Line | None = None

    def resumed(self, steps: int) -> None:
        """Count what an interrupted run drew in its first `steps` steps."""
        self.drawn.resumed(steps, *self.reads)

    def look(self, step: int, sample_ids: np.ndarray) -> None:
        """Compare what all ranks drew in `step`: the first in this process, before it computes anything.

        Raises ConfigError, on all ranks, where two drew the same sample and on_shared_samples is 'refuse'.
        """
        of_ranks = self._gathered(sample_ids)
        found, times = np.unique(np.concatenate([np.unique(ids) for ids in of_ranks]), return_counts=True)
        self.of_one_step, self.distinct = sum(map(len, of_ranks)), len(found)
        shared = found[times > 1]
        if len(shared) and self.settings.on_shared_samples == "refuse":
            raise ConfigError(self._refusal(step, of_ranks, shared))

    def _gathered(self, sample_ids: np.ndarray) -> list[np.ndarray]:
        """The sample ids of every rank that reads different data; as many as each has."""
        device = self.ranks.device
        counts = parallel.gathered(torch.tensor([len(sample_ids)], device=device)).tolist()
        padded = torch.full((max(counts),), -1, dtype=torch.int64, device=device)
        padded[: len(sample_ids)] = torch.from_numpy(sample_ids).to(device)
        of_all = parallel.gathered(padded).view(len(counts), -1).cpu().numpy()
        return [ids[:count] for ids, count in zip(of_all, counts, strict=True)]

    def _refusal(self, step: int, of_ranks: list[np.ndarray], shared: np.ndarray) -> str:
        who = [str(rank) for rank, ids in enumerate(of_ranks) if np.isin(ids, shared).any()]
        shown = ", ".join(map(str, shared[:SHOWN].tolist())) + (", …" if len(shared) > SHOWN else "")
        return (
            f"step {step}: ranks {', '.join(who)} drew the same {len(shared)} samples (ids {shown}): "
            f"{self.of_one_step} were drawn, {self.distinct} of them distinct. Each rank must read its own part: "
            "what a rank reads is the order's rank_slice (engine/data). on_shared_samples = 'report' trains all the "
            "same, with figures that count distinct samples only"
        )

    def prove(self, steps: int) -> np.ndarray:
        """Compare what all ranks drew in the run's `steps` steps with the planned order; the sums for its digest."""
        sums = torch.from_numpy(np.append(self.drawn.sums, self.drawn.count)).to(self.ranks.device)
        *sums, self.samples = parallel.total(sums).tolist()
        planned = Drawn(self.order)
        if self.ranks.is_first:  # who alone writes what comes of it
            planned.resumed(steps, 0, 1)
        as_planned = planned.sums.tolist() == sums and planned.count == self.samples
        self._proof = Line(
            "samples_of_the_run",
            f"the {planned.count} planned, once",
            "as planned" if as_planned else f"{self.samples}, not as planned",
            "sums of mixed ids of all ranks over all steps, against those of the order that the seed gives",
            as_planned,
        )
        return np.array(sums, dtype=np.int64)

    def lines(self) -> list[Line]:
        """Whether the whole run drew what was planned; nothing before it is over."""
        return [self._proof] if self._proof else []

    def figures(self, step_seconds: float) -> dict[str, float]:
        """For metrics.json; `step_seconds`: of one step."""
        return {
            "samples": self.samples,
            "samples_distinct_per_step": self.distinct,
            "samples_per_second": self.distinct / step_seconds,
        }
