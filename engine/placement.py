"""How a model lies on the ranks, read off its own parameters; and the ledger's lines about it.

It must not spread anything: that is engine/parallel.py.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from engine import world
from engine.config import Parallel
from engine.ledger import Line
from engine.parallel import Ranks, unwrapped
from engine.split import local


@dataclass(frozen=True)
class Placement:
    """How a model lies on the ranks, as its own parameters tell."""

    kind: str  # ddp, fsdp, hsdp, or none: nothing exchanges gradients
    replicas: int
    shards: int
    tensor: int
    whole: tuple[str, ...]  # parameters that are not sharded or split where others of their kind are
    held: int  # elements on this rank
    parameters: int  # elements in all

    def __str__(self) -> str:
        return _words(self.kind, self.replicas, self.shards, self.tensor)


def of_model(model: nn.Module) -> Placement:
    """Look where the parameters of `model` (as `spread` returned it) are."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDP2's root stays gathered after an evaluation
            module.reshard()
    averaged, sums = isinstance(model, nn.parallel.DistributedDataParallel), unwrapped(model).gradient_sums
    exchanged = model.process_group.size() if averaged else sums.exchanged if sums else 0
    named = dict(unwrapped(model).named_parameters())
    sizes_of, cut = {"dp_replicate": 1, "fsdp": 1, "tp": 1}, {}
    for name, p in named.items():
        sizes_of |= _mesh(p)
        cut[name] = _cut(p)
    whole = {name for name in named if sizes_of["fsdp"] > 1 and "fsdp" not in cut[name]}
    if sizes_of["tp"] > 1:
        from engine import tensor_parallel

        whole |= {n for n in tensor_parallel.split_parameters(unwrapped(model)) if "tp" not in cut[n]}
    sharded = "hsdp" if sizes_of["dp_replicate"] > 1 else "fsdp" if sizes_of["fsdp"] > 1 else "none"
    return Placement(
        kind="ddp" if exchanged else sharded,
        replicas=exchanged or sizes_of["dp_replicate"],
        shards=sizes_of["fsdp"],
        tensor=sizes_of["tp"],
        whole=tuple(sorted(whole)),
        held=sum(local(p).numel() for p in named.values()),
        parameters=sum(p.numel() for p in named.values()),
    )


def _mesh(parameter: torch.Tensor) -> dict[str, int]:
    """The dimensions of a DTensor's mesh with their sizes; none for a plain tensor."""
    mesh = getattr(parameter, "device_mesh", None)
    return dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)) if mesh is not None else {}


def _cut(parameter: torch.Tensor) -> set[str]:
    """The dimensions of the mesh along which a DTensor is cut into parts."""
    placements = getattr(parameter, "placements", ())
    return {d for d, p in zip(_mesh(parameter), placements, strict=True) if not p.is_replicate()}


def _words(kind: str, replicas: int, shards: int, tensor: int) -> str:
    data = {
        "ddp": f"ddp over {replicas} ranks",
        "fsdp": f"fsdp over {shards} ranks",
        "hsdp": f"hsdp, {replicas} replicas of {shards} shards",
    }
    parts = [data[kind]] if replicas * shards > 1 and kind in data else []
    parts += [f"tensor parallel over {tensor} ranks"] if tensor > 1 else []
    return " × ".join(parts) or "one rank"


def lines(model: nn.Module, settings: Parallel, ranks: Ranks) -> list[Line]:
    """How the model really lies on the ranks, and whether blocks are freed between forward and backward."""
    found, wanted = of_model(model), _words(settings.data_parallel, *world.sizes(settings, ranks.world_size))
    share = 100 * found.held / found.parameters
    how = f"placements of the parameters: this rank holds {share:.1f} % of {found.parameters:,}"
    if found.whole:
        how += f"; not split: {', '.join(found.whole)}"
    in_effect = str(found)
    if in_effect == "one rank" and ranks.world_size > 1:
        in_effect = f"not spread: {ranks.world_size} ranks hold it whole"
    entries = [Line("sharding", wanted, in_effect, how, in_effect == wanted and not found.whole)]
    if settings.data_parallel != "ddp" and ranks.data_size > 1:
        blocks = [block for block in unwrapped(model).layers if hasattr(block, "_get_fsdp_state")]
        entries.append(_unit_line(blocks, len(model.layers), settings.shard_unit))
        if settings.shard_unit == "block":
            entries.append(_reshard_line(blocks, len(model.layers), settings.reshard_after_forward))
    return entries


def _unit_line(sharded: list[nn.Module], blocks: int, requested: str) -> Line:
    found = {0: "model", blocks: "block"}.get(len(sharded), "some blocks")
    return Line(
        "shard_unit",
        requested,
        found,
        f"{len(sharded)} of {blocks} blocks gather for themselves",
        found == requested,
    )


def _reshard_line(blocks: list[nn.Module], expected: int, requested: bool) -> Line:
    freed = sum(_is_resharded(block) for block in blocks)
    return Line(
        "reshard_after_forward",
        str(requested).lower(),
        f"{freed} of {expected} blocks freed",
        f"FSDP2's state of {len(blocks)} sharded blocks",
        len(blocks) == expected and freed == expected * requested,
    )


def _is_resharded(block: nn.Module) -> bool:
    """Whether FSDP2 frees this block's gathered weights after its forward pass."""
    state = block._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch 2.13 and 2.11
    return all(group.post_forward_mesh_info is not None for group in groups)
