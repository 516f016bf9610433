"""What a run will take of its device's memory, by what it is for, before anything is launched or allocated.

    python -m engine.plan FILE.toml [--device-memory-gib X] [--ranks N]

One training step is gone through on fake tensors (engine/dry_run.py); this module puts it into words. It refuses,
with exit status 2, a run that cannot fit. That a run fits is not promised: an allocator also loses memory between
tensors.
"""

import argparse
import os
import sys
from collections import Counter
from dataclasses import dataclass

from engine.config import Config, is_effective, load
from engine.data import DIALOGUES, LABELLED
from engine.errors import ConfigError, command

KINDS = ("parameters", "gradients", "optimizer", "activations", "logits", "temporary", "libraries")
MOST_PARTS = 5  # contributors shown of activations and of temporaries
KNOWN_VOCABULARIES = {"bytes": 256, "gpt2": 50257}  # of tokenizers that are not made from the data
DEEP = (
    12  # layers from which a model that is compiled whole is not traced but extended, for the time it takes
)
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank's device when most is held in a training step; the kinds add up to the peak."""

    micro_batch: int  # sequences
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int  # and whatever else the loss makes
    temporary: int
    libraries: int  # work memory that they keep
    parts: tuple[tuple[str, str, int], ...]  # (kind, part of the model, bytes), the largest first
    kept: int  # after one forward pass, for the backward pass

    @property
    def peak(self) -> int:
        return sum(getattr(self, kind) for kind in KINDS)

    def as_rows(self) -> list[tuple[str, int]]:
        """(what, bytes): every kind, the largest parts of some, the peak."""
        rows = []
        for kind in KINDS:
            rows.append((kind, getattr(self, kind)))
            if kind in ("activations", "temporary"):
                parts = [(f"  {part}", size) for k, part, size in self.parts if k == kind]
                rows += parts[:MOST_PARTS]
        return [*rows, ("peak", self.peak)]


def estimate(
    config: Config,
    vocabulary_size: int,
    device_type: str,
    ranks: int,
    micro_batch: int | None = None,
    classes: int = 0,
) -> Plan:
    """The plan of one rank; micro_batch: in place of the run's own; classes: of labelled rows.

    Raises ConfigError for settings that so many ranks cannot run.
    """
    from engine import world

    if problems := world.check(config, ranks):
        raise ConfigError(problems)
    micro = micro_batch or config.training.micro_batch_size or sequences(config, ranks)
    peak, kept = _traced(config, vocabulary_size, device_type, ranks, micro, classes)
    not_kept = ("gathered weights",) if config.parallel.reshard_after_forward else ()
    kinds, parts = Counter(), Counter()
    for (kind, part), size in peak.items():
        kinds["logits" if part == "logits" else kind] += size
        parts[kind, part] += size * (part != "logits")
    return Plan(
        micro_batch=micro,
        **{kind: kinds[kind] for kind in KINDS},
        parts=tuple((*label, size) for label, size in parts.most_common() if size),
        kept=sum(size for (_, part), size in kept.items() if part not in not_kept),
    )


def sequences(config: Config, ranks: int) -> int:
    """Sequences of one step that one rank trains on. Raises ConfigError if they cannot be divided evenly."""
    replicas = ranks // config.parallel.tensor_parallel if config.parallel.shard_samples else 1
    own, rest = divmod(config.training.batch_size, replicas)
    if rest or own % (config.training.micro_batch_size or 1):
        raise ConfigError(
            f"batch_size = {config.training.batch_size}: must be a multiple of micro_batch_size × the {replicas} "
            "ranks that read different data"
        )
    return own


