"""Tensors of which each rank has a part: from the part to the whole and back, whichever way they are split.

A tensor that is not split is its own part and its own whole.
"""

import torch


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def with_local(tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """`part`, as this rank's part of a sharded tensor if `tensor` is one."""
    return type(tensor)(part, tensor._spec, requires_grad=False) if hasattr(tensor, "to_local") else part


def whole(like: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """All of the tensor of which this rank has `part`, split over ranks as `like` is; every rank must call this."""
    return with_local(like, part).full_tensor() if hasattr(like, "to_local") else part


def own_part(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of `tensor`, which every rank has, split as `like` is; nothing is exchanged."""
    if not hasattr(like, "to_local"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(tensor.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, like.placements).to_local()


def share(tensor: torch.Tensor, world_size: int) -> float:
    """Of how much of a sum over all ranks this rank's part counts: 1 where it is in no other rank's part."""
    parts = 1
    if hasattr(tensor, "to_local"):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            parts *= 1 if placement.is_replicate() else size
    return parts / world_size


def offset(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where in the whole tensor the first element of this rank's part is, in each dimension."""
    if not hasattr(tensor, "to_local"):
        return (0,) * tensor.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(
        compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]
    )
