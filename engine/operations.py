"""Which of torch's operations really ran, compiled or not: counted by torch's own profiler, on the host's side.

It must not slow a step much, and must not be left on: the trainer looks at one step of a run.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch.autograd.profiler import profile

ATTENTION_KERNELS = {
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_efficient_attention": "efficient",
    "aten::_scaled_dot_product_attention_math": "math",
}
# What an operation calls that is handed to Python: to a dispatch mode (selective checkpointing) or a tensor's class.
HANDED_ON = ("PythonDispatchMode", "PythonSubclass")


class Event(NamedTuple):
    """A call of an operation: times in nanoseconds."""

    thread: int
    start: int
    end: int
    name: str


class Operations:
    """Context around a step; afterwards `counts` has how often each operation ran, by its name (`aten::mm`)."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.graph_replays = 0  # CUDA graphs launched; what they hold does not pass through torch again
        self._profile = profile(use_cpu=True)
        self._replay = None

    def __enter__(self) -> Self:
        self._replay = replay = torch.cuda.CUDAGraph.replay

        def counted(graph):
            self.graph_replays += 1
            return replay(graph)

        torch.cuda.CUDAGraph.replay = counted
        self._profile.__enter__()
        return self

    def __exit__(self, *raised) -> None:
        torch.cuda.CUDAGraph.replay = self._replay
        self._profile.__exit__(*raised)
        events = self._profile.kineto_results.events()
        self.counts = ran(
            Event(e.start_thread_id(), e.start_ns(), e.start_ns() + e.duration_ns(), e.name())
            for e in events
            if not e.is_async()
        )
        del self._profile  # the raw events

    @property
    def attention_kernels(self) -> dict[str, int]:
        return attention_kernels(self.counts)

    @property
    def visible(self) -> bool:
        """False where the model ran inside a CUDA graph, so that nothing can be said about its operations."""
        return bool(self.counts) and (not self.graph_replays or bool(self.attention_kernels))


def ran(events: Iterable[Event]) -> Counter[str]:
    """How often each operation ran.

    A call that calls its own name again is one. A call that was handed to Python and came back without calling its
    own name again did not run: selective checkpointing answers it from what it kept.
    """
    counts: Counter[str] = Counter()
    around: list[_Call] = []  # the calls that the next event may be inside of, innermost last

    def close(until: int | None = None) -> None:
        while around and (until is None or around[-1].event.end <= until):
            call = around.pop()
            counts[call.event.name] += not call.is_replaced and call.event.name not in HANDED_ON

    for event in sorted(events, key=lambda e: (e.thread, e.start, -e.end)):
        close(event.start if around and around[-1].event.thread == event.thread else None)
        if event.name in HANDED_ON and around:
            around[-1].is_replaced = True
        for call in around:
            if call.event.name == event.name:
                call.is_replaced = True
        around.append(_Call(event))
    close()
    return +counts


@dataclass
class _Call:
    event: Event
    is_replaced: bool = False  # by a call inside it, or by Python


def attention_kernels(counts: Counter[str]) -> dict[str, int]:
    """Forward calls of each kernel: SDPA's flash, cudnn, efficient, math, and flex. Attention written out has none.

    The math kernel's name is lost where it is compiled: what is left of it are matrix products.
    """
    found: Counter[str] = Counter()
    for name, kernel in ATTENTION_KERNELS.items():
        found[kernel] += counts[name]
    found["flex"] = sum(n for name, n in counts.items() if _is_flex(name))
    return dict(+found)


def _is_flex(name: str) -> bool:
    """Whether it is a forward kernel that Inductor made of flex_attention: templates are named by what they fuse."""
    template = name.startswith("triton_tem_fused") and "mm" not in name
    return (template or "flex_attention" in name) and name.startswith("triton_") and "backward" not in name
