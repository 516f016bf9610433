"""The number of processes against the settings: into what it divides, and where it does not.

Arithmetic alone; processes, their groups and what they exchange are in engine/parallel.py.
"""

from engine import compiling
from engine.config import Config, Parallel


def sizes(settings: Parallel, world_size: int) -> tuple[int, int, int]:
    """(replicas, shards, tensor): their product is `world_size` where `problems` finds nothing."""
    tensor = settings.tensor_parallel
    data = world_size // tensor
    if settings.data_parallel == "ddp":
        return data, 1, tensor
    shards = data if settings.data_parallel == "fsdp" else settings.shard_size
    return data // shards, shards, tensor


def problems(settings: Parallel, world_size: int) -> list[str]:
    """What is wrong with these settings for `world_size` processes."""
    tensor, shards = settings.tensor_parallel, settings.shard_size
    data, rest = divmod(world_size, tensor)
    if settings.processes and settings.processes != world_size:
        return [
            f"processes = {settings.processes}, but {world_size} were launched: use torchrun "
            f"--nproc-per-node {settings.processes}, or set processes = 0"
        ]
    if rest:
        return [f"tensor_parallel = {tensor}: must divide the {world_size} processes of the run"]
    if settings.data_parallel == "ddp" and tensor > 1 and data > 1:
        return [
            f"tensor_parallel = {tensor}: data_parallel = 'ddp' cannot replicate split matrices {data} times; use "
            f"'fsdp' or 'hsdp', or tensor_parallel = {world_size}"
        ]
    if settings.data_parallel == "hsdp" and (data % shards or data == shards):
        return [
            f"shard_size = {shards}: must divide the {data} processes that read different data into at least 2 "
            "groups of shards; one group alone is data_parallel = 'fsdp'"
        ]
    return []


def check(config: Config, world_size: int) -> list[str]:
    """Problems of spreading this run over `world_size` processes, before anything is built."""
    p = config.parallel
    if found := problems(p, world_size):
        return found
    if not p.shard_samples and world_size == p.tensor_parallel:
        found.append("shard_samples = false: would do nothing where one process reads the samples")
    if p.tensor_parallel > 1:
        from engine import tensor_parallel

        found += tensor_parallel.check(config)
    sharded = p.data_parallel != "ddp" and world_size > p.tensor_parallel
    if sharded and p.shard_unit == "block" and config.compile.compile == "model":
        found.append(
            f"compile = 'model': data_parallel = {p.data_parallel!r} gathers each block when it is called, which "
            "splits the graph there; use compile = 'blocks', or shard_unit = 'model'"
        )
    if sharded and compiling.keeps_gradients(config.compile):
        found.append(
            f"compile_mode = {config.compile.compile_mode!r}: its CUDA graphs would write over "
            "gradients that FSDP2 holds between micro-batches; use compile_mode = 'default'"
        )
    return found
