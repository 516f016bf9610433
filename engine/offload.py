"""Optimizer state in host memory between steps; on the device only a chunk of it, while that is updated.

Works on any torch optimizer that updates each parameter from its own gradient and state alone, as all here
do: its own `step` is run on one part of the parameters after another, so the numbers are those without
offload, bit for bit.

All copies are queued on the current stream, after the kernels that write and before those that read. The host
waits for them only before a state_dict, which it reads itself.
"""

from collections.abc import Callable, Iterator

import torch

from engine.split import local, with_local

CHUNK_BYTES = 256 * 2**20  # of state on the device at a time; a tensor with more is a chunk of its own
BYTES_A_PARAMETER, OF_AMSGRAD = (
    8,
    4,
)  # two fp32 moments: the most that an optimizer here keeps without AMSGrad

ToHost = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
ToDevice = Callable[[torch.Tensor, torch.device], torch.Tensor]


def to_host(tensor: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """Copy to pinned host memory: to `buffer`, where `tensor` came from, or to a new one."""
    if tensor.device.type == "cpu":
        return tensor
    if buffer is None:
        buffer = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return buffer.copy_(tensor, non_blocking=True)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy from host memory to the parameter's device."""
    return tensor.to(device, non_blocking=True)


def offload(
    optimizer: torch.optim.Optimizer,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    to_host: ToHost = to_host,
    to_device: ToDevice = to_device,
) -> torch.optim.Optimizer:
    """Keep the state of `optimizer` in host memory from now on; return it, still the torch optimizer it was.

    Its `offload` attribute is the Offload that took over its `step` and `load_state_dict`.
    """
    optimizer.offload = Offload(optimizer, chunk_bytes, to_host, to_device)
    return optimizer


class Offload:
    """Moves the state of one optimizer. `chunks` and `largest_bytes` tell what its last step did."""

    def __init__(self, optimizer, chunk_bytes: int, to_host: ToHost, to_device: ToDevice):
        self.chunks = self.largest_bytes = 0
        self._optimizer, self._chunk_bytes = optimizer, chunk_bytes
        self._to_host, self._to_device = to_host, to_device
        self._buffers: dict[tuple, torch.Tensor] = {}  # (parameter, key) → where its state came from
        self._own_step, self._own_load = optimizer.step, optimizer.load_state_dict
        optimizer.step, optimizer.load_state_dict = self.step, self.load_state_dict
        optimizer.register_state_dict_pre_hook(lambda _: self._wait())
        self._store(list(optimizer.state))

    def step(self, closure=None) -> None:
        """One step, a chunk of the parameters at a time; there is no `closure` in the engine."""
        groups = self._optimizer.param_groups
        whole = [group["params"] for group in groups]
        self.chunks = self.largest_bytes = 0
        try:
            for chunk in self._chunks(whole):
                for group, part in zip(groups, chunk, strict=True):
                    group["params"] = part
                parameters = [p for part in chunk for p in part]
                self._fetch(parameters)
                self._own_step()
                self._count(parameters)
                self._store(parameters)
        finally:
            for group, params in zip(groups, whole, strict=True):
                group["params"] = params

    def load_state_dict(self, state_dict: dict) -> None:
        """Load, which puts the state beside the parameters, and move it to the host again."""
        self._own_load(state_dict)
        self._store(list(self._optimizer.state))

    def _chunks(self, whole: list[list]) -> Iterator[list[list]]:
        """The parameters with a gradient, in parts of at most the chunk's bytes; each part by group."""
        chunk, size = [[] for _ in whole], 0
        each = [
            BYTES_A_PARAMETER + OF_AMSGRAD * g.get("amsgrad", False) for g in self._optimizer.param_groups
        ]
        for i, params in enumerate(whole):
            for p in params:
                if p.grad is None:
                    continue
                bytes_ = each[i] * local(p).numel()
                if size and size + bytes_ > self._chunk_bytes:
                    yield chunk
                    chunk, size = [[] for _ in whole], 0
                chunk[i].append(p)
                size += bytes_
        if size:
            yield chunk

    def _entries(self, parameters: list) -> Iterator[tuple[dict, tuple, str, torch.Tensor]]:
        for p in parameters:
            state = self._optimizer.state.get(p, {})
            for key, value in list(state.items()):
                if isinstance(value, torch.Tensor):
                    yield state, (p, key), key, value

    def _fetch(self, parameters: list) -> None:
        for state, name, key, value in self._entries(parameters):
            self._buffers[name] = local(value)
            state[key] = with_local(value, self._to_device(local(value), local(name[0]).device))

    def _store(self, parameters: list) -> None:
        for state, name, key, value in self._entries(parameters):
            state[key] = with_local(value, self._to_host(local(value), self._buffers.pop(name, None)))

    def _count(self, parameters: list) -> None:
        self.chunks += 1
        here = sum(local(value).nbytes for *_, value in self._entries(parameters))
        self.largest_bytes = max(self.largest_bytes, here)

    def _wait(self) -> None:
        """The host is about to read the state: let the copies to it end."""
        device = local(self._optimizer.param_groups[0]["params"][0]).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
