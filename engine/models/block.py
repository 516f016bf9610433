"""What every transformer here is made of: a layer with two residual branches, and how weights are drawn.

Pre-norm follows GPT-2 (Radford et al. 2019): x + f(LN(x)). Post-norm follows Vaswani et al. 2017: LN(x + f(x)).
"""

import hashlib
import math

import torch
import torch.nn as nn

from engine.models.attention import Cache, MultiHead
from engine.models.latent import Latent
from engine.models.mlp import MLP

INIT_STD = (
    0.02  # of all matrices and embeddings; projections into the residual stream are scaled down (GPT-2)
)


class Block(nn.Module):
    """One transformer layer with its two residual branches. The stream keeps the dtype it comes in.

    causal: a token sees none that follow it.
    """

    def __init__(self, s, rotary: nn.Module | None, causal: bool = True):
        super().__init__()
        self.norm_placement = s.norm_placement
        self.norm1 = nn.LayerNorm(s.width, bias=s.bias)
        self.attention = (
            Latent(s, rotary) if s.attention_form == "latent" else MultiHead(s, rotary, causal=causal)
        )
        self.norm2 = nn.LayerNorm(s.width, bias=s.bias)
        self.mlp = MLP(s.width, s.activation, bias=s.bias, inner=s.mlp_width)
        self.dropout = nn.Dropout(s.dropout)

    def forward(
        self, x: torch.Tensor, cache: Cache | None = None, mask: torch.Tensor | tuple | None = None
    ) -> torch.Tensor:
        """x (B, T, C) → (B, T, C).

        mask (B, 1, 1, T): False for tokens that none sees, where it is not causal; or (B, 1, T, T): for those that
        each does not see; or of reciprocal.masks.
        """
        seen = () if mask is None else (mask,)
        if self.norm_placement == "pre":
            x = x + self.dropout(self.attention(self.norm1(x), cache, *seen)).to(x.dtype)
            return x + self.dropout(self.mlp(self.norm2(x))).to(x.dtype)
        # Under autocast a norm gives fp32, which here would widen the stream.
        x = self.norm1(x + self.dropout(self.attention(x, cache, *seen))).to(x.dtype)
        return self.norm2(x + self.dropout(self.mlp(x))).to(x.dtype)


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int, real_rows: dict[str, int]) -> None:
    """Draw every parameter of `model`, with its `layers`, from a generator of its own, made from `seed` and its name.

    So a weight is the same in every model that has it, whatever else the models have: paired seeds start alike.
    real_rows: of matrices whose other rows are padding, and 0.
    """
    into_stream = INIT_STD / math.sqrt(2 * len(model.layers))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            (nn.init.zeros_ if name.endswith("bias") else nn.init.ones_)(p)
            continue
        std = into_stream if name.endswith(("attention.out.weight", "mlp.out.weight")) else INIT_STD
        if p.dim() == 3:  # a map within each head: what it maps keeps its variance
            std = p.size(1) ** -0.5
        real = real_rows.get(name, p.size(0))
        nn.init.normal_(p[:real], std=std, generator=_generator(seed, name))
        p[real:] = 0.0


def as_operand(x: torch.Tensor) -> torch.Tensor:
    """What autocast makes of `x` when a matrix product reads it: a norm gives fp32, twice the memory."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