def _traced(config: Config, vocabulary_size: int, device_type: str, ranks: int, micro: int, classes: int):
    """Bytes by label at the peak and after the forward pass."""
    from engine.dry_run import Place, trace

    place, layers = Place(device_type, ranks), config.model.layers
    if config.compile.compile != "model" or layers <= DEEP:
        found = trace(config, vocabulary_size, place, micro, classes)
        return found.peak, found.forward
    half, whole = (
        trace(_with_layers(config, depth), vocabulary_size, place, micro, classes)
        for depth in (DEEP // 2, DEEP)
    )
    return tuple(
        _extended(getattr(half, moment), getattr(whole, moment), layers) for moment in ("peak", "forward")
    )


def _with_layers(config: Config, layers: int) -> Config:
    from dataclasses import replace

    return replace(config, model=replace(config.model, layers=layers))


def _extended(half: Counter, whole: Counter, layers: int) -> Counter:
    """Bytes at `layers`, on the straight line through those at DEEP / 2 and at DEEP layers."""
    beyond = (layers - DEEP) / (DEEP - DEEP // 2)
    return Counter({k: int(whole[k] + (whole[k] - half[k]) * beyond) for k in half | whole})


def largest_micro_batch(smaller: Plan, larger: Plan, capacity: float) -> int:
    """The micro-batch at which the straight line through two plans reaches `capacity` bytes; 0 if none fits.

    Between the two it is on the safe side: of many moments, each grows along a line, and the peak is the highest.
    """
    if smaller.peak > capacity and smaller.micro_batch == 1:
        return 0
    slope = (larger.peak - smaller.peak) / (larger.micro_batch - smaller.micro_batch)
    return int(smaller.micro_batch + (capacity - smaller.peak) / slope)


def sizes(config: Config) -> tuple[int, int]:
    """(vocabulary, classes) of the run's tokens, if they are made already; classes are 0 for text.

    Else of its tokenizer, if that does not depend on the data.

    Raises ConfigError, saying what to do, where it cannot be known.
    """
    from engine import tasks
    from engine.data.dialogue_tokens import SPECIALS
    from engine.data.prepare import open_tokens

    data = config.data
    if config.tokens_directory.exists():
        meta = open_tokens(config.tokens_directory, data).meta
        return meta["vocabulary_size"], tasks.class_count(meta)
    known = KNOWN_VOCABULARIES | {"bpe": data.vocab_size}
    if data.dataset not in LABELLED and data.tokenizer in known:
        return known[data.tokenizer] + (len(SPECIALS) if data.dataset in DIALOGUES else 0), 0
    what = f"tokenizer = {data.tokenizer!r}: its vocabulary is that"
    if data.dataset in LABELLED:
        what = f"dataset = {data.dataset!r}: its classes are those"
    raise ConfigError(f"{what} of the data; run python -m engine.data.prepare FILE.toml first")


def device(config: Config, memory_gib: float | None) -> tuple[str, float | None]:
    """The kind of device to plan for, and the bytes that the run may use of it; None where nothing limits them.

    memory_gib: of the GPU to plan for, which this machine need not have.
    """
    import torch

    wanted = config.run.device
    has_gpu = torch.cuda.is_available()
    kind = "cuda" if wanted == "cuda" or (wanted == "auto" and (has_gpu or memory_gib)) else "cpu"
    limits = [x * GIB for x in (memory_gib, config.memory.memory_limit_gib) if x]
    if not memory_gib and kind == "cuda" and has_gpu:
        limits.append(torch.cuda.get_device_properties(0).total_memory)
    return kind, min(limits, default=None)


def text(plan: Plan, config: Config, kind: str, ranks: int, capacity: float | None) -> str:
    """The plan as a table."""
    on = f"{kind}, {ranks} rank{'s' if ranks > 1 else ''}"
    lines = [
        f"One training step on {on}: micro-batch {plan.micro_batch} of {config.model.context} tokens, "
        f"activation checkpointing {config.memory.activation_checkpointing}, compile {config.compile.compile}",
        "",
        f"{'GiB on one rank when most is held':<44}",
    ]
    lines += [f"  {what:<34}{size / GIB:>10.3f}" for what, size in plan.as_rows()]
    lines += ["", f"  {'kept after a forward pass':<34}{plan.kept / GIB:>10.3f}"]
    if capacity:
        lines += [f"  {'there is':<34}{capacity / GIB:>10.3f}"]
    return "\n".join(lines)


def decay_text(config: Config, vocabulary_size: int, classes: int = 0) -> str:
    """The optimizer's groups of parameters of the whole model, and the weight decay of each."""
    from engine.optimizers import groups

    found = groups.of_run(config, vocabulary_size, classes)
    lines = [f"\n{config.optimizer.optimizer}: parameters of all ranks, weight decay"]
    for group in found:
        count = sum(p.numel() for p in group["params"])
        lines.append(f"  {group['name']:<28}{count:>16,}{group['weight_decay']:>8g}")
    return "\n".join(lines)


def check(plan: Plan, fits: int, config: Config, ranks: int, capacity: float) -> None:
    """Raise ConfigError if the plan does not fit, with the micro-batch that would; `fits`: the largest that does."""
    if plan.peak <= capacity:
        return
    own = sequences(config, ranks)
    micro = max((m for m in range(1, fits + 1) if own % m == 0), default=0)
    advice = (
        f"micro_batch_size = {micro} would fit"
        if micro
        else "not even micro_batch_size = 1 would fit: use activation checkpointing, "
        + "loss_kernel = 'chunked', " * is_effective("loss_kernel", config.flat)
        + "sharding or a smaller model"
    )
    raise ConfigError(
        f"out of memory: a step with micro-batches of {plan.micro_batch} needs {plan.peak / GIB:.3g} GiB, and there "
        f"are {capacity / GIB:.3g} GiB; {advice}"
    )


@command
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m engine.plan", description="Memory of a run, before it runs."
    )
    parser.add_argument("file", help="the run's TOML file")
    parser.add_argument(
        "--device-memory-gib", type=float, help="of the GPU to plan for; default: this machine's"
    )
    parser.add_argument("--ranks", type=int, help="processes; default: the run's own, or 1")
    asked = parser.parse_args(arguments)
    config = load(asked.file)
    ranks = asked.ranks or config.parallel.processes or int(os.environ.get("WORLD_SIZE", "1"))
    vocabulary, classes = sizes(config)
    kind, capacity = device(config, asked.device_memory_gib)
    plan = estimate(config, vocabulary, kind, ranks, classes=classes)
    print(text(plan, config, kind, ranks, capacity))
    decay = decay_text(config, vocabulary, classes)
    if capacity is None:
        print(decay)
        return
    other = 1 if plan.micro_batch > 1 else 2
    smaller, larger = sorted(
        [plan, estimate(config, vocabulary, kind, ranks, other, classes)], key=lambda p: p.micro_batch
    )
    fits = largest_micro_batch(smaller, larger, capacity)
    print(f"  {'micro-batch that would fit, about':<34}{fits:>10}")
    print(decay, flush=True)
    check(plan, fits, config, ranks, capacity)


if __name__ == "__main__":
    main(sys.argv[1:])
