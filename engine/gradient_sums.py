"""Gradients of matrices, summed over micro-batches by the products that make them; and weights cast once a step.

Autograd makes a weight's gradient in 16 bits, copies it to fp32, and adds the copy to the sum; and autocast casts
every weight in every forward pass. Here the product of a weight's gradient adds to the fp32 sum itself, and a pass
reads a 16-bit copy of the weights that is made at the start of a step. (Megatron-LM has the first half, as gradient
accumulation fusion.) Products are summed in fp32: one rounding less than autograd's. For a bias's gradient what comes
back is read once more (engine/kernels/column_sums.py): as sums that the compiler fused with other operations, biases
took an eighth of a step of GPT-2 124M. Where GELU makes what comes back, it is summed as it is made, not read again
(engine/kernels/gelu.py).

Rows of the embedding are added with atomic operations on a GPU, so two runs may differ there in the last bit.

The operations are torch custom ones: compiled code calls them as they are, activation checkpointing sees them, and
torch's profiler counts them for the ledger. Norms and learned positions stay with autograd.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from engine import losses, parallel
from engine.ledger import Line
from engine.models.mlp import MLP


@torch.library.custom_op("plumbline::add_product_", mutates_args=("total",))
def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (n, k) fp32 += a (n, m) @ b (m, k)."""
    losses.add_product(total, a, b)


