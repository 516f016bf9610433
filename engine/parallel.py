"""The only owner of torch.distributed: process group, ranks, DDP, FSDP2.

Gradient rule: the loss is a sum over targets divided by their count in the whole step, so gradients of the
ranks must be added. FSDP2 is told to divide by 1; DDP always averages, so the loss is multiplied by its size.
"""

import contextlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn

from engine.config import Parallel
from engine.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process's place among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(settings: Parallel, device: str) -> Ranks:
    """Choose this process's device and join the process group that torchrun describes, if there is one.

    Raises ConfigError when the device is missing or the number of processes is not the one asked for.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if settings.processes and settings.processes != world_size:
        raise ConfigError(
            f"processes = {settings.processes}, but {world_size} were launched: use torchrun "
            f"--nproc-per-node {settings.processes}, or set processes = 0"
        )
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
    if world_size > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=target if on_gpu else None)
    return Ranks(rank, world_size, target)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def spread(model: nn.Module, kind: str, ranks: Ranks) -> nn.Module:
    """Replicate (ddp) or shard (fsdp) `model` over the ranks; one rank keeps it as it is."""
    if ranks.world_size == 1:
        return model
    from engine import titan

    mesh = titan.data_parallel_mesh(kind, ranks.world_size, ranks.device.type)
    if kind == "ddp":
        torch._dynamo.config.optimize_ddp = False  # it splits graphs at buckets, and fails with checkpointing
        on_gpu = ranks.device.type == "cuda"
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[ranks.device] if on_gpu else None,
            device_mesh=mesh,
            gradient_as_bucket_view=True,
        )
    from torch.distributed.fsdp import fully_shard

    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in [*model.layers, model]:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    return model


def loss_factor(kind: str, ranks: Ranks) -> float:
    """What the loss is multiplied by so that gradients come out added over ranks."""
    return float(ranks.world_size) if kind == "ddp" else 1.0


@contextlib.contextmanager
def synchronise_if(model: nn.Module, last: bool):
    """Exchange gradients in this backward pass only if it is the `last` micro-batch of the step."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The one-dimensional `tensor` of every rank, one after another; all have the same size."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def wait_for_all() -> None:
    """A barrier."""
    if dist.is_initialized():
        dist.barrier()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
