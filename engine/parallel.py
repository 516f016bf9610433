"""The only owner of torch.distributed: process group, ranks, DDP, FSDP2, HSDP, and their mesh with tensor parallel.

The world is replicas × shards × tensor: ranks of one tensor-parallel group are neighbours and read the same samples;
`data_rank` counts the groups. What is summed over samples is summed over ranks that read different ones only.

Gradient rule: the loss is a sum over targets divided by their count in the whole step, so gradients of the
ranks must be added. FSDP2 is told to divide by 1; DDP always averages, so the loss is multiplied by its size.

Nothing here may assume one machine: RANK says who a process is, LOCAL_RANK only which GPU it takes.
"""

import contextlib
import inspect
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from engine import preflight, world
from engine.config import Parallel
from engine.errors import ConfigError

# Its name since torch 2.13, and before.
SYNCHRONISE_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
    else "broadcast_buffers"
)
BUCKET_MB = 100  # of gradients that DDP exchanges at once: few, so that compiled blocks are not waited for


@dataclass(frozen=True)
class Ranks:
    """This process's place among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    tensor_size: int = 1  # ranks that split every matrix product between them
    dims: Any = field(default=None, repr=False)  # torchtitan's ParallelDims; None for one process
    places: tuple[preflight.Place, ...] = field(default=(), repr=False)  # of all ranks
    preflight_seconds: float = 0.0  # that it took until they had met

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of the samples this rank reads."""
        return self.rank // self.tensor_size

    @property
    def data_size(self) -> int:
        """How many parts the samples are read in: replicas × shards."""
        return self.world_size // self.tensor_size

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that read different samples and hold the same part of the matrices; None for all ranks."""
        return (
            self.dims.get_mesh("batch").get_group() if self.tensor_size > 1 and self.data_size > 1 else None
        )

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The ranks that split every matrix product with this one; None for this one alone."""
        return self.dims.get_mesh("tp").get_group() if self.tensor_size > 1 else None


_joined: Ranks | None = None  # lives as long as torch's process group, and like it belongs to the process


def start(settings: Parallel, device: str) -> Ranks:
    """Choose this process's device and join the process group that torchrun describes, if there is one.

    Raises ConfigError when the device is missing or the number of processes does not fit the settings, and
    preflight.NotMet when not all processes come or they do not reach each other.
    """
    global _joined  # noqa: PLW0603
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if problems := world.problems(settings, world_size):
        raise ConfigError(problems)
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device = 'cuda': no GPU is visible to torch; use device = 'auto' or 'cpu'")
    on_gpu = has_gpu and device != "cpu"
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; launch at "
            "most one process a GPU"
        )
    target = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(target)
    place = preflight.here(rank, local_rank, target)
    if world_size == 1:
        return Ranks(rank, world_size, target, places=(place,))
    from engine import titan

    check = preflight.Preflight(place, world_size, settings.preflight_seconds)
    check.meet()
    with check.watched():
        backend, own = ("nccl", target) if on_gpu else ("gloo", None)
        dist.init_process_group(backend, store=check.store, rank=rank, world_size=world_size, device_id=own)
        check.exchange(target)
    # It tells each time that gradient norms and whole weights take two collectives on a mesh of two dimensions.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    dims = titan.parallel_dims(*world.sizes(settings, world_size), device_type=target.type)
    _joined = Ranks(
        rank, world_size, target, settings.tensor_parallel, dims, tuple(check.places), check.wall_seconds
    )
    return _joined


def stop() -> None:
    """Leave the process group."""
    global _joined  # noqa: PLW0603
    _joined = None
    if dist.is_initialized():
        dist.destroy_process_group()


def apply_tensor_parallel(model: nn.Module, ranks: Ranks) -> None:
    """Split the matrices of `model` over its tensor-parallel group, in place, if there is one.

    Before activation checkpointing and compile, which must see the split modules; `model.loss` is installed already.
    """
    if ranks.tensor_size > 1:
        from engine import tensor_parallel

        tensor_parallel.apply(model, ranks.dims.get_mesh("tp"))


