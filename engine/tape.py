"""Writes down every storage that is made and freed, so that any moment can be looked at afterwards.

It knows bytes and labels only; what they are for is said by who uses it.
"""

import contextlib
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Label = tuple[str, str]  # (kind, part): what a storage is for, and which part of the model made it
Event = tuple[int, int, Label]  # (number of the storage, its bytes from now on, label); 0 bytes: it is freed


@dataclass(frozen=True)
class Trace:
    """What was alive at two moments, in bytes by label."""

    peak: Counter  # when most was alive
    forward: Counter  # after the first forward pass, less what was alive at its start


class Tape(TorchDispatchMode):
    """While it is active, every new storage is noted with the label that is set then."""

    supports_higher_order_operators = True

    def __init__(self, *, rounding: int = 1):
        """rounding: a storage takes a multiple of so many bytes."""
        super().__init__()
        self.label: Label = ("temporary", "other")
        self.paused = False
        self.work_memory: Callable = lambda function, args: 0  # bytes that a kernel takes while it runs
        self._rounding, self._numbers = rounding, itertools.count()
        self._storages: dict[int, tuple[weakref.ref, int]] = {}
        self._events: list[Event] = []
        self._marks: dict[str, int] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile works as if this mode were not there."""
        return True

    def add(self, tensor: torch.Tensor, label: Label | None = None) -> None:
        """Count the storage of `tensor`, if it is not counted yet, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        number = self.take(storage.nbytes(), label or self.label)

        def freed(_, key=key, number=number):
            del self._storages[key]
            self.give(number)

        self._storages[key] = (weakref.ref(storage, freed), number)

    def relabel(self, tensor: torch.Tensor, label: Label, share: float = 1.0) -> None:
        """From now on `tensor` is something else, and this rank holds `share` of it."""
        self.add(tensor)
        storage = tensor.untyped_storage()
        _, number = self._storages[storage._cdata]
        self._events.append((number, self._rounded(storage.nbytes() * share), label))

    def take(self, size: float, label: Label) -> int:
        """Count `size` bytes that are no tensor; returns the number to give them back with."""
        number = next(self._numbers)
        self._events.append((number, self._rounded(size), label))
        return number

    def give(self, number: int) -> None:
        """What was taken is free again."""
        self._events.append((number, 0, ("", "")))

    @contextlib.contextmanager
    def held(self, size: float, label: Label) -> Iterator[None]:
        """`size` bytes are taken inside."""
        number = self.take(size, label)
        yield
        self.give(number)

    @contextlib.contextmanager
    def labelled(self, kind: str, part: str) -> Iterator[None]:
        """What is made inside is that."""
        before, self.label = self.label, (kind, part)
        yield
        self.label = before

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """What is made inside is not counted."""
        before, self.paused = self.paused, True
        yield
        self.paused = before

    def label_calls(self, module: nn.Module, part: str, kind: str | None = None) -> None:
        """What `module` makes when it is called is labelled `part`, of the kind that is set then unless given."""
        before = []

        def enter(*_):
            before.append(self.label)
            self.label = (kind or self.label[0], part)

        def leave(*_):
            self.label = before.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def mark(self, name: str) -> None:
        """Remember this moment, the first time that it is named since the tape was restarted."""
        self._marks.setdefault(name, len(self._events))

    def restart(self) -> None:
        """Forget what was; what is alive stays counted."""
        self._events = [(n, size, label) for n, (size, label) in _alive(self._events).items()]
        self._marks = {}

    def trace(self) -> Trace:
        """Look at the tape since it was restarted; the moments "start" and "forward" have been marked."""
        sizes, total, highest, at = {}, 0, -1, 0
        for i, (number, size, _) in enumerate(self._events):
            total += size - sizes.get(number, 0)
            sizes[number] = size
            if total > highest:
                highest, at = total, i + 1
        start, forward = (_by_label(self._events[: self._marks[name]]) for name in ("start", "forward"))
        forward.subtract(start)
        return Trace(_by_label(self._events[:at]), +forward)

    def _rounded(self, size: float) -> int:
        return -(-int(size) // self._rounding) * self._rounding

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.paused:
            for value in tree_iter(result):
                if isinstance(value, torch.Tensor):
                    self.add(value)
            if size := self.work_memory(function, args):
                self.give(self.take(size, ("temporary", "work memory of kernels")))
        return result


def _alive(events: list[Event]) -> dict[int, tuple[int, Label]]:
    alive = {}
    for number, size, label in events:
        if size:
            alive[number] = (size, label)
        else:
            alive.pop(number, None)
    return alive


def _by_label(events: list[Event]) -> Counter:
    found = Counter()
    for size, label in _alive(events).values():
        found[label] += size
    return found
