"""What a GPU does otherwise than a CPU, as far as memory is concerned, for fake tensors on the CPU.

Its attention kernels, its loss kernel, autocast's rules for norms and softmax, and the work memory of its libraries.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F

from engine import losses
from engine.models import reciprocal
from engine.optimizers import spam

ROUNDING = 512  # bytes: CUDA's allocator hands out multiples of it
BLAS_WORKSPACE = 32 * 2**20  # bytes: cuBLAS's on Hopper, taken from the allocator for good
KEPT_IN_FP32 = {  # by CUDA's autocast, not by the CPU's: operator → which argument is its dtype
    "layer_norm": None,
    "softmax.int": 2,
    "log_softmax.int": 2,
}


@contextlib.contextmanager
def rules(attention: str) -> Iterator[None]:
    """Inside, fake CPU tensors are treated as a GPU would treat them; attention: the setting."""
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")  # noqa: TOR901  it ends below
    for name, dtype_argument in KEPT_IN_FP32.items():
        library.impl(name, _in_fp32(name, dtype_argument))
    with (
        mock.patch.object(F, "scaled_dot_product_attention", _attention(attention)),
        mock.patch.object(reciprocal, "fused", _flex),
        mock.patch.object(
            reciprocal, "masks", lambda length, window, device: (True, length > window + 1 or None)
        ),
        mock.patch.object(losses, "_kernel", lambda logits: _loss_kernel),
        mock.patch.object(losses, "add_product", _add_product),
        mock.patch.object(spam, "kernel", lambda _: _in_place),
    ):
        yield
    library._destroy()


def _in_fp32(name: str, dtype_argument: int | None):
    """Autocast's kernel of an operator that CUDA computes in fp32 whatever its operands are."""
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, base), overload or "default")

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            args = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
            return operator(*args, **kwargs)

    return kernel


def _attention(wanted: str):
    """F.scaled_dot_product_attention as a GPU runs it with this setting of `attention`."""
    aten = torch.ops.aten

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
        if torch.is_autocast_enabled("cpu"):
            q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
        half = q.dtype in (torch.bfloat16, torch.float16)
        kernel = ("flash" if half else "efficient") if wanted == "sdpa" else wanted
        if kernel == "flash":
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
        if kernel == "cudnn":
            return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, dropout_p, is_causal)[0]
        if kernel == "efficient":
            return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout_p, is_causal)[0]
        return aten._scaled_dot_product_attention_math(q, k, v, None, dropout_p, is_causal)[0]

    return attention


def _flex(q, k, v, _mask, _scale) -> tuple[torch.Tensor, torch.Tensor]:
    """reciprocal.fused: what is kept is q, k, v, the output and a number a row, as of the efficient kernel."""
    k, v = (x.expand(-1, q.size(1), -1, -1) for x in (k, v))
    y, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)[:2]
    return y, lse[..., : q.size(-2)]


def work_memory(function, args) -> int:
    """Bytes that a kernel takes while it runs.

    The backward passes of flash and cuDNN attention add up the gradient of the queries in fp32; where heads share
    keys and values, flash's has their gradients for each head first.
    """
    aten = torch.ops.aten
    flash = aten._scaled_dot_product_flash_attention_backward.default
    if function in (
        flash,
        aten._scaled_dot_product_cudnn_attention_backward.default,
    ):
        q, k = args[1:3]
        for_each_head = function is flash and k.size(1) != q.size(1)
        return q.numel() * 4 + 2 * q.numel() * q.itemsize * for_each_head
    return 0


def _loss_kernel(logits: torch.Tensor, *_args, **_options) -> torch.Tensor:
    """engine/kernels/cross_entropy.py: the gradient overwrites the logits, and nothing is made beside them."""
    return torch.empty(3, len(logits))


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A GPU multiplies half-precision operands into fp32, in place."""
    return torch.empty(len(a), b.shape[1]) if total is None else total


def _in_place(*_args) -> None:
    """engine/kernels/spam.py: an update makes nothing."""
