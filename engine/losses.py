"""Cross-entropy of a linear head whose gradient overwrites its logits, a chunk of tokens at a time.

The logits are the largest tensor of a small model: tokens × vocabulary. A plain loss keeps them, copies them to fp32,
and makes their gradient beside them. Here both gradients of the head's product are made in the forward pass, for a
loss of weight 1, so that the logits need not outlive it; the backward pass only scales them. (The idea is Liger's:
arXiv:2410.10989.)

The vocabulary may be split over a tensor-parallel group: then softmax needs two small all-reduces over the tokens.

This module must not know the model, nor decide which kernel is used: that is engine/objectives.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from engine import parallel
from engine.config import Training
from engine.data.batches import IGNORED
from engine.errors import ConfigError
from engine.ledger import Line


@dataclass(frozen=True)
class Vocabulary:
    """The classes, and which of them this process's rows of the head stand for."""

    size: int  # in all processes; what the head has beyond it is padding
    group: object | None = None  # the tensor-parallel process group; each process has as many rows

    def part(self, rows: int) -> tuple[int, int]:
        """(first class, number of classes) of this process's `rows`; the rows behind them are padding."""
        first = self.group.rank() * rows if self.group is not None else 0
        return first, min(max(self.size - first, 0), rows)

    def check(self, rows: int) -> None:
        """Raise ValueError if `rows` a process are too few for all classes."""
        processes = self.group.size() if self.group is not None else 1
        if rows * processes < self.size:
            raise ValueError(
                f"a head of {processes} × {rows} rows is too small for {self.size} classes: it must be split evenly"
            )


