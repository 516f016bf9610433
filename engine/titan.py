"""The only importer of torchtitan: activation checkpointing, device mesh, replicated modules, gradient clipping.

Which parts are used, and which are not and why, is in docs/decisions/0003-torchtitan.md.

`torchtitan/__init__.py` imports its quantization modules, which need triton and take seconds; nothing here
needs them. So the package is registered without running that file, and only the submodules below are loaded.
"""

import importlib.util
import sys

import torch
import torch.nn as nn


def _load_package() -> None:
    if "torchtitan" not in sys.modules:
        spec = importlib.util.find_spec("torchtitan")
        if spec is None:
            raise ModuleNotFoundError("torchtitan 0.2.2 is not installed: pip install torchtitan==0.2.2")
        sys.modules["torchtitan"] = importlib.util.module_from_spec(spec)


_load_package()

from torchtitan.config.job_config import ActivationCheckpoint  # noqa: E402
from torchtitan.distributed import NoParallel, ParallelDims  # noqa: E402, F401  NoParallel: for engine/tensor_parallel.py
from torchtitan.distributed.activation_checkpoint import apply_ac  # noqa: E402
from torchtitan.distributed.utils import clip_grad_norm_  # noqa: E402


def checkpoint_activations(model: nn.Module, mode: str, every: int, *, keep_rng: bool) -> None:
    """Wrap `model.layers` in place so that they recompute all activations in the backward pass.

    mode: full, or every_n (every `every`-th layer).
    keep_rng: replay the random state in the recomputation, which dropout needs.
    """
    from torchtitan.distributed import activation_checkpoint as module

    module._layer_sac_count = 0  # torchtitan counts layers over the life of the process, not of the model
    config = ActivationCheckpoint(
        mode="full" if mode == "full" else "selective",
        selective_ac_option=str(every),
        preserve_rng_state=keep_rng,
        early_stop=True,  # what nothing in the backward pass reads, the last product of a block, is not repeated
    )
    apply_ac(model, config)


def parallel_dims(replicas: int, shards: int, tensor: int, *, device_type: str) -> ParallelDims:
    """The device mesh of replicas × shards × tensor ranks, neighbours within a tensor-parallel group.

    `get_mesh` hands out its parts: dp_replicate, fsdp, tp, batch (replicas and shards together), or a list of
    them; only those larger than 1 exist.
    """
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  backend of the mesh's unused dimensions
    from torchtitan.distributed import parallel_dims as module

    module.device_type = device_type  # its own choice is a GPU, even where the run is on the CPU
    world_size = replicas * shards * tensor
    dims = ParallelDims(
        dp_replicate=replicas, dp_shard=shards, cp=1, tp=tensor, pp=1, ep=1, etp=1, world_size=world_size
    )
    dims.build_mesh()
    return dims


def clip_gradients(parameters, max_norm: float) -> torch.Tensor:
    """Scale gradients in place to a global norm ≤ `max_norm` (0: leave them); return the norm before."""
    return clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"), foreach=True)
