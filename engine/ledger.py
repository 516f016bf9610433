"""The ledger of a run: what was requested, what was in effect, and how that was established.

Every line rests on something observed in this process, never on the request itself. Whether a line `agrees` is
decided here; tables show every line that does not.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine import compiling
from engine.config import Config
from engine.parallel import Ranks


@dataclass(frozen=True)
class Line:
    """One fact of a run. A module that owns a technique observes it and returns its lines."""

    what: str
    requested: str
    in_effect: str
    how: str  # how `in_effect` was established
    agrees: bool


class Ledger:
    """Lines of {what, requested, in_effect, how, agrees}."""

    def __init__(self):
        self.lines: list[Line] = []

    def add(self, what: str, requested, in_effect, how: str, *, agrees: bool) -> None:
        self.lines.append(Line(what, str(requested), str(in_effect), how, bool(agrees)))

    def as_dict(self) -> dict:
        return {"entries": [vars(line) for line in self.lines]}


@dataclass(frozen=True)
class Observed:
    """What the run's measured step showed."""

    ranks: Ranks
    accumulation: int  # micro-batches of this rank
    targets: int  # counted on all ranks
    sample_ids: list[int]  # of all ranks
    sdpa_calls: int | None  # None: compiled, so not counted
    logits_dtype: torch.dtype
    parameter_device: torch.device


def of_run(config: Config, seen: Observed, *, tokens, order, optimizer, memory) -> Ledger:
    """The ledger of a run that has taken its measured step; `memory` is that step's StepMemory."""
    ledger = Ledger()
    _add_launch(ledger, config, seen)
    _add_batch(ledger, config, seen)
    _add_precision(ledger, config.training.precision, seen.logits_dtype)
    _add_attention(ledger, config, seen)
    _add_checkpointing(ledger, config, memory)
    _add_compile(ledger, config)
    _add_data(ledger, config, tokens, order)
    _add_optimizer(ledger, config.optimizer.optimizer, optimizer)
    return ledger


def _add_launch(ledger: Ledger, config: Config, seen: Observed) -> None:
    wanted, device = config.run.device, str(seen.parameter_device)
    ledger.add(
        "device",
        wanted,
        device,
        "device of the parameters",
        agrees=wanted in ("auto", seen.parameter_device.type),
    )
    processes, size = config.parallel.processes, seen.ranks.world_size
    ledger.add(
        "processes",
        processes or "as launched",
        size,
        "size of the process group",
        agrees=processes in (0, size),
    )


def _add_batch(ledger: Ledger, config: Config, seen: Observed) -> None:
    size, context, world = config.training.batch_size, config.model.context, seen.ranks.world_size
    micro = size // world // seen.accumulation
    ledger.add(
        "batch_size",
        size,
        f"{seen.targets / context:g}",
        f"targets counted on all ranks; micro-batch {micro} × accumulation {seen.accumulation} × replicas "
        f"{world}, {seen.targets} tokens a step",
        agrees=seen.targets == size * context,
    )
    distinct, drawn = len(set(seen.sample_ids)), len(seen.sample_ids)
    ledger.add(
        "samples",
        f"{size} distinct",
        f"{distinct} distinct",
        f"ids of the samples of one step, from all ranks: {drawn} in all",
        agrees=distinct == drawn == size,
    )


def _add_precision(ledger: Ledger, wanted: str, dtype: torch.dtype) -> None:
    expected = torch.bfloat16 if wanted == "bf16" else torch.float32
    name = str(dtype).removeprefix("torch.")
    ledger.add("precision", wanted, name, "dtype of the logits", agrees=dtype == expected)


def _add_optimizer(ledger: Ledger, wanted: str, optimizer: torch.optim.Optimizer) -> None:
    groups = [
        f"{g['name']}: {sum(p.numel() for p in g['params'])} parameters, weight decay {g['weight_decay']}"
        for g in optimizer.param_groups
    ]
    used = type(optimizer).__name__.lower()
    ledger.add("optimizer", wanted, used, "; ".join(groups), agrees=used == wanted)


