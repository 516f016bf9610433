"""What a run has of its machine: processes, memory, compiler, allocator and cores."""

from dataclasses import dataclass

from engine.declare import setting


@dataclass(frozen=True)
class Parallel:
    processes: int = setting(
        0, "processes of the run; 0: as many as were launched (the pipeline starts 1)", at_least=0
    )
    data_parallel: str = setting(
        "ddp",
        "how several processes share a run: replicas, FSDP2 shards, or replicas of groups of shards (hsdp)",
        choices=("ddp", "fsdp", "hsdp"),
    )
    shard_size: int = setting(
        2, "processes of one group of shards", at_least=2, only_if={"data_parallel": ("hsdp",)}
    )
    shard_unit: str = setting(
        "block",
        "weights that are gathered together: a block's, or the whole model's, once a step (less communication; "
        "weights and gradients are held whole during a step, their shards and the optimizer's state between)",
        choices=("block", "model"),
        only_if={"data_parallel": ("fsdp", "hsdp")},
    )
    reshard_after_forward: bool = setting(
        True,
        "free gathered weights between forward and backward (less memory, more communication)",
        only_if={"data_parallel": ("fsdp", "hsdp"), "shard_unit": ("block",)},
    )
    tensor_parallel: int = setting(
        1,
        "processes that split every matrix product between them, and the loss",
        at_least=1,
        only_if={"model": ("gpt",)},
    )
    shard_samples: bool = setting(
        True,
        "each process reads its own part of a step's samples; false: all read the whole step, which is refused "
        "unless on_shared_samples says otherwise",
    )
    on_shared_samples: str = setting(
        "refuse",
        "what happens when processes read the same samples in a step: the run ends, or its figures say so",
        choices=("refuse", "report"),
    )
    preflight_seconds: float = setting(
        60.0, "how long processes wait for each other at the start", unit="seconds", above=0
    )


@dataclass(frozen=True)
class Memory:
    activation_checkpointing: str = setting(
        "none",
        "which activations are recomputed: none, all, cheap operations only, every n-th layer, or as many as a "
        "memory budget asks",
        choices=("none", "full", "selective", "every_n", "budget"),
    )
    checkpoint_every: int = setting(
        2, "n of every_n", unit="layers", at_least=1, only_if={"activation_checkpointing": ("every_n",)}
    )
    memory_budget: float = setting(
        0.5,
        "share of a compiled block's activations that may be kept",
        at_least=0,
        at_most=1,
        only_if={"activation_checkpointing": ("budget",)},
    )
    on_out_of_memory: str = setting(
        "stop",
        "stop, or retry with less, on record: chunked loss, then full checkpointing, then half the micro-batch, "
        "then no compile",
        choices=("stop", "ladder"),
    )
    memory_limit_gib: float = setting(
        0.0, "device memory this run may use; 0: all there is", unit="GiB", at_least=0
    )


@dataclass(frozen=True)
class Compile:
    compile: str = setting(
        "none",
        "torch.compile of nothing, of each block, or of the whole model",
        choices=("none", "blocks", "model"),
    )
    compile_mode: str = setting(
        "default",
        "what the compiler tries",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        only_if={"compile": ("blocks", "model")},
    )
    compile_fullgraph: bool = setting(
        True, "a graph break is an error", only_if={"compile": ("blocks", "model")}
    )
    compile_dynamic: bool = setting(
        False, "compile for any batch shape", only_if={"compile": ("blocks", "model")}
    )
    step_graph: bool = setting(
        False, "replay whole training steps, with the optimizer's update, as one CUDA graph: for small models"
    )


@dataclass(frozen=True)
class Runtime:
    tf32: bool = setting(False, "fp32 matrix products on a GPU may round their inputs to TF32")
    deterministic: bool = setting(
        False, "sums in one order, so that the same run again has the same bits; slower on a GPU"
    )
    allocator: str = setting(
        "default",
        "CUDA's memory allocator; expandable segments waste less",
        choices=("default", "expandable_segments"),
    )
    gc_interval: int = setting(
        100,
        "steps between collections of Python's garbage, so that none falls into a step; 0: Python's own times",
        unit="steps",
        at_least=0,
    )
    cpu_threads: int = setting(0, "threads of CPU operations; 0: torch's choice", at_least=0)
    cpu_affinity: bool = setting(False, "bind each process of a machine to its own share of the CPU's cores")
    prefetch: int = setting(2, "batches prepared ahead", unit="batches", at_least=1)
    profile_steps: int = setting(
        0, "steps to trace and split into data, forward, backward, optimizer, communication", at_least=0
    )
    scaling_probe_steps: int = setting(
        0,
        "steps timed after training with and without loading, and with and without exchange, to tell where the time "
        "of several processes goes; 0: none",
        unit="steps",
        at_least=0,
    )
