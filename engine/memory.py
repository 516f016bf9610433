"""Activation checkpointing, and what memory a run really holds.

Memory means bytes of tensors, as the CUDA allocator counts them. On a CPU the same number is taken from the
tensors themselves, over one step, because the process's resident size is mostly the interpreter.
"""

import contextlib
import weakref
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from engine import compiling
from engine.config import Config, Memory
from engine.ledger import Line
from engine.random_replay import Draws, replayed
from engine.split import local


def apply_activation_checkpointing(
    model: nn.Module, settings: Memory, *, width: int, dropout: float, compiled: bool = False
) -> Draws | None:
    """Wrap the blocks of `model` in place as the settings ask; `budget` is the compiler's work alone.

    width: of the residual stream. dropout: above 0, the recomputation replays the random numbers. compiled: the
    compiler will see to them. Returns the count of what is replayed, where that is engine/random_replay.py's work.
    """
    mode, keep_rng = settings.activation_checkpointing, dropout > 0
    draws = Draws() if mode == "selective" and keep_rng and not compiled else None
    if mode == "selective":
        keep_products_and_attention(model, width, keep_rng=keep_rng, draws=draws)
    elif mode in ("full", "every_n"):
        from engine import titan

        titan.checkpoint_activations(model, mode, settings.checkpoint_every, keep_rng=keep_rng)
    return draws