def _add_attention(ledger: Ledger, config: Config, seen: Observed) -> None:
    wanted, sdpa_calls = config.model.attention, seen.sdpa_calls
    if sdpa_calls is None:
        used, how = wanted, "compiled, so its calls were not counted"
    else:
        used, how = "sdpa" if sdpa_calls else "manual", f"{sdpa_calls} SDPA calls counted in one step"
    if used == "sdpa":
        used = f"sdpa {sdpa_backend(config, seen.parameter_device)}"
        how += "; kernel dispatched for this run's shape and dtype"
    ledger.add("attention", wanted, used, how, agrees=used.startswith(wanted))


def _add_checkpointing(ledger: Ledger, config: Config, memory) -> None:
    mode, layers = config.memory.activation_checkpointing, config.model.layers
    wanted = {"none": 0, "every_n": layers // config.memory.checkpoint_every}.get(mode, layers)
    kept = (
        "activations not measurable here"
        if memory.activation_bytes is None
        else (f"activations kept {memory.activation_bytes / 2**20:.1f} MiB after one forward pass")
    )
    if memory.recomputed_blocks is None:  # the recomputation is inside the compiled graphs
        found, how = memory.wrapped_blocks, "blocks wrapped for recomputation when they were compiled"
    else:
        found, how = memory.recomputed_blocks, "calls of the blocks in one step"
    ledger.add(
        "activation_checkpointing",
        mode,
        f"{found} of {layers} blocks recomputed",
        f"{how}; {kept}",
        agrees=found == wanted,
    )


def _add_compile(ledger: Ledger, config: Config) -> None:
    mode = config.compile.compile
    proof = compiling.proof()
    ledger.add(
        "compile",
        mode,
        proof if proof.graphs else "none",
        "dynamo's counters",
        agrees=(proof.graphs > 0) == (mode != "none"),
    )


def _add_data(ledger: Ledger, config: Config, tokens, order) -> None:
    meta = tokens.meta
    consumed = config.training.steps * config.training.batch_size * config.model.context
    train = meta["splits"]["train"]
    ledger.add(
        "dataset",
        config.data.dataset,
        meta["dataset"],
        f"sha256 of the training text {train['sha256_text'][:12]}; {train['tokens']} tokens, vocabulary "
        f"{meta['vocabulary_size']}; {consumed} consumed = {consumed / train['tokens']:.2f} epochs",
        agrees=meta["dataset"] == config.data.dataset,
    )
    ledger.add(
        "tokenizer",
        config.data.tokenizer,
        meta["tokenizer"],
        "meta.json of the token files",
        agrees=meta["tokenizer"] == config.data.tokenizer,
    )
    ledger.add(
        "seed", config.run.seed, order.seed, "the data order's own seed", agrees=config.run.seed == order.seed
    )


class _Operations(TorchDispatchMode):
    """Records the names of the operations dispatched while it is active."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


class SdpaCalls(TorchFunctionMode):
    """Counts calls of scaled_dot_product_attention while it is active; `count` is None if it never was."""

    def __init__(self):
        super().__init__()
        self.count: int | None = None

    def __enter__(self):
        self.count = 0
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.count += 1
        return function(*args, **(kwargs or {}))


def sdpa_backend(config: Config, device: torch.device) -> str:
    """The SDPA kernel that torch picks for this run's shape and dtype: flash, cudnn, efficient or math."""
    m = config.model
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    q = torch.zeros(1, m.heads, m.context, m.width // m.heads, dtype=dtype, device=device, requires_grad=True)
    # Dropout must not draw from the run's own random state: a resumed run looks this up once more.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _Operations() as seen:
        F.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=m.dropout)
    for backend in ("flash", "cudnn", "efficient"):
        if any(f"_scaled_dot_product_{backend}_attention" in name for name in seen.names):
            return backend
    return "math"