@torch.library.custom_op("plumbline::add_rows_", mutates_args=("total",))
def add_rows_(total: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """total[index[i]] += rows[i], in total's dtype: index (n,), rows (n, k)."""
    total.index_add_(0, index, rows.to(total.dtype))


@torch.library.custom_op("plumbline::add_columns_", mutates_args=("total",))
def add_columns_(total: torch.Tensor, rows: torch.Tensor) -> None:
    """total (n,) fp32 += rows (m, n), summed over m in fp32."""
    if rows.is_cuda:
        from engine.kernels import column_sums

        column_sums.add_(total, rows)
    else:
        total.add_(rows.sum(0, dtype=total.dtype))


@torch.library.custom_op("plumbline::gelu_gradient_", mutates_args=("bias_total",))
def gelu_gradient_(x: torch.Tensor, gradient: torch.Tensor, bias_total: torch.Tensor) -> torch.Tensor:
    """The gradient for x (…, n) from that for gelu(x); bias_total (n,) fp32 += its sum over all but the last."""
    if _in_triton(x):
        from engine.kernels import gelu as kernel

        return kernel.gradient_(x, gradient, bias_total)
    result = torch.ops.aten.gelu_backward(gradient, x)
    bias_total.add_(result.flatten(0, -2).sum(0, dtype=bias_total.dtype))
    return result


@torch.library.custom_op("plumbline::gelu", mutates_args=())
def gelu(x: torch.Tensor, bias_total: torch.Tensor) -> torch.Tensor:
    """Exact GELU of x (…, n); the backward pass adds the gradient of the bias in x to bias_total (n,)."""
    if _in_triton(x):
        from engine.kernels import gelu as kernel

        return kernel.forward(x)
    return F.gelu(x)


def _in_triton(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


@torch.library.custom_op("plumbline::linear", mutates_args=())
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    total: torch.Tensor,
    bias: torch.Tensor | None = None,
    bias_total: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (…, k) @ weight (n, k) transposed + bias (n,); the backward pass adds their gradients to the totals."""
    return F.linear(x, weight, bias)


# Fakes take the memory that the real ones take for a while: the memory plan counts it.
@add_product_.register_fake
def _(total, a, b):
    if not a.is_cuda:  # a GPU sums in place; and torch 2.11's compiler cannot trace the call that does
        losses.add_product(total, a, b)


@add_rows_.register_fake
def _(total, index, rows):
    rows.to(total.dtype)


@add_columns_.register_fake
def _(total, rows):
    pass


@gelu_gradient_.register_fake
def _(x, gradient, bias_total):
    return torch.empty_like(x)


@gelu.register_fake
def _(x, bias_total):
    return torch.empty_like(x)


@linear.register_fake
def _(x, weight, total, bias=None, bias_total=None):
    return x.new_empty(*x.shape[:-1], len(weight))


@register_flop_formula(torch.ops.plumbline.linear)
def _(x_shape, weight_shape, *_, **__) -> int:
    """As much as F.linear: the compiler weighs by it what to recompute under a memory budget."""
    return 2 * math.prod(x_shape) * weight_shape[0]


def _keep(ctx, inputs, output) -> None:
    # The totals are not saved but kept: they change before the backward pass, and may.
    x, weight, ctx.total, _, ctx.bias_total = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, gradient):
    x, weight = ctx.saved_tensors
    rows = gradient.flatten(0, -2)
    add_product_(ctx.total, rows.t(), x.flatten(0, -2))
    if ctx.bias_total is not None:
        add_columns_(ctx.bias_total, rows)
    return gradient @ weight, None, None, None, None


linear.register_autograd(_backward, setup_context=_keep)


def _keep_input(ctx, inputs, output) -> None:
    x, ctx.bias_total = inputs
    ctx.save_for_backward(x)


def _gelu_backward(ctx, gradient):
    return gelu_gradient_(*ctx.saved_tensors, gradient, ctx.bias_total), None


gelu.register_autograd(_gelu_backward, setup_context=_keep_input)


class _Rows(torch.autograd.Function):
    """Rows of an embedding; the weight's gradient goes to `total`, and none to autograd.

    No operation of its own, so that the compiler can fuse reading the rows with what follows.
    """

    @staticmethod
    def forward(ctx, weight, index, total):
        ctx.save_for_backward(index)
        ctx.total = total
        return F.embedding(index, weight)

    @staticmethod
    def backward(ctx, gradient):
        (index,) = ctx.saved_tensors
        add_rows_(ctx.total, index.flatten(), gradient.flatten(0, -2))
        return None, None, None


class SummedLinear(nn.Linear):
    """A Linear whose gradients are summed in place. `work` and `work_bias`: weight and bias as a pass reads them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (…, in) → (…, out)
        if not torch.is_grad_enabled():
            return super().forward(x)
        return linear(x.to(self.work.dtype), self.work, self.total, self.work_bias, self.bias_total)


class SummedMLP(MLP):
    """An MLP whose GELU sums the gradient of the bias before it: `up`, a SummedLinear, leaves its own to it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C) → (B, T, C)
        return self.out(gelu(self.up(x), self.total)) if torch.is_grad_enabled() else super().forward(x)


class SummedEmbedding(nn.Embedding):
    """An Embedding whose weight's gradient is summed in place."""

    def forward(self, index: torch.Tensor) -> torch.Tensor:  # (…) → (…, C)
        return (
            _Rows.apply(self.weight, index, self.total) if torch.is_grad_enabled() else super().forward(index)
        )


class GradientSums:
    """The sums of one model's gradients, and the copies of its weights."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, group_size: int):
        """Take over the Linears and MLPs of the blocks, the token embedding and the head; `group_size`: replicas.

        After the weights are where they stay, and before activation checkpointing and compile.
        """
        self.parameters = list(model.parameters())
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # (copy, weight)
        self.linears = [m for m in model.layers.modules() if type(m) is nn.Linear]
        for module in self.linears:
            module.__class__ = SummedLinear
            module.work, module.total = self._copy(module.weight, dtype), _alias(module.weight)
            biased = module.bias is not None
            module.work_bias = self._copy(module.bias, dtype) if biased else None
            module.bias_total = _alias(module.bias) if biased else None
        for module in [m for m in model.layers.modules() if type(m) is MLP]:
            if module.activation == "gelu" and module.up.bias is not None:
                module.__class__ = SummedMLP
                module.total, module.up.bias_total = module.up.bias_total, None
        model.token_embedding.__class__ = SummedEmbedding
        model.token_embedding.total = _alias(model.token_embedding.weight)
        head = model.head_weight
        model.loss.summed_head = (self._copy(head, dtype), _alias(head))
        self.group_size, self.exchanged = group_size, 0
        self.steps = 0  # for which the copies were made

    def _copy(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        copy = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        self._copies.append((copy, weight.detach()))
        return copy

    @property
    def held(self) -> list[torch.Tensor]:
        """The copies of the weights, for whoever counts memory."""
        return [copy for copy, _ in self._copies]

    def refresh(self) -> None:
        """Copy the weights: at the start of every step."""
        self.steps += 1
        self.copy()

    def copy(self) -> None:
        """Copy the weights as they are now."""
        torch._foreach_copy_(*map(list, zip(*self._copies, strict=True)))

    def exchange(self) -> None:
        """Add up the sums of all replicas: after the last micro-batch of a step."""
        if self.group_size > 1:
            self.exchanged = parallel.sum_over_replicas([p.grad for p in self.parameters])


def _alias(weight: torch.Tensor) -> torch.Tensor:
    """The weight's sum under a version counter of its own: torch takes a saved tensor that changed for a mistake."""
    return weight.grad.data


def lines(
    sums: GradientSums | None, wanted: str, counts, *, head: int, accumulation: int, steps: int
) -> list[Line]:
    """How many products added to their sums in the measured step.

    counts: those of engine.operations; head: those that the loss noted; steps: taken by the run in this process.
    """
    kinds = (("add_product_",), ("add_columns_", "gelu_gradient_"), ("add_rows_",))
    found = [sum(counts.get(f"plumbline::{name}", 0) for name in names) for names in kinds]
    if wanted == "autograd" and sums is None and not any(found):
        return []
    found += [head, sums.steps if sums else 0]
    layers = [len(sums.linears), sum(m.bias is not None for m in sums.linears), 1, 1] if sums else [0] * 4
    expected = [count * accumulation for count in layers] + [steps if sums else 0]
    named = (
        "gradients of linear layers",
        "of their biases",
        "of the embedding",
        "of the head",
        "steps with new copies of weights",
    )
    how = "of one step, added in place: " + ", ".join(
        f"{n} of {of} {what}" for n, of, what in zip(found, expected, named, strict=True)
    )
    in_effect = "fused" if sums and found == expected else "not all fused" if any(found[:4]) else "autograd"
    return [Line("gradient_sums", wanted, in_effect, how, in_effect == wanted)]