def keep_products_and_attention(model: nn.Module, width: int, *, keep_rng: bool, draws: Draws | None) -> None:
    """Selective activation checkpointing: keep what is dear to compute again, recompute the rest.

    Kept: every SDPA kernel's output, and every matrix product but those that end in the residual stream
    (`width` columns): nothing in the backward pass reads the last one of a block, and the other is the
    cheapest for the bytes it takes. draws: counts the random operations that are replayed; None: none need be.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    products, attention = kept_operations()

    def policy(_context, operation, *args, **_kwargs):
        columns = products[operation](args) if operation in products else None
        kept = operation in attention or columns not in (None, width)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        pair = create_selective_checkpoint_contexts(policy)
        return pair if draws is None else replayed(pair, draws)

    for i, block in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(block, context_fn=contexts, preserve_rng_state=keep_rng)


def kept_operations() -> tuple[dict, set]:
    """The matrix products, each with a function of its arguments to its columns, and the attention kernels."""
    from engine import gradient_sums

    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
    }
    products = {
        aten.mm.default: lambda args: args[1].shape[-1],
        aten.addmm.default: lambda args: args[2].shape[-1],
        aten._scaled_mm.default: lambda args: args[1].shape[-1],
        gradient_sums.linear._opoverload: lambda args: len(args[1]),
    }
    return products, attention


def lines(config: Config, seen, measured: "StepMemory") -> list[Line]:
    """What was recomputed, and what was kept, in the measured step; `seen` is an engine.observed.Observed.

    Recomputing a whole block runs its attention again; recomputing selected operations does not.
    """
    mode, layers = config.memory.activation_checkpointing, config.model.layers
    whole = {"full": layers, "every_n": layers // config.memory.checkpoint_every}.get(mode, 0)
    wanted = layers if mode == "selective" else whole
    kept = (
        "activations not measurable here"
        if measured.activation_bytes is None
        else f"activations kept {measured.activation_bytes / 2**20:.1f} MiB after one forward pass"
    )
    if measured.recomputed_blocks is None:  # the recomputation is inside the compiled graphs
        found, how = measured.wrapped_blocks, "blocks wrapped for recomputation when they were compiled"
    else:
        found, how = measured.recomputed_blocks, "calls of the blocks in one step"
    agrees, kernels = found == wanted, seen.operations.attention_kernels
    # math is made of other operations, of which some are kept; flex of several kernels
    if kernels and not kernels.keys() & {"math", "flex"}:
        again = sum(kernels.values()) / seen.accumulation - layers
        how += f"; attention ran again in {again:g} of {layers} blocks"
        agrees = agrees and again == whole
    in_effect = f"{found} of {layers} blocks recomputed"
    if mode == "budget":
        in_effect = f"a budget of {compiling.budget():g}"
        how, agrees = "the compiler's own setting", compiling.budget() == config.memory.memory_budget
    return [Line("activation_checkpointing", mode, in_effect, f"{how}; {kept}", agrees)]


class TensorBytes(TorchDispatchMode):
    """While active, `current` and `peak` are the bytes of all storages alive: those given, and new ones."""

    def __init__(self, alive: list[torch.Tensor]):
        super().__init__()
        self.peak = self._bytes = 0
        self._storages: dict[int, weakref.ref] = {}
        self._sizes: dict[int, int] = {}
        for tensor in alive:
            self._track(tensor)

    @property
    def current(self) -> int:
        self._resize()
        return self._bytes

    def _track(self, tensor: torch.Tensor) -> None:
        storage = local(tensor).untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return

        def freed(_, key=key):
            del self._storages[key]
            self._bytes -= self._sizes.pop(key)

        self._storages[key] = weakref.ref(storage, freed)
        self._sizes[key] = storage.nbytes()
        self._bytes += storage.nbytes()
        self.peak = max(self.peak, self._bytes)

    def _resize(self) -> None:
        """Take note of storages that changed their size: FSDP2 frees and fills its parameters that way."""
        for key, reference in list(self._storages.items()):
            storage = reference()
            if storage is not None and storage.nbytes() != self._sizes[key]:
                self._bytes += storage.nbytes() - self._sizes[key]
                self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self._bytes)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._track(value)
        if function.namespace == "c10d":  # a collective of FSDP2: the only time at which storages change size
            self._resize()
        return result


class Recomputation:
    """Counts how often each block runs in one forward pass and again in its backward pass."""

    def __init__(self, model: nn.Module):
        self.calls = [0] * len(model.layers)
        self._handles = []
        for i, block in enumerate(model.layers):
            inner = getattr(block, "_checkpoint_wrapped_module", block)
            self._handles.append(inner.register_forward_pre_hook(lambda *_, i=i: self._count(i)))

    def _count(self, block: int) -> None:
        self.calls[block] += 1

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()


class StepMemory:
    """Measures one training step: `peak_bytes`, `activation_bytes` after the first forward, recomputed blocks.

    Where a figure cannot be had (a compiled model on a CPU), it is None, never a guess.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer,
        device: torch.device,
        *,
        compiled: bool,
        held: Sequence[torch.Tensor] = (),
    ):
        """held: tensors besides the model's and the optimizer's that are there all the time."""
        self.device, self.compiled = device, compiled
        self.peak_bytes = self.activation_bytes = self.recomputed_blocks = None
        self.wrapped_blocks = sum(hasattr(block, "_checkpoint_wrapped_module") for block in model.layers)
        self._model, self._optimizer, self._others = model, optimizer, held
        self._before = None

    def _held(self) -> list[torch.Tensor]:
        states = (v for state in self._optimizer.state.values() for v in state.values())
        parameters, sums = list(self._model.parameters()), getattr(self._model, "gradient_sums", None)
        gradients = [p.grad for p in parameters if p.grad is not None]  # those that outlive a step
        tensors = [
            *parameters,
            *self._model.buffers(),
            *states,
            *gradients,
            *(sums.held if sums else []),
            *self._others,
        ]
        return [local(t) for t in tensors if isinstance(t, torch.Tensor)]

    @contextlib.contextmanager
    def measured(self, step, micro_batches):
        """Around one call of `step` (an engine.step.Step) on `micro_batches`."""
        recomputation = None if self.compiled else Recomputation(self._model)
        count = TensorBytes(self._held()) if self.device.type == "cpu" and not self.compiled else None
        current = (lambda: count.current) if count else (lambda: torch.cuda.memory_allocated(self.device))
        if count or self.device.type == "cuda":
            self._before = current()

            def after_forward():
                if self.activation_bytes is None:
                    self.activation_bytes = current() - self._before

            step.after_forward = after_forward
        with count or contextlib.nullcontext():
            yield
        step.after_forward = None
        if recomputation:
            recomputation.stop()
            self.recomputed_blocks = sum(n > len(micro_batches) for n in recomputation.calls)
        if count:
            self.peak_bytes = count.peak
