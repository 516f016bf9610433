"""torch.compile, and the proof that it happened: dynamo's own counters, never elapsed time."""

import contextlib
import os
from dataclasses import dataclass

import torch
import torch.nn as nn

from engine.config import Compile
from engine.ledger import Line
from engine.rules.machine import CUDA_GRAPH_MODES


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


def apply(model: nn.Module, settings: Compile, *, kept: float = 1.0) -> None:
    """Compile each block (`blocks`) or the whole model (`model`), and the loss, in place; `none` does nothing.

    kept: the share of its activations that a compiled graph may keep for its backward pass.
    Raises RuntimeError where dynamo is switched off, or was told to fall back to eager in silence.
    """
    if settings.compile == "none":
        return
    _require_dynamo(settings.compile)
    torch._dynamo.utils.counters.clear()
    torch._functorch.config.activation_memory_budget = kept
    options = {
        "dynamic": settings.compile_dynamic,
        "fullgraph": settings.compile_fullgraph,
        "mode": None if settings.compile_mode == "default" else settings.compile_mode,
    }
    if settings.compile == "blocks":
        for block in model.layers:
            block.compile(**options)
    else:
        model.features = torch.compile(model.features, **options)
    model.loss.compile(**options)


def _require_dynamo(mode: str) -> None:
    import torch._dynamo.config

    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise RuntimeError(
            f"compile = {mode!r} was asked for, but dynamo is switched off: unset TORCH_COMPILE_DISABLE and "
            "TORCHDYNAMO_DISABLE"
        )
    if torch._dynamo.config.suppress_errors:
        raise RuntimeError(
            "torch._dynamo.config.suppress_errors is on: a failed compile would run eagerly in "
            "silence; switch it off (TORCHDYNAMO_SUPPRESS_ERRORS=0)"
        )


def budget() -> float:
    """The share of its activations that a graph compiled now may keep."""
    return torch._functorch.config.activation_memory_budget


def keeps_gradients(settings: Compile) -> bool:
    """Whether gradients must keep their memory between steps.

    CUDA graphs write each backward pass into the same buffers: a gradient that lived there would be
    overwritten by the next micro-batch.
    """
    return settings.compile != "none" and settings.compile_mode in CUDA_GRAPH_MODES


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
        raise RuntimeError(f"compile = {mode!r} was asked for, but dynamo made no graph")


def eager(mode: str):
    """Context for evaluation: run uncompiled, so that other shapes and modes cause no recompile."""
    return contextlib.nullcontext() if mode == "none" else torch.compiler.set_stance("force_eager")


def lines(settings: Compile, graph_replays: int) -> list[Line]:
    """What dynamo did against what was asked for; graph_replays: CUDA graphs launched in the measured step."""
    found = proof()
    wanted = settings.compile != "none"
    agrees = (found.graphs > 0) == wanted and not (wanted and settings.compile_fullgraph and found.breaks)
    requested = f"{settings.compile}, {settings.compile_mode}" if wanted else "none"
    how = "dynamo's counters"
    if wanted and settings.compile_mode in CUDA_GRAPH_MODES:
        how += f"; {graph_replays} CUDA graphs launched in one step"
        agrees = agrees and graph_replays > 0
    return [Line("compile", requested, str(found) if found.graphs else "none", how, agrees)]
