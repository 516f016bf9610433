"""Before the first collective of several processes: do all come, on which devices, and do they reach each other?

Every rank tells the others who it is through the store at which torchrun has them meet; then one small all-reduce.
Whoever is missing, or hangs, is named by the others after preflight_seconds, where torch itself would wait for half
an hour and name nobody. One process needs none of it.

The exit status is NOT_MET where not all came or the all-reduce did not end.
"""

import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.environment import processor
from engine.errors import ConfigError
from engine.probes import progress_line

NOT_MET = 5  # exit status
LAST_WORDS = 10.0  # seconds that a process which is about to end waits for the store
STAGES = {  # how far a rank has got, in the order in which it does
    "place": "came no further than the meeting",
    "joining": "joining the process group",
    "exchanging": "waiting in the first all-reduce",
    "done": "done with it",
}
ENDED = "the process that keeps the ranks' meeting place has ended: see what it said"
USUAL_WAIT = timedelta(minutes=30)  # torch's own, for what the store is used for afterwards


class NotMet(Exception):
    """Processes of the run that did not come, or came and then did not answer."""


@dataclass(frozen=True)
class Place:
    """Who a process is, and what it computes on."""

    rank: int
    local_rank: int
    host: str
    device: str
    name: str  # of the device
    memory_gib: float | None  # of a GPU
    visible: str  # GPUs that the process may see
    uuid: str  # of a GPU, whatever number it has in this process

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host}, {self.device} ({self.name})"


def here(rank: int, local_rank: int, device: torch.device) -> Place:
    """This process, on the `device` that it has taken."""
    if device.type != "cuda":
        return Place(rank, local_rank, platform.node(), str(device), processor(), None, "", "")
    gpu = torch.cuda.get_device_properties(device)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", f"all {torch.cuda.device_count()}")
    memory = round(gpu.total_memory / 2**30, 1)
    return Place(
        rank,
        local_rank,
        platform.node(),
        str(device),
        gpu.name,
        memory,
        visible,
        str(getattr(gpu, "uuid", "")),
    )


class Preflight:
    """One process's part of it: `meet`, then join the process group and `exchange` inside `watched`."""

    def __init__(self, place: Place, world_size: int, seconds: float):
        """seconds: how long to wait for the others, each time."""
        self.place, self.world_size, self.seconds = place, world_size, seconds
        self.places: list[Place] = []  # of all ranks, once they have met
        self.store: dist.Store | None = None  # for torch.distributed.init_process_group
        self._began = time.perf_counter()
        self.wall_seconds = 0.0  # that all of it took this process

    def meet(self) -> None:
        """Wait until every rank has told who it is.

        Raises NotMet, naming who is missing, and ConfigError where two ranks took one GPU.
        """
        deadline = time.monotonic() + self.seconds
        self.store = _connect(self.place.rank, self.world_size, self.seconds, host=self.place.rank == 0)
        told, keys = dist.PrefixStore("preflight", self.store), [f"place/{r}" for r in range(self.world_size)]
        try:
            self._tell("place", json.dumps(asdict(self.place)))
            try:
                told.wait(keys, timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
            except dist.DistStoreError:
                raise NotMet(_missing(told, keys, self.seconds)) from None
            self.places = [Place(**json.loads(told.get(key))) for key in keys]
        except dist.DistError:
            raise NotMet(ENDED) from None
        if problems := [*unlike(self.places), *shared_gpus(self.places)]:
            raise ConfigError(problems)

    @contextlib.contextmanager
    def watched(self):
        """Joining the process group and the first exchange belong inside: either ends, or the process does.

        What hangs there hangs in a library, so that a thread ends the process with NOT_MET; an error there raises
        NotMet. Both name the ranks.
        """
        began = time.monotonic()
        watch = threading.Timer(self.seconds, _end_process, [self._stuck])
        watch.daemon = True
        watch.start()
        self._tell("joining")
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            watch.cancel()
            seconds = time.monotonic() - began
            raise NotMet(
                f"{self._stuck(f'failed after {seconds:.1f} s')}; {str(error).splitlines()[0]}"
            ) from error
        finally:
            watch.cancel()
        self.store.set_timeout(USUAL_WAIT)
        self.wall_seconds = time.perf_counter() - self._began

    def exchange(self, device: torch.device) -> None:
        """One small all-reduce over all ranks. Raises RuntimeError for a sum that is not theirs."""
        self._tell("exchanging")
        found = torch.full((1,), float(self.place.rank + 1), device=device)
        dist.all_reduce(found)
        expected = self.world_size * (self.world_size + 1) / 2
        if found.item() != expected:
            raise RuntimeError(f"the sum over ranks is {found.item():g}, not {expected:g}")
        self._tell("done")

    def _tell(self, stage: str, text: str = "") -> None:
        dist.PrefixStore("preflight", self.store).set(f"{stage}/{self.place.rank}", text)

    def _stuck(self, what: str = "") -> str:
        """How far each rank has got; `what` became of the exchange, if not that it did not end in time."""
        try:  # over another connection, because what hangs may be using the first
            again = _connect(self.place.rank, self.world_size, min(self.seconds, LAST_WORDS), host=False)
            told = dist.PrefixStore("preflight", again)
            reached = [[s for s in STAGES if told.check([f"{s}/{p.rank}"])][-1] for p in self.places]
        except (RuntimeError, NotMet):
            return f"the first all-reduce {what or 'did not end'}, and {ENDED}"
        return stuck(self.places, reached, what or f"did not end within {self.seconds:g} s")


def _connect(rank: int, world_size: int, seconds: float, *, host: bool) -> dist.Store:
    """The store at which the processes meet: torchrun's, or without one rank 0's, if this process is to `host` it.

    torch.distributed.rendezvous would make rank 0 wait for the others without knowing who they are.
    """
    wait = timedelta(seconds=seconds)
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if absent:
        raise ConfigError(
            f"WORLD_SIZE = {world_size}, but no {' and no '.join(absent)}: start it with torchrun"
        )
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=wait))
            return store
        return dist.TCPStore(address, port, world_size, host, timeout=wait, wait_for_workers=False)
    except dist.DistError as error:
        keeper = "torchrun" if "TORCHELASTIC_USE_AGENT_STORE" in os.environ else f"rank 0 of {world_size}"
        raise NotMet(
            f"rank {rank} did not reach the meeting place {address}:{port}, which {keeper} keeps, within "
            f"{seconds:g} s: {str(error).splitlines()[0]}"
        ) from None