@dataclass(frozen=True)
class Plan:
    """How one loss is to be computed."""

    vocabulary: Vocabulary
    dtype: torch.dtype  # of the operands of the head's product
    chunk: int  # tokens whose logits exist at a time, ≥ 1
    saw: Callable[[torch.Tensor], None]  # is shown every tensor of logits
    gradient_scale: torch.Tensor | None = None  # a scalar on the device; the gradients are made with it
    # fp32, takes the weight's gradient, scaled; then autograd gets none
    weight_sum: torch.Tensor | None = None


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden (N, C), weight (rows, C), targets (N,), plan) → summed cross-entropy in nats, an fp32 scalar.

    The weight's gradient is summed in fp32. A second backward pass is an error: the first one scaled the
    gradients in place. With a gradient_scale they are scaled already, at no cost, and the gradient that comes
    in is taken to be 1: call backward() on this loss itself.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, plan: Plan):
        ctx.dtypes, ctx.is_scaled = (hidden.dtype, weight.dtype), plan.gradient_scale is not None
        loss, *gradients = loss_and_gradients(
            hidden,
            weight,
            targets,
            plan,
            for_hidden=ctx.needs_input_grad[0],
            for_weight=ctx.needs_input_grad[1] or plan.weight_sum is not None,
        )
        if plan.weight_sum is not None:
            assert ctx.is_scaled, "what is added to a sum cannot be scaled later"
            gradients[1] = None
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        scaled = [
            None if gradient is None else _scaled(gradient, upstream, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient · factor in `dtype`, multiplied in the wider of both dtypes; in place where it can be."""
    return gradient.to(torch.promote_types(gradient.dtype, dtype)).mul_(factor).to(dtype)


def loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    plan: Plan,
    *,
    for_hidden: bool = False,
    for_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The summed loss of (hidden (N, C), weight (rows, C), targets (N,)), and its gradients if they are wanted.

    hidden and targets are the same in all processes of the group; so is the gradient for hidden.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, weight = hidden.to(plan.dtype), weight.to(plan.dtype)
        buffer = hidden.new_empty(min(plan.chunk, len(hidden)), len(weight))
        hidden_gradient = torch.empty_like(hidden) if for_hidden else None
        weight_gradient, statistics, write = plan.weight_sum, [], for_hidden or for_weight
        for start in range(0, len(hidden), plan.chunk):
            chunk = slice(start, start + plan.chunk)
            inputs, answers = hidden[chunk], targets[chunk]
            logits = torch.mm(inputs, weight.t(), out=buffer[: len(inputs)])
            plan.saw(logits)
            kernel = _kernel(logits)
            statistics.append(
                kernel(logits, answers, plan.vocabulary, write=write, scale=plan.gradient_scale)
            )
            if for_hidden:
                torch.mm(logits, weight, out=hidden_gradient[chunk])
            if for_weight:
                weight_gradient = add_product(weight_gradient, logits.t(), inputs)
        if for_hidden:
            parallel.summed(hidden_gradient, plan.vocabulary.group)
        return _summed_loss(statistics, targets, plan.vocabulary.size), hidden_gradient, weight_gradient


def _kernel(logits: torch.Tensor) -> Callable:
    """The function that reads the logits and writes their gradient, for the device they are on."""
    return _gpu_kernel() if logits.is_cuda else statistics_and_gradient_


def _gpu_kernel() -> Callable:
    try:
        from engine.kernels import cross_entropy
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ConfigError(
            "loss_kernel: fused and chunked need triton on a GPU, and it is not installed; "
            "pip install triton, or use loss_kernel = full"
        ) from None
    return cross_entropy.statistics_and_gradient_


def statistics_and_gradient_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: Vocabulary,
    *,
    write: bool,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """(largest logit, sum of exp(logit - largest), target's logit) of each row, as (3, N), in fp32.

    logits (N, columns) are overwritten: with softmax - onehot(target) if `write` (0 for a target that is
    IGNORED, and in padding), times `scale` if given; otherwise with anything. Statistics and softmax are of the
    whole vocabulary.
    """
    first, classes = vocabulary.part(logits.shape[1])
    work = logits.to(_at_least_fp32(logits.dtype))  # a copy of half-precision logits only
    work[:, classes:] = float("-inf")
    column = targets - first
    is_here = (column >= 0) & (column < classes)
    column = torch.where(is_here, column, 0)[:, None]
    target_logit = torch.where(is_here, work.gather(1, column)[:, 0], 0)
    largest = parallel.largest(work.amax(1), vocabulary.group)
    total = work.sub_(largest[:, None]).exp_().sum(1)
    statistics = torch.stack([largest, total, target_logit])
    parallel.summed(statistics[1:], vocabulary.group)
    if write:
        one = (
            torch.ones_like(statistics[1]) if scale is None else scale.to(work.dtype).expand_as(statistics[1])
        )
        work.mul_(of_counted(one / statistics[1], targets, vocabulary.size)[:, None])
        work.scatter_add_(1, column, -(one * is_here)[:, None])
        if work is not logits:
            logits.copy_(work)
    return statistics


def _summed_loss(statistics: list[torch.Tensor], targets: torch.Tensor, size: int) -> torch.Tensor:
    if not statistics:
        return torch.zeros((), device=targets.device)
    largest, total, target_logit = torch.cat(statistics, dim=1)
    return of_counted(largest + total.log() - target_logit, targets, size).sum()


def of_counted(values: torch.Tensor, targets: torch.Tensor, size: int) -> torch.Tensor:
    """`values` (N,) where the target is a class, 0 where it is IGNORED, NaN where it is neither."""
    missing = torch.where(targets == IGNORED, 0.0, float("nan")).to(values.dtype)
    return torch.where((targets >= 0) & (targets < size), values, missing)


def add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b, in place and in fp32; operands in half precision are summed in fp32 where the device can."""
    if a.dtype is _at_least_fp32(a.dtype):
        return a @ b if total is None else total.addmm_(a, b)
    if a.is_cuda:
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    product = a.float() @ b.float()
    return product if total is None else total.add_(product)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class ScaledGradient(torch.autograd.Function):
    """A loss as it is, whose gradient is multiplied by a scalar tensor on the device."""

    @staticmethod
    def forward(ctx, loss, scale):
        ctx.save_for_backward(scale)
        return loss.clone()  # not a view: FSDP2 warns of a model that returns one

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None


def lines(objective, settings: Training, tokens_in_forward: int) -> list[Line]:
    """Which loss kernel ran in this process's passes; `objective` is an engine.objectives.NextToken.

    tokens_in_forward: tokens of one micro-batch of this process.
    """
    rows, columns = objective.largest_logits
    ran = set(objective.passes)
    if ran == {"in place"}:
        found = "chunked" if rows < tokens_in_forward else "fused"
    else:
        found = " and ".join(sorted(ran)) or "none"
    agrees = {
        "full": ran == {"full"},
        "fused": ran == {"in place"} and rows >= tokens_in_forward,
        "chunked": ran == {"in place"} and rows <= settings.loss_chunk_tokens,
    }[settings.loss_kernel]
    limit = f", {settings.loss_chunk_tokens} tokens" if settings.loss_kernel == "chunked" else ""
    passes = ", ".join(f"{n} {path}" for path, n in sorted(objective.passes.items()))
    return [
        Line(
            "loss_kernel",
            settings.loss_kernel + limit,
            f"{found}, largest logits {rows} × {columns}",
            f"shapes of the logits that the loss made: {passes or 'none'}; {tokens_in_forward} tokens in a "
            "forward pass",
            agrees,
        )
    ]
