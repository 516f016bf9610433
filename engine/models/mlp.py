"""The feed-forward sublayer: a wider layer with a non-linearity, plain or gated (Shazeer 2020, GLU variants)."""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "swiglu": F.silu,
    "geglu": F.gelu,
}
GATED = ("swiglu", "geglu")


def hidden_width(width: int, activation: str, *, bias: bool) -> int:
    """The MLP's inner width: 4 × width; gated, the one whose parameter count is nearest to that MLP's.

    Plain, C → 4C → C has 8C² parameters, and 5C with biases. Gated has three matrices, C → h twice and h → C: 3Ch,
    and 2h + C with biases. So h = 8C² / 3C = 8C/3, or with biases (8C² + 4C) / (3C + 2), rounded to a whole number.
    """
    if activation not in GATED:
        return 4 * width
    return round((8 * width**2 + 4 * width * bias) / (3 * width + 2 * bias))


class MLP(nn.Module):
    """(B, T, C) → (B, T, C): out(f(up(x))), or gated out(f(gate(x)) · up(x)).

    `gate` and `up` are two matrices whose rows belong together, so that tensor parallelism can split both alike.
    """

    def __init__(self, width: int, activation: str, *, bias: bool):
        super().__init__()
        self.activation, hidden = activation, hidden_width(width, activation, bias=bias)
        if activation in GATED:
            self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.out = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = FUNCTIONS[self.activation]
        if self.activation in GATED:
            return self.out(f(self.gate(x)) * self.up(x))
        return self.out(f(self.up(x)))
