"""A whole training step as one CUDA graph: forward, backward, clipping and update are launched by one call.

A small model's operations end before the host can start the next one. Replayed, they follow each other without it.
The first steps run as they are: they make the optimizer's state, compile, and are looked at for the ledger. Then one
is recorded, and every later step is that recording, reading its batch and its learning rates where the recorded one
did. Nothing in `Step.compute` may ask the device for a number, or count on the host.
"""

import contextlib
from collections.abc import Callable

import torch

from engine.ledger import Line

EAGER_STEPS = 3  # of a process: the measured step is the last of them
Batches = list[tuple[torch.Tensor, torch.Tensor]]


class StepGraph:
    """Callable as the `compute` that it is given: micro-batches → tensors on the device, which are the caller's."""

    def __init__(
        self, compute: Callable[[Batches], dict], optimizer: torch.optim.Optimizer, device: torch.device
    ):
        """The optimizer's learning rates become tensors, because a recording reads nothing but memory."""
        self._compute, self._optimizer = compute, optimizer
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._graph: torch.cuda.CUDAGraph | None = None
        self.eager = self.replays = 0  # steps so far
        # Of a replayed step's tensors: the allocator counts them only while the step is recorded.
        self.peak_bytes = 0
        self.set_rates([group["lr"] for group in optimizer.param_groups])

    def set_rates(self, rates: list[float]) -> None:
        """The learning rate of each group from the next step on."""
        for group, tensor, rate in zip(self._optimizer.param_groups, self._rates, rates, strict=True):
            tensor.fill_(rate)
            group["lr"] = tensor  # a checkpoint may have left another

    def __call__(self, micro_batches: Batches) -> dict:
        if self.eager < EAGER_STEPS:
            self.eager += 1
            return self._compute(micro_batches)
        if self._graph is None:
            self._record(micro_batches)
        for kept, new in zip(self._batches, micro_batches, strict=True):
            torch._foreach_copy_(kept, new)
        self._graph.replay()
        self.replays += 1
        return {name: value if value is None else value.clone() for name, value in self._measured.items()}

    def _record(self, micro_batches: Batches) -> None:
        """Record a step without taking it. Another thread may use the device meanwhile: it makes batches ahead."""
        self._batches = [(inputs.clone(), targets.clone()) for inputs, targets in micro_batches]
        self._graph = torch.cuda.CUDAGraph()
        with _capturable(self._optimizer), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._measured = self._compute(self._batches)
        self.peak_bytes = torch.cuda.max_memory_allocated(self._rates[0].device)


@contextlib.contextmanager
def _capturable(optimizer: torch.optim.Optimizer):
    """Torch asks every group for this flag when its update is recorded, and warns of it at any other time."""
    before = [group.get("capturable", False) for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["capturable"] = True
        yield
    finally:
        for group, flag in zip(optimizer.param_groups, before, strict=True):
            group["capturable"] = flag


def lines(graph: StepGraph | None, wanted: bool, steps: int) -> list[Line]:
    """How many of this process's `steps` were replayed; nothing where none is asked for."""
    if graph is None and not wanted:
        return []
    replays, expected = (graph.replays if graph else 0), max(0, steps - EAGER_STEPS)
    return [
        Line(
            "step_graph",
            str(wanted),
            f"{replays} of {steps} steps replayed",
            f"counted; the first {EAGER_STEPS} steps of a process run as they are",
            graph is not None and wanted and replays == expected,
        )
    ]


def check(wanted: bool, device_type: str, world_size: int) -> list[str]:
    """Problems that show once device and processes are known; those between settings are in engine/rules."""
    if not wanted:
        return []
    if device_type != "cuda":
        return [f"step_graph = true: would do nothing on a {device_type.upper()}; it needs a GPU"]
    return [f"step_graph = true: is of one process, and {world_size} were launched"] if world_size > 1 else []
