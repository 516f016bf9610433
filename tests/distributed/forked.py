"""Several runs, each in several processes, with one import of the engine for all: a fork is torchrun's worker here.

    forked.py RUNS.json

RUNS.json: a list of {name, processes, file, stop_at, unspread, sampler, poison, slow}. With `stop_at` a process fails
just before that step (0-based); with `unspread` the engine's own spreading does nothing; `sampler` is what
break_sampler does, `poison` what poisoned.py does in a rank, `slow` what slowed.py does. The exit statuses of each
run's processes are written to exits.json, and what a process opened for writing, made, renamed or removed below
results/ to writes-NAME-RANK.json. Each run's processes meet through a store on a port that the system chooses, as
torchrun's do.
"""

import gc
import json
import os
import socket
import sys
import traceback
from pathlib import Path

import poisoned
import slowed

# What a run imports late, so that no child has to.
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
import torch.testing._internal.distributed.fake_pg  # noqa: F401

import engine.models.gpt
import engine.optimizers.adamw  # noqa: F401
from engine import parallel, trainer
from engine.config import load
from engine.data.batches import TrainOrder
from engine.errors import ConfigError
from engine.guards import Diverged
from engine.launch import tokens_for
from engine.step import Step
from engine.train import DIVERGED

RESULTS = Path("results").absolute()
writes: list[str] = []


def note(event: str, arguments: tuple) -> None:
    """An audit hook: called by Python before each of its own file operations."""
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        return
    if isinstance(arguments[0], str | bytes | os.PathLike):
        path = Path(os.fsdecode(arguments[0])).absolute()
        if RESULTS in path.parents:
            writes.append(f"{event} {path.relative_to(RESULTS)}")


def break_sampler(reads: str, steps: list[int] | None = None) -> None:
    """Every rank reads all of a step, as if no sampler had been built, or what the first does; only in `steps`.

    interleaved: one process reads in turns what two would read side by side.
    """
    own = TrainOrder.rank_slice

    def rank_slice(self, step: int, rank: int, world: int):
        if steps is not None and step not in steps:
            return own(self, step, rank, world)
        if reads == "interleaved":
            return self.sample_ids(step).reshape(2, -1).T.ravel()
        return self.sample_ids(step) if reads == "all" else own(self, step, 0, world)

    TrainOrder.rank_slice = rank_slice


def break_engine(run: dict) -> None:
    if run.get("unspread"):
        parallel.spread = lambda model, *_: model
    if "sampler" in run:
        break_sampler(**run["sampler"])
    if "slow" in run:
        slowed.install(**run["slow"])
    if "poison" in run:
        poisoned.install(run["name"], **run["poison"])


def train(run: dict, config, tokens) -> int:
    """Train in this process, with the probes; its exit status."""
    whole = Step.__call__

    def call(self, step, micro_batches):
        if step == run.get("stop_at"):
            raise SystemExit(1)
        return whole(self, step, micro_batches)

    Step.__call__ = call
    break_engine(run)
    sys.addaudithook(note)
    try:
        trainer.run(config, tokens)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Diverged:
        return DIVERGED
    except SystemExit as error:
        return error.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(rank: int, run: dict, config, tokens, port: int) -> int:
    """Start one process of a run; its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(run["processes"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the parent's
        }
        status = train(run, config, tokens)
        Path(f"writes-{run['name']}-{rank}.json").write_text(json.dumps(writes), encoding="utf-8")
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    exits = {}
    gc.freeze()  # what is imported is nobody's garbage, and a child that looks through it copies it
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        config = load(run["file"])
        tokens = tokens_for(config)
        # The store's thread begins after the forks: one that holds a lock at a fork holds it in the child for ever.
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        children = [fork(rank, run, config, tokens, port) for rank in range(run["processes"])]
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        exits[run["name"]] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        del store
    Path("exits.json").write_text(json.dumps(exits), encoding="utf-8")


if __name__ == "__main__":
    main()
