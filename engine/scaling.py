"""Where the time of several processes goes, measured after training: scaling.json.

Three kinds of the same training step take turns. *loaded*: batches from a loader that goes on in the run's order;
*ready*: one batch that is on the device already; *alone*: the same batch, and nothing is exchanged between ranks, so
that each shows its own speed. What their differences mean is metrics/'s to say.

The learning rate is 0, so the weights stay; guards look on and stop nothing. Everything else that the run leaves is
there before this, so it can change none of it.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from engine import parallel
from engine.data.batches import Prefetcher
from engine.ledger import Line
from engine.probes import WARM_UP_STEPS, StepClock
from engine.rundir import write_json

TURNS = 3
KINDS = ("loaded", "ready", "alone")


def probe(run) -> list[Line]:
    """Time `run`, a Trainer that has taken all its steps, and write scaling.json; the ledger's line about it.

    Nothing where scaling_probe_steps is 0. Every rank must call it.
    """
    steps = run.config.runtime.scaling_probe_steps
    if not steps:
        return []
    began = time.perf_counter()
    exchange, obstacle = parallel.exchange(run.model, run.ranks)
    timed = Probe(run, steps).seconds([kind for kind in KINDS if kind != "alone" or not obstacle])
    of_ranks = {kind: _of_ranks([statistics.median(seconds)], run.ranks) for kind, seconds in timed.items()}
    waits = _of_ranks([statistics.median(run.waits[WARM_UP_STEPS:] or run.waits)], run.ranks)
    if run.ranks.is_first:
        found = {
            "ranks": run.ranks.world_size,
            "batch_size": run.config.training.batch_size,
            "samples_drawn": run.shards.of_one_step,
            "samples_distinct": run.shards.distinct,
            "steps": steps,
            "turns": TURNS,
            **{f"{kind}_seconds": of_ranks.get(kind) for kind in KINDS},
            "exchange": obstacle or exchange,
            "training_data_wait_seconds": waits,
            "probe_seconds": time.perf_counter() - began,
        }
        write_json(run.directory / "scaling.json", found)
    return [_line(steps, {kind: len(seconds) for kind, seconds in timed.items()}, obstacle)]


def _line(wanted: int, counts: dict[str, int], obstacle: str) -> Line:
    """`counts`: steps timed of each kind."""
    how = f"steps timed in {TURNS} turns after training, {wanted} of a kind each time"
    return Line(
        "scaling_probe_steps",
        ", ".join(f"{TURNS * wanted} {kind}" for kind in KINDS),
        ", ".join(f"{counts.get(kind, 0)} {kind}" for kind in KINDS),
        f"{how}; alone: {obstacle}" if obstacle else how,
        all(counts.get(kind) == TURNS * wanted for kind in KINDS),
    )


def _of_ranks(values: list[float], ranks: parallel.Ranks) -> list[float]:
    """The `values` of every rank, one rank after another."""
    mine = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    return parallel.of_all_ranks(mine).tolist()


class Probe:
    """Takes the turns of one rank."""

    def __init__(self, run, steps: int):
        """`steps`: timed in one turn."""
        self.run, self.steps, self.clock = run, steps, StepClock(run.ranks.device)
        self.untimed = run.config.runtime.prefetch + 1  # so many come before, in which a turn settles
        self.next_step = run.steps_taken
        run.step.lr = 0.0

    def seconds(self, kinds: list[str]) -> dict[str, list[float]]:
        """Of every timed step of this rank, by kind."""
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        ready = self._ready()
        with no_garbage():
            for _ in range(TURNS):
                for kind in kinds:
                    found[kind] += getattr(self, f"_{kind}_turn")(ready)
        return found

    def _ready(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The micro-batches of the step after the last, on the device."""
        with self._loader() as batches:
            return self.run.micro_batches(next(batches))

    def _loader(self) -> Prefetcher:
        """A fresh one each time: what another had prepared while nothing ran would hide that loading is slow."""
        run = self.run
        return Prefetcher(
            run.order,
            first_step=self.next_step,
            last_step=self.next_step + self.untimed + self.steps,
            rank=run.shards.reads[0],
            world=run.shards.reads[1],
            device=run.ranks.device,
            depth=run.config.runtime.prefetch,
        )

    def _loaded_turn(self, _ready) -> list[float]:
        with self._loader() as batches:
            found = self._turn(lambda: self.run.micro_batches(next(batches)))
        self.next_step += self.untimed + self.steps
        return found

    def _ready_turn(self, ready) -> list[float]:
        return self._turn(lambda: ready)

    def _alone_turn(self, ready) -> list[float]:
        return self._turn(lambda: ready, parallel.alone)

    def _turn(self, batch: Callable[[], list], how: Callable = contextlib.nullcontext) -> list[float]:
        """Seconds of each timed step; all ranks begin together, and the device has nothing left to do at the ends."""
        run, moments = self.run, []
        self._settle()
        with how():
            for number in range(self.untimed + self.steps):
                if number == self.untimed:
                    if run.ranks.device.type == "cuda":
                        torch.cuda.synchronize(run.ranks.device)
                    moments.append(self.clock.now())
                run.step(run.config.training.steps - 1, batch())
                if number >= self.untimed:
                    moments.append(self.clock.now())
        found = [self.clock.seconds(a, b) for a, b in zip(moments, moments[1:], strict=False)]
        self._settle()
        return found

    def _settle(self) -> None:
        if self.run.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.run.ranks.device)
        parallel.wait_for_all()


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Python's garbage is collected before, and not in a step."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
