"""torch.compile, and the proof that it happened: dynamo's own counters, never elapsed time."""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn as nn


@dataclass(frozen=True)
class Proof:
    """What dynamo says it did in this process."""

    graphs: int
    breaks: int
    recompiles: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.graphs} graphs, {self.breaks} breaks, {self.recompiles} recompiles, {self.seconds:.1f} s"
        )


def apply(model: nn.Module, mode: str) -> None:
    """Compile each block (`blocks`) or the whole model (`model`), in place; `none` does nothing.

    Raises RuntimeError where dynamo was told to fall back to eager in silence.
    """
    if mode == "none":
        return
    if torch._dynamo.config.suppress_errors:
        raise RuntimeError(
            "torch._dynamo.config.suppress_errors is on: a failed compile would run eagerly in "
            "silence; switch it off (TORCHDYNAMO_SUPPRESS_ERRORS=0)"
        )
    torch._dynamo.utils.counters.clear()
    for module in model.layers if mode == "blocks" else [model]:
        module.compile(dynamic=False)


def proof() -> Proof:
    """Read dynamo's counters."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    metrics = get_compilation_metrics()
    microseconds = sum(
        (m.dynamo_cumulative_compile_time_us or 0) + (m.backward_cumulative_compile_time_us or 0)
        for m in metrics
    )
    return Proof(
        graphs=counters["stats"]["unique_graphs"],
        breaks=sum(counters["graph_break"].values()),
        recompiles=sum(getattr(m, "recompile_reason", None) is not None for m in metrics),
        seconds=microseconds / 1e6,
    )


def require_compiled(mode: str) -> None:
    """Raise RuntimeError if compiling was asked for and dynamo has made no graph."""
    if mode != "none" and proof().graphs == 0:
        raise RuntimeError(
            f"compile = {mode!r} was asked for, but dynamo made no graph: is it disabled "
            "(TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE)?"
        )


def eager(mode: str):
    """Context for evaluation: run uncompiled, so that other shapes and modes cause no recompile."""
    return contextlib.nullcontext() if mode == "none" else torch.compiler.set_stance("force_eager")
