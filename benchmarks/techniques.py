"""The roadmap's experiments: every technique of one GPU, and of two, alone and among all others.

The base is a plain loop: fp32, attention written out, nothing compiled. A technique that needs another one (float8
needs mixed precision) is measured alone as both against the other by itself. One experiment a group, so that they
can run at the same time on different GPUs; each has the base and everything on, because only rows of one run are
compared.
"""

from benchmarks.factorial import CHECKPOINTING, ON, TWO_SHARDS, Experiment

PLAIN = {"attention": "manual"}
BF16 = {"mixed precision": "bf16"}
COMPILED = {"compile": "blocks"}  # among all others too: it compiles sooner than the whole model
STEPS = 20  # of --size roadmap, which are all trained with half the length, or with a curriculum
SLOTS = {
    "mixed precision": {"bf16": {"precision": "bf16"}, "fp16": {"precision": "fp16"}},
    "tf32": {ON: {"tf32": True}},
    "residual stream": {"bf16": {"residual_precision": "bf16"}},
    "float8": {ON: {"float8": True}},
    "gradient sums": {"fused": {"gradient_sums": "fused"}},
    "compile": {"model": {"compile": "model"}, "blocks": {"compile": "blocks"}},
    "compile mode": {
        "reduce-overhead": {"compile_mode": "reduce-overhead"},
        "max-autotune": {"compile_mode": "max-autotune-no-cudagraphs"},
    },
    "step graph": {ON: {"step_graph": True}},
    "attention": {kernel: {"attention": kernel} for kernel in ("sdpa", "efficient", "flash", "cudnn")},
    "loss": {"fused": {"loss_kernel": "fused"}, "chunked": {"loss_kernel": "chunked"}},
    "padded vocabulary": {ON: {"pad_vocabulary_to": 64}},
    "expandable segments": {ON: {"allocator": "expandable_segments"}},
    "checkpointing": CHECKPOINTING | {"budget": {"activation_checkpointing": "budget", "memory_budget": 0.5}},
    "accumulation": {"4 parts": {"micro_batch_size": 4}},
    "8-bit AdamW": {ON: {"optimizer": "adamw8bit"}},
    "optimizer in host memory": {ON: {"optimizer_offload": True}},
    "activation": {name: {"activation": name} for name in ("gelu_tanh", "relu", "swiglu", "geglu")},
    "sequence length": {"half at first": {"first_length": 512, "lengthening_steps": STEPS}},
    "curriculum": {"rarity": {"curriculum": "rarity", "curriculum_steps": STEPS}},
}
NEEDS = {
    ("residual stream", "bf16"): BF16,
    ("float8", ON): BF16,
    ("gradient sums", "fused"): BF16 | {"loss": "fused"},
    ("compile mode", "reduce-overhead"): COMPILED,
    ("compile mode", "max-autotune"): COMPILED,
    ("attention", "flash"): BF16,
    ("attention", "cudnn"): BF16,
    ("checkpointing", "budget"): COMPILED,
}
ALL_ON = {
    "mixed precision": "bf16",
    "tf32": ON,
    "compile": "blocks",
    "attention": "sdpa",
    "loss": "fused",
    "padded vocabulary": ON,
    "expandable segments": ON,
}
GROUPS = {
    "precision": ("mixed precision", "tf32", "residual stream", "float8", "gradient sums"),
    "compiling": ("compile", "compile mode", "step graph"),
    "attention": ("attention",),
    "mlp_and_loss": ("loss", "activation"),
    "checkpointing": ("checkpointing", "accumulation"),
    "optimizer": ("8-bit AdamW", "optimizer in host memory", "padded vocabulary", "expandable segments"),
    "data": ("sequence length", "curriculum"),
}
SPREAD = {"processes": "ddp"}
SPREADING = {
    "processes": {
        "ddp": {"processes": 2, "micro_batch_size": 8},
        "fsdp": TWO_SHARDS | {"micro_batch_size": 8},
        "tensor parallel": {"processes": 2, "tensor_parallel": 2},
    },
    "CPU affinity": {ON: {"cpu_affinity": True}},
}

ROADMAP = tuple(
    Experiment(
        f"roadmap_{name}",
        "What does each technique give alone, and what among all others?",
        PLAIN,
        SLOTS,
        ALL_ON,
        needs=NEEDS,
        varies=slots,
    )
    for name, slots in GROUPS.items()
) + (
    Experiment(
        "roadmap_spreading",
        "What do a second GPU and bound cores give alone, and what among all others?",
        PLAIN,
        SLOTS | SPREADING,
        ALL_ON | SPREAD,
        needs={("CPU affinity", ON): SPREAD},
        varies=("processes", "CPU affinity"),
    ),
)
