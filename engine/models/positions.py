"""Positions that are computed, not learned: sinusoids added to the embedding, and rotations of queries and keys."""

import torch
import torch.nn as nn

BASE = 10000.0  # of the wavelengths, which run from 2π to 2π · BASE tokens (Vaswani et al. 2017)


def angles(context: int, width: int) -> torch.Tensor:
    """position / BASE^(2i / width) for i < width / 2, in radians: (context, width / 2), fp32."""
    i = torch.arange(width // 2, dtype=torch.float64)
    positions = torch.arange(context, dtype=torch.float64)
    return torch.outer(positions, BASE ** (-2 * i / width)).float()


class Sinusoids(nn.Module):
    """Fixed positions (Vaswani et al. 2017, section 3.5): sin in the even features, cos in the odd ones.

    Scaled to the root mean square `rms`, that of learned positions when they begin: the embeddings of this model are
    that small too, and sinusoids of amplitude 1 would drown them.
    """

    def __init__(self, context: int, width: int, rms: float):
        super().__init__()
        angle = angles(context, width + width % 2)
        table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]
        self.register_buffer("table", table * (rms * 2**0.5), persistent=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:  # (T,) → (T, C)
        return self.table[positions]


class Rotary(nn.Module):
    """Rotary positions (RoFormer, Su et al. 2021): q and k are rotated by their position, so q·k sees the distance.

    Feature i turns together with feature i + d/2, as in GPT-NeoX and Llama: RoFormer's neighbours (2i, 2i + 1) under
    a fixed permutation of the features. Rotations are computed in fp32 and given back in the dtype of x.
    """

    def __init__(self, context: int, width: int):
        super().__init__()
        angle = angles(context, width)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(
        self, x: torch.Tensor, start: int = 0
    ) -> torch.Tensor:  # (..., T, d), positions start … → same
        cos, sin = (table[start : start + x.size(-2)] for table in (self.cos, self.sin))  # (T, d/2)
        left, right = x.float().chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)
