"""Muon (Jordan et al. 2024) for the matrices of the blocks; AdamW for embeddings, head and vectors.

    M = μ M + (1 - μ) G     N = (1 - μ) G + μ M     O = N with its singular values near 1
    W -= lr (λ W + √max(1, m/n) O)     of W (m, n)

O comes from five steps of a Newton–Schulz iteration. A parameter of three dimensions is one matrix a head.

A matrix must be whole for that: of one that is split over ranks, whichever way, all of N is gathered on every rank,
each makes all of O, and keeps its part. The momentum stays split.
"""

import math
from collections import defaultdict

import torch

from engine import split
from engine.optimizers.groups import MATRICES
from engine.split import local

COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # of X, X Xᵀ X, X Xᵀ X Xᵀ X: steepest at 0, so that small values grow fast
ITERATIONS = 5
SMALLEST_NORM = 1e-7
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build(groups: list[dict], settings) -> torch.optim.Optimizer:
    """`groups`: of engine.optimizers.groups.of; that of the matrices has a momentum of its own."""
    for group in groups:
        if group["name"] == MATRICES:
            group["momentum"], group["precision"] = settings.muon_momentum, settings.muon_precision
    return Muon(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True
    )


class Muon(torch.optim.AdamW):
    """torch's fused AdamW, whose group of matrices is updated by Muon. `made` says in which dtype, of each matrix."""

    def __init__(self, groups: list[dict], **adamw):
        super().__init__(groups, **adamw)
        self.made: dict[torch.Tensor, torch.dtype] = {}

    def __setstate__(self, state: dict) -> None:
        """Not AdamW's own, which asks every state for its count of steps."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient; there is no `closure` in the engine."""
        groups = self.param_groups
        for group in groups:
            if group["name"] == MATRICES:
                by_shape = defaultdict(list)  # together they take one product where each alone takes its own
                for p in group["params"]:
                    if p.grad is not None:
                        by_shape[p.shape].append(p)
                for alike in by_shape.values():
                    self._update(alike, group)
        try:
            self.param_groups = [group for group in groups if group["name"] != MATRICES]
            super().step()
        finally:
            self.param_groups = groups

    def _update(self, alike: list[torch.Tensor], group: dict) -> None:
        """One step of matrices of one shape; none where `found_inf` says so."""
        found = getattr(self, "found_inf", None)
        refused = None if found is None else found.bool()
        wanted = self._wanted(alike, group["momentum"], refused)
        dtype = DTYPES[group["precision"]]
        whole = torch.stack([split.whole(p, n.to(dtype)) for p, n in zip(alike, wanted, strict=True)])
        del wanted
        made = orthogonal(whole)
        self.made |= dict.fromkeys(alike, made.dtype)
        rows, columns = made.shape[-2:]
        step = group["lr"] * math.sqrt(max(1.0, rows / columns))
        decay = 1 - group["lr"] * group["weight_decay"]
        if refused is not None:
            made = torch.where(refused, 0.0, made)
            decay = torch.where(refused, 1.0, decay)
        own = [local(p) for p in alike]
        parts = [split.own_part(p, m).to(p.dtype) for p, m in zip(alike, made.unbind(), strict=True)]
        torch._foreach_mul_(own, decay)
        torch._foreach_mul_(parts, -step)  # by itself, because it may be a tensor
        torch._foreach_add_(own, parts)

    def _wanted(self, alike: list, momentum: float, refused: torch.Tensor | None) -> list[torch.Tensor]:
        """This rank's part of N, having renewed M."""
        for p in alike:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        kept = [local(self.state[p]["momentum_buffer"]) for p in alike]
        gradients = [local(p.grad) for p in alike]
        new = torch._foreach_lerp(kept, gradients, 1 - momentum)
        if refused is not None:  # the gradient may not be a number
            new = [torch.where(refused, old, n) for old, n in zip(kept, new, strict=True)]
        torch._foreach_copy_(kept, new)
        del new
        return torch._foreach_lerp(gradients, kept, momentum)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """U Vᵀ of x = U S Vᵀ (…, m, n), but for singular values within about 0.7 to 1.2; products in x's dtype.

    Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = COEFFICIENTS
    shape, tall = x.shape, x.size(-2) > x.size(-1)
    x = x.reshape(-1, *shape[-2:])
    if tall:  # the smaller of x xᵀ and xᵀ x
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return (x.mT if tall else x).reshape(shape)


def lines(settings, optimizer: torch.optim.Optimizer) -> list:
    """The ledger's line: which parameters Muon updated, and in which dtype."""
    from engine.ledger import Line

    if not isinstance(optimizer, Muon):
        return [Line("muon", "matrices of the blocks", "none", "class of the optimizer", False)]
    matrices = [p for g in optimizer.param_groups if g["name"] == MATRICES for p in g["params"]]
    rest = [p for g in optimizer.param_groups if g["name"] != MATRICES for p in g["params"]]
    found, wanted = optimizer.made, DTYPES[settings.muon_precision]
    dtypes = ", ".join(sorted({str(d).removeprefix("torch.") for d in found.values()})) or "none yet"
    of = f"of {len(matrices)} matrices of the blocks"
    how = (
        f"results of Newton–Schulz iterations so far; Muon: {sum(p.numel() for p in matrices)} parameters, AdamW: "
        f"{sum(p.numel() for p in rest)} of {len(rest)} other tensors"
    )
    agrees = bool(matrices) and found.keys() == set(matrices) and set(found.values()) == {wanted}
    return [
        Line(
            "muon",
            f"{len(matrices)} {of}, in {_name(wanted)}",
            f"{len(found)} {of}, in {dtypes}",
            how,
            agrees,
        )
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