def spread(model: nn.Module, settings: Parallel, ranks: Ranks) -> nn.Module:
    """Replicate (ddp), shard (fsdp) or both (hsdp) `model` over the ranks that read different data.

    After tensor parallel, activation checkpointing and compile. One rank keeps the model as it is; so do replicas
    whose gradients do not go through autograd (engine/gradient_sums.py): their sums are exchanged by it.
    """
    if ranks.data_size == 1 or model.gradient_sums is not None:
        return model
    if settings.data_parallel == "ddp":
        torch._dynamo.config.optimize_ddp = False  # it splits graphs at buckets, and fails with checkpointing
        on_gpu = ranks.device.type == "cuda"
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[ranks.device] if on_gpu else None,
            device_mesh=ranks.dims.get_mesh("dp_replicate"),
            **{SYNCHRONISE_BUFFERS: False},  # they are constants
            bucket_cap_mb=BUCKET_MB,
            gradient_as_bucket_view=True,
        )
    from torch.distributed.fsdp import fully_shard

    mesh = ranks.dims.get_mesh("fsdp" if settings.data_parallel == "fsdp" else ["dp_replicate", "fsdp"])
    blocks = list(model.layers) if settings.shard_unit == "block" else []
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=settings.reshard_after_forward)
    fully_shard(model, mesh=mesh)  # what is in no block stays gathered until its backward pass is over
    model.keep_gathered = not blocks or not settings.reshard_after_forward
    for module in [*blocks, model]:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    return model


def loss_factor(model: nn.Module) -> float:
    """What the loss is multiplied by so that gradients of `model`, spread, come out added over ranks."""
    is_averaged = isinstance(model, nn.parallel.DistributedDataParallel)
    return float(model.process_group.size()) if is_averaged else 1.0


def exchange(model: nn.Module, ranks: Ranks) -> tuple[str, str]:
    """(how `model`, spread, exchanges gradients, or none; why it cannot do without, or '')."""
    if ranks.world_size == 1:
        return "none", ""
    if ranks.tensor_size > 1:
        return "", "tensor parallel ranks exchange activations within every block"
    if hasattr(model, "set_requires_gradient_sync"):
        return "", "sharded weights are gathered from the other ranks in every step"
    return "ddp", ""


@contextlib.contextmanager
def alone():
    """Inside, nothing is exchanged between ranks, for a model that can do without: see `exchange`."""
    global _joined  # noqa: PLW0603
    before, _joined = _joined, None
    try:
        yield
    finally:
        _joined = before


@contextlib.contextmanager
def synchronise_if(model: nn.Module, last: bool):
    """Exchange gradients in this backward pass, and free weights kept until then, only if it is the step's `last`."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(last)
        if model.keep_gathered:  # the next micro-batch needs the same weights
            model.set_reshard_after_backward(last)
        yield
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not (last and _joined):
        with model.no_sync():
            yield
    else:
        yield


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks that read different data, in place."""
    if _joined and _joined.data_size > 1:
        dist.all_reduce(tensor, group=_joined.data_group)
    return tensor


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The one-dimensional `tensor` of every rank that reads different data, one after another.

    All have the same size.
    """
    if not _joined or _joined.data_size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(_joined.data_size)]
    dist.all_gather(parts, tensor, group=_joined.data_group)
    return torch.cat(parts)


def of_all_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The one-dimensional `tensor` of every rank of the run, one after another. All have the same size."""
    if not _joined:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(_joined.world_size)]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def sum_over_replicas(tensors: list[torch.Tensor]) -> int:
    """Add up each of `tensors` over all ranks that read different data, in place; how many ranks that were."""
    if not _joined:
        return 1
    if dist.get_backend(_joined.data_group) == "nccl":
        with dist._coalescing_manager(_joined.data_group):  # one launch for all of them
            for tensor in tensors:
                dist.all_reduce(tensor, group=_joined.data_group)
    else:
        for tensor in tensors:
            dist.all_reduce(tensor, group=_joined.data_group)
    return dist.get_world_size(_joined.data_group)


def summed(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum of `tensor` over the ranks of `group`, in place; None: this rank alone."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def largest(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The elementwise maximum of `tensor` over the ranks of `group`, in place; None: this rank alone."""
    if group is not None:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return tensor


def wait_for_all() -> None:
    """A barrier."""
    if dist.is_initialized():
        dist.barrier()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights, whole and on the CPU, by their plain names (every rank must call this)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        name: tensor.contiguous() for name, tensor in get_model_state_dict(model, options=options).items()
    }
