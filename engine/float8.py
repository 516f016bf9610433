"""Float8 training of the blocks' Linears: torchao, dynamic scales, one a tensor.

Products of a Linear and of its gradients take e4m3 (gradients: e5m2) operands and give bf16; weights, their
gradients and all outside the Linears of `model.layers` stay as they were. torchao 0.18 needs torch ≥ 2.11.
"""

import importlib.util

import torch
import torch.nn as nn

from engine.ledger import Line

MULTIPLE = 16  # torch._scaled_mm takes operands whose rows and columns are multiples of this
CAPABILITY = (8, 9)  # Ada and Hopper are the first with float8 matrix products


def check(wanted: bool, device: torch.device, micro_tokens: int) -> list[str]:
    """Problems of float8 on this device.

    micro_tokens: of one forward pass, the inner size of the products that give the weights' gradients.
    """
    if not wanted:
        return []
    if importlib.util.find_spec("torchao") is None:
        return ["float8 = true: needs torchao, which is not installed: pip install torchao"]
    if device.type != "cuda":
        return ["float8 = true: needs a GPU, and this run is on the CPU"]
    problems, found = [], torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        problems.append(
            f"float8 = true: needs a GPU of compute capability ≥ {_dotted(CAPABILITY)}; "
            f"{torch.cuda.get_device_name(device)} has {_dotted(found)}"
        )
    if micro_tokens % MULTIPLE:
        problems.append(
            f"float8 = true: a micro-batch has {micro_tokens} tokens; must be a multiple of {MULTIPLE}"
        )
    return problems


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def convert(model: nn.Module, *, emulate: bool = False) -> None:
    """Replace the Linears of the blocks in place, where both sizes allow it; parameters stay the same.

    Before activation checkpointing, compile and sharding. emulate: round to float8, but multiply in full
    precision, on any device (tests).
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(
        model.layers,
        module_filter_fn=lambda linear, _: not any(size % MULTIPLE for size in linear.weight.shape),
        config=Float8LinearConfig(emulate=emulate),
    )


def lines(model: nn.Module, wanted: bool) -> list[Line]:
    """How many Linears of the blocks multiply in float8; no line where none was asked for and none does."""
    linears = [m for m in model.layers.modules() if isinstance(m, nn.Linear)]
    found = sum(type(m).__name__ == "Float8Linear" for m in linears)
    if not wanted and not found:
        return []
    return [
        Line(
            "float8",
            "linear layers of the blocks" if wanted else "none",
            f"{found} of {len(linears)} linear layers of the blocks",
            "classes of the modules",
            wanted and found == len(linears),
        )
    ]