def _missing(told: dist.Store, keys: list[str], seconds: float) -> str:
    there = [rank for rank, key in enumerate(keys) if told.check([key])]
    places = [Place(**json.loads(told.get(keys[rank]))) for rank in there]
    absent = [rank for rank in range(len(keys)) if rank not in there]
    return (
        f"{_ranks(absent)} of {len(keys)} did not come within {seconds:g} s; there: {_named(places)}. See what they "
        "said where they were started; preflight_seconds gives them longer"
    )


def stuck(places: list[Place], reached: list[str], what: str) -> str:
    """A first all-reduce and `what` became of it, whoever is behind first; `reached`: the stage of each rank."""
    parts = [
        f"{_named([p for p, last in zip(places, reached, strict=True) if last == stage])}: {words}"
        for stage, words in STAGES.items()
        if stage in reached
    ]
    if len(parts) == 1:
        parts.append("all are there, so look at the network between them")
    return f"the first all-reduce {what}. " + "; ".join(parts)


def unlike(places: Iterable[Place]) -> list[str]:
    """Ranks on other kinds of device than most, as a problem for a ConfigError: they could exchange nothing."""
    kinds: dict[str, list[Place]] = {}
    for place in places:
        kinds.setdefault(place.device.split(":")[0], []).append(place)
    if len(kinds) == 1:
        return []
    return [
        "; ".join(f"{_named(of)}" for of in kinds.values())
        + ": all must compute on one kind of device; look at "
        "CUDA_VISIBLE_DEVICES there, or set device = 'cpu'"
    ]


def shared_gpus(places: Iterable[Place]) -> list[str]:
    """Ranks that took the same GPU of the same host, as problems for a ConfigError."""
    users: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        if place.device != "cpu":
            users.setdefault((place.host, place.uuid or place.device), []).append(place)
    return [
        f"{_ranks([p.rank for p in several])} share one GPU of host {several[0].host}: "
        f"{', '.join(f'{p.device} of CUDA_VISIBLE_DEVICES = {p.visible}' for p in several)}; launch one process a "
        "GPU, each with its own LOCAL_RANK, as torchrun does"
        for several in users.values()
        if len(several) > 1
    ]


def device_map(places: Iterable[Place]) -> list[dict]:
    """rank → device, for env.json: hosts are numbered, and no GPU has its identity, because results are published."""
    places = list(places)
    hosts = list(dict.fromkeys(p.host for p in places))
    kept = ("rank", "local_rank", "device", "name", "memory_gib")
    return [{"host": hosts.index(p.host), **{key: getattr(p, key) for key in kept}} for p in places]


def tell(ranks) -> None:
    """Print which rank is on which device, as a progress line: of several `ranks`, or of one with a GPU."""
    if not ranks.is_first or (ranks.world_size == 1 and ranks.device.type == "cpu"):
        return
    progress_line(
        event="devices",
        torch=torch.__version__,
        cuda=torch.version.cuda,
        preflight_seconds=round(ranks.preflight_seconds, 3),
        ranks=[{k: v for k, v in asdict(place).items() if k != "uuid"} for place in ranks.places],
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _named(places: Iterable[Place]) -> str:
    return ", ".join(map(str, places)) or "nobody"


def _end_process(why: Callable[[], str]) -> None:
    print(f"error: {why()}", file=sys.stderr, flush=True)
    os._exit(NOT_MET)
