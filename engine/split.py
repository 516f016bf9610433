"""Tensors of which each rank has a part: from the part to the whole and back, whichever way they are split.

A tensor that is not split is its own part and its own whole.
"""

import torch


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
