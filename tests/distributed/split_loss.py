"""The loss of one of two processes that split the vocabulary, started by test_split_loss.py.

    split_loss.py RANK DIRECTORY

The processes meet at a file in DIRECTORY; this one writes loss, gradients and ledger of every case there.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from engine import losses
from engine.config import Training
from engine.data.batches import IGNORED
from engine.objectives import KERNELS, NextToken

PROCESSES, WIDTH, TOKENS, CHUNK, UPSTREAM = 2, 16, (3, 11), 8, 0.37
HEADS = {  # classes, rows of the whole head: full, padded on the last rank, and only padding there
    "full": (64, 64),
    "padded": (61, 64),
    "only_padding": (30, 64),
}
WAYS = ("plain", "dtensor", "bf16", "no_grad")


def inputs(classes: int, rows: int):
    """hidden, the whole weight and targets, four of them ignored; the same in every process."""
    draw = torch.Generator().manual_seed(11)
    hidden, weight = (
        torch.randn(*TOKENS, WIDTH, generator=draw),
        torch.randn(rows, WIDTH, generator=draw) * 0.3,
    )
    targets = torch.randint(classes, TOKENS, generator=draw)
    targets[0, :4] = IGNORED
    weight[classes:] = 50.0
    return hidden, weight, targets


def of_this_process(kernel: str, head: str, way: str, mesh) -> dict:
    """Loss, gradients and the ledger's line of one case, as this process has them."""
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, targets = inputs(*HEADS[head])
    if way == "dtensor":
        weight = distribute_tensor(weight, mesh, [Shard(0)])
    else:
        weight = weight.chunk(PROCESSES)[dist.get_rank()].clone()
    hidden.requires_grad_()
    weight.requires_grad_()
    objective = NextToken(HEADS[head][0], kernel, CHUNK, mesh.get_group())
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"),
        torch.set_grad_enabled(way != "no_grad"),
    ):
        loss = objective(hidden, weight, targets)
    if way != "no_grad":
        (UPSTREAM * loss).backward()
    gradient = weight.grad.full_tensor() if way == "dtensor" else weight.grad
    settings = Training(loss_kernel=kernel, loss_chunk_tokens=CHUNK)
    line = losses.lines(objective, settings, targets.numel())[0]
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": gradient, "line": vars(line)}


def refusal(mesh) -> str:
    """What is said of a head whose rows do not split evenly."""
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = distribute_tensor(torch.zeros(63, WIDTH), mesh, [Shard(0)])
    try:
        NextToken(63, "fused", group=mesh.get_group())(
            torch.zeros(1, 1, WIDTH), weight, torch.zeros(1, 1).long()
        )
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    meeting = f"file://{directory / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    cases = {(k, h, w): of_this_process(k, h, w, mesh) for k in KERNELS for h in HEADS for w in WAYS}
    torch.save({"cases": cases, "refusal": refusal(mesh)}, directory / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
