"""What an optimizer really is: its class, its kernels, the bytes and the place of its state after a step.

It reads groups, flags and state tensors only; nothing here changes a run.
"""

from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version

import torch

from engine.ledger import Line
from engine.optimizers import LIBRARIES
from engine.optimizers.groups import MATRICES, described
from engine.split import local

MIN_8BIT_ELEMENTS = 4096  # bitsandbytes keeps smaller tensors' moments in 32 bits


def lines(settings, optimizer: torch.optim.Optimizer) -> list[Line]:
    """The ledger's lines about `optimizer`, which has taken a step; settings: engine.config.Optimizer."""
    return [
        _kind(settings, optimizer),
        _kernel(optimizer),
        _decay(settings, optimizer),
        *_amsgrad(settings, optimizer),
        _state(settings, optimizer),
        _place(settings.optimizer_offload, optimizer),
    ]


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """This rank's part of every tensor of the state, each storage once."""
    found = (
        local(value)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return list({t.untyped_storage()._cdata: t for t in found}.values())


def _kind(settings, optimizer: torch.optim.Optimizer) -> Line:
    wanted, used = settings.optimizer, getattr(optimizer, "NAME", type(optimizer).__name__.lower())
    how = "class of the optimizer"
    if used != wanted and used == settings.optimizer_fallback:
        how += f"; the fallback, because {LIBRARIES[wanted]} is not installed"
    return Line("optimizer", wanted, used, how, used == wanted)


def _kernel(optimizer: torch.optim.Optimizer) -> Line:
    """One kernel for all parameters (fused), some for each operation (foreach), or one a parameter."""
    if type(optimizer).__name__ == "AdamW8bit":
        used = f"bitsandbytes {version('bitsandbytes')}"
        return Line("optimizer_kernel", "bitsandbytes", used, "class of the optimizer", True)
    if hasattr(optimizer, "kernels"):
        on_gpu = any(local(p).is_cuda for g in optimizer.param_groups for p in g["params"])
        wanted = "triton" if on_gpu else "plain"
        used = ", ".join(sorted(optimizer.kernels)) or "none yet"
        return Line("optimizer_kernel", wanted, used, "what updated its parameters so far", used == wanted)
    used = {
        "fused" if g["fused"] else "foreach" if g["foreach"] else "torch's choice"
        for g in optimizer.param_groups
    }
    return Line(
        "optimizer_kernel", "fused", ", ".join(sorted(used)), "flags of its groups", used == {"fused"}
    )


def _decay(settings, optimizer: torch.optim.Optimizer) -> Line:
    """Which weight decay the matrices have, and which the vectors."""
    groups, kinds = optimizer.param_groups, {"matrices": settings.weight_decay, "vectors": 0.0}
    if settings.optimizer == "muon":
        kinds = {"embeddings": settings.weight_decay, "matrices": settings.muon_weight_decay, "vectors": 0.0}

    def kind(group: dict, p: torch.Tensor) -> str:
        other = "embeddings" if "embeddings" in kinds and group["name"] != MATRICES else "matrices"
        return other if p.dim() >= 2 else "vectors"

    found = {(kind(g, p), g["weight_decay"]) for g in groups for p in g["params"]}
    how = described(groups)
    return Line(
        "weight_decay",
        ", ".join(f"{decay:g} of {kind}" for kind, decay in kinds.items()),
        ", ".join(f"{decay:g} of {kind}" for kind, decay in sorted(found)),
        how,
        found <= set(kinds.items()),
    )


def _amsgrad(settings, optimizer: torch.optim.Optimizer) -> list[Line]:
    """Of how many parameters the largest second moment is kept, where that was asked for."""
    if not settings.amsgrad:
        return []
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    having = sum("max_exp_avg_sq" in optimizer.state.get(p, {}) for p in parameters)
    how = "tensors of its state after a step"
    found = f"largest second moments of {having} of {len(parameters)} parameters"
    return [Line("amsgrad", "true", found, how, having == len(parameters))]


def memory_multiple(optimizer: torch.optim.Optimizer, others: Iterable[torch.Tensor] = ()) -> float:
    """Bytes of weights, optimizer state and what else is held for updates, over those of the weights; on this rank.

    From the tensors that are there. others: what is not in the optimizer's state, such as masks or scores of pruning.
    """
    weights = {local(p) for g in optimizer.param_groups for p in g["params"]}
    held = {t.untyped_storage()._cdata: t for t in map(local, others)}.values()
    of_weights = sum(t.nbytes for t in weights)
    return (of_weights + sum(t.nbytes for t in (*state_tensors(optimizer), *held))) / of_weights


def _state(settings, optimizer: torch.optim.Optimizer) -> Line:
    """The state's bytes a parameter, and the dtypes of the moments."""
    wanted_8bit = settings.optimizer == "adamw8bit"
    stateless = settings.optimizer == "sgd" and settings.momentum == 0
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    moments: Counter[torch.dtype] = Counter()  # parameters whose moments have that dtype
    agrees = True
    for p in parameters:
        dtypes = {
            value.dtype
            for key, value in optimizer.state.get(p, {}).items()
            if key != "step" and isinstance(value, torch.Tensor) and value.shape == p.shape
        }
        moments.update(dict.fromkeys(dtypes, p.numel()))
        eight = wanted_8bit and p.numel() >= MIN_8BIT_ELEMENTS
        agrees &= dtypes == (set() if stateless else {torch.uint8} if eight else {torch.float32})
    held = sum(t.nbytes for t in state_tensors(optimizer))
    counts = ", ".join(f"{str(d).removeprefix('torch.')} for {n} parameters" for d, n in moments.items())
    how = f"tensors of its state after a step; moments: {counts or 'none'}"
    if torch.uint8 in moments:
        how += f" (32-bit where a tensor has fewer than {MIN_8BIT_ELEMENTS} elements)"
    bits = "no moments" if stateless else "8-bit moments" if wanted_8bit else "32-bit moments"
    each = held / sum(local(p).numel() for p in parameters)
    return Line("optimizer_state", bits, f"{each:.2f} bytes a parameter", how, agrees)


def _place(wanted: bool, optimizer: torch.optim.Optimizer) -> Line:
    """Where the state is between steps."""
    tensors, offload = state_tensors(optimizer), getattr(optimizer, "offload", None)
    places = {f"{t.device}, pinned" if t.is_pinned() else str(t.device) for t in tensors}
    how = f"devices of the {len(tensors)} tensors of its state between steps"
    if offload:
        largest = f"{offload.largest_bytes / 2**20:.1f} MiB"
        how += f"; updated in chunks: {offload.chunks} in the last step, of at most {largest}"
    on_host = all(t.device.type == "cpu" for t in tensors)
    beside = {t.device for t in tensors} <= {
        local(p).device for g in optimizer.param_groups for p in g["params"]
    }
    return Line(
        "optimizer_offload",
        "host memory" if wanted else "with the parameters",
        "; ".join(sorted(places)) or "no state",
        how,
        (on_host and offload is not None) if wanted else (beside and offload is None),
    )
