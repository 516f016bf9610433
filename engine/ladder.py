"""Out of memory: how it is told apart from other errors, where the limit is, and what is tried next when asked for.

Each rung of the ladder changes how a run is computed, never what: the batch of a step and the learning rate stay.
Every rung taken is an event of the run and a line of its ledger, so that no table shows the run as it was asked for.
"""

import gc
import sys
from collections.abc import Callable, Iterator

import torch

from engine.config import Config, Memory, is_effective, resolve
from engine.errors import ConfigError
from engine.ledger import Line

EVENT = "out_of_memory"
SIGNS = (  # in messages of errors that are not torch.OutOfMemoryError
    "out of memory",  # CUDA, HIP, NCCL
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or the error that it was raised from, means that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def check(config: Config, world_size: int, device_type: str) -> list[str]:
    """What cannot be done here with these settings, as problems for a ConfigError."""
    problems = []
    if config.memory.on_out_of_memory == "ladder" and world_size > 1:
        problems.append(
            f"on_out_of_memory = 'ladder': one process cannot change what the other {world_size - 1} do; use "
            "on_out_of_memory = 'stop', and python -m engine.plan FILE to find what fits"
        )
    if config.memory.memory_limit_gib and device_type == "cpu" and config.compile.compile != "none":
        problems.append(
            f"memory_limit_gib = {config.memory.memory_limit_gib:g}: the memory of a compiled model cannot be "
            "measured on a CPU, so the limit would not be kept; use compile = 'none' or a GPU"
        )
    return problems


def limit_memory(settings: Memory, device: torch.device) -> None:
    """Make the GPU's allocator refuse what goes beyond memory_limit_gib. On a CPU, see check_limit.

    Raises ConfigError for a limit above what the GPU has.
    """
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    limit = settings.memory_limit_gib * 2**30 or total
    if limit > total:
        raise ConfigError(
            f"memory_limit_gib = {settings.memory_limit_gib:g}: {device} has {total / 2**30:.1f} GiB"
        )
    torch.cuda.set_per_process_memory_fraction(limit / total, device)


def check_limit(peak_bytes: int | None, settings: Memory) -> None:
    """Raise torch.OutOfMemoryError when the measured peak of a step is above memory_limit_gib.

    For a CPU, whose allocator knows no limit. None means that the allocator itself keeps it.
    """
    limit = settings.memory_limit_gib
    if limit and peak_bytes is not None and peak_bytes > limit * 2**30:
        raise torch.OutOfMemoryError(
            f"one step took {peak_bytes / 2**30:.3g} GiB; memory_limit_gib = {limit:g}"
        )


def rungs(config: Config) -> list[tuple[str, dict]]:
    """The rungs of the ladder from `config` on, as (name, {setting: value}); each comes on top of those before.

    Only what changes something. The micro-batch goes down to 1, always a divisor of the batch.
    """
    found = []
    if config.training.loss_kernel != "chunked":
        found.append(("chunked loss", {"loss_kernel": "chunked"}))
    if config.memory.activation_checkpointing != "full" and not config.compile.step_graph:
        found.append(("full activation checkpointing", {"activation_checkpointing": "full"}))
    found += [(f"micro-batch {m}", {"micro_batch_size": m}) for m in _smaller_micro_batches(config)]
    # Uncompiled, the reciprocal term has its scores written out, which is more.
    if config.compile.compile != "none" and config.model.attention != "flex":
        found.append(("no compile", {"compile": "none"}))
    return [rung for rung in found if changed(config, rung[1]) != config]


def _smaller_micro_batches(config: Config) -> Iterator[int]:
    """At most half as large each time. One process has the whole batch."""
    batch = config.training.batch_size
    micro = config.training.micro_batch_size or batch
    while micro > 1:
        micro = next(m for m in range(micro // 2, 0, -1) if batch % m == 0)
        yield micro


def changed(config: Config, changes: dict) -> Config:
    """`config` with these settings, without those that have no effect any more."""
    values = config.flat | changes
    return resolve({k: v for k, v in values.items() if is_effective(k, values)}, "the out-of-memory ladder")


def run_with_ladder(config: Config, train: Callable[[Config, list[dict]], None]) -> None:
    """Call `train(config, events)`; where settings ask for it, again with less each time that memory runs out.

    `events` are the rungs taken so far. Raises torch.OutOfMemoryError, naming all that was tried, when there
    is nothing left to change; without the ladder, the error is `train`'s own.
    """
    if config.memory.on_out_of_memory == "stop":
        return train(config, [])
    events: list[dict] = []
    steps = iter(rungs(config))
    while (message := _attempt(config, train, events)) is not None:
        free_memory()
        name, changes = next(steps, (None, {}))
        if name is None:
            tried = ", ".join(event["rung"] for event in events) or "nothing could be changed"
            raise torch.OutOfMemoryError(f"nothing is left to try after: {tried}; {message}")
        before = config.flat
        config = changed(config, changes)
        differences = {k: [before[k], v] for k, v in changes.items()}
        events.append({"event": EVENT, "rung": name, "changed": differences, "message": message})


def _attempt(config: Config, train, events: list[dict]) -> str | None:
    """None, or the first line of the message when memory ran out.

    The error itself is not kept: its traceback holds every tensor of the attempt.
    """
    try:
        train(config, list(events))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return (str(error) or type(error).__name__).splitlines()[0]


def free_memory() -> None:
    """Give back what a failed attempt held: its garbage, the allocator's cache, compiled code and its proof."""
    gc.unfreeze()
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch._dynamo.utils.clear_compilation_metrics()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def limit_line(settings: Memory, device: torch.device, peak_bytes: int | None) -> Line:
    """Whether the run stays within memory_limit_gib, or without one within the GPU: beyond it, memory is paged.

    peak_bytes: of the measured step, on a CPU; None where it cannot be measured.
    """
    limit, held, how = settings.memory_limit_gib * 2**30, peak_bytes, "tensors of the measured step"
    if device.type == "cuda":
        limit = limit or torch.cuda.get_device_properties(device).total_memory
        held, how = torch.cuda.memory_reserved(device), "what the allocator holds"
    return Line(
        "memory_limit_gib",
        f"{settings.memory_limit_gib:g}" if settings.memory_limit_gib else "all there is",
        "not measurable here" if held is None else f"{held / 2**30:.3g} GiB",
        how,
        not limit or (held is not None and held <= limit),
    )


def lines(events: list[dict]) -> list[Line]:
    """One line for each setting that was changed because memory ran out; never in agreement."""
    first, last, how = {}, {}, {}
    for event in events:
        for name, (before, after) in event["changed"].items():
            first.setdefault(name, before)
            last[name] = after
            how.setdefault(name, []).append(f"out of memory at {before}: {event['message']}")
    return [
        Line(f"{name}, as first asked", str(first[name]), str(last[name]), "; then ".join(how[name]), False)
        for name in first
    ]
