"""How far the updates of each head's weights stand out of their noise, by Adam's moments: which head to prune first.

It must not prune anything.
"""

from collections.abc import Mapping

import torch
import torch.nn as nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's names of m and v


def head_snr(
    attention: nn.Module,
    state: Mapping,
    *,
    gamma: float = 1.0,
    delta: float = 0.5,
    epsilon: float = 1e-8,
) -> torch.Tensor | None:
    """(H,) fp32: the median of |m|^γ / (v + ε)^δ over the weights that are one head's alone and are not 0.

    A weight that is exactly 0 is pruned, and its moments are 0 or only fade. NaN for a head that has no other.
    attention: a MultiHead or a Latent; state: an optimizer's. None where the optimizer keeps no such moments of
    all of them. Where weights and state are sharded, every rank must call it.
    """
    parts = []
    for weight, of_heads in attention.weights_of_heads():
        moments = [state.get(weight, {}).get(name) for name in MOMENTS]
        if any(one is None for one in moments):
            return None
        m, v = (of_heads(_whole(one).float()) for one in moments)  # (H, n)
        there = of_heads(_whole(weight.detach())) != 0
        parts.append(torch.where(there, m.abs().pow(gamma) / (v + epsilon).pow(delta), torch.nan))
    return torch.cat(parts, 1).nanmedian(1).values


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
