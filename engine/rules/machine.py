"""Rules between the settings of memory, compiling, CUDA graphs and who sums gradients."""

from engine.optimizers import RECORDED
from engine.rules.check import Check

UNORDERED_KERNELS = ("cudnn", "flex")
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of compile_mode


def checks(c) -> list[Check]:
    """The rules of this file, for a Config."""
    return [*_memory(c), *_budget(c), *_deterministic(c), *_gradient_sums(c), *_step_graph(c), *_on_a_cpu(c)]


def _memory(c) -> list[Check]:
    mode, every = c.memory.activation_checkpointing, c.memory.checkpoint_every
    return [
        (
            ("checkpoint_every", "layers", "activation_checkpointing"),
            mode == "every_n" and every > c.model.layers,
            f"checkpoint_every = {every}: must be ≤ layers = {c.model.layers}",
        ),
        (
            ("activation_checkpointing", "compile"),
            mode == "budget" and c.compile.compile == "none",
            "activation_checkpointing = 'budget': the compiler does it; set compile = 'blocks' or 'model'",
        ),
        (
            ("activation_checkpointing", "dropout", "compile", "compile_fullgraph"),
            mode == "selective"
            and c.model.dropout > 0
            and c.compile.compile != "none"
            and not c.compile.compile_fullgraph,
            "compile_fullgraph = false: not with activation_checkpointing = 'selective' and dropout > 0: a block "
            "that breaks into graphs would be recomputed with other masks; set it true",
        ),
    ]


def _budget(c) -> list[Check]:
    """A compiled graph that keeps to a budget must draw no random numbers: what it computes again draws others.

    Compiled blocks hold no dropout but `dropout`: all other kinds drop before the first block or after the last.
    """
    in_graph = ["dropout"]
    if c.compile.compile != "blocks":
        in_graph += ["embedding_dropout", "token_dropout", "output_dropout"]
    return [
        (
            ("activation_checkpointing", "compile", name),
            c.memory.activation_checkpointing == "budget" and getattr(c.model, name) > 0,
            f"activation_checkpointing = 'budget': not with {name} = {getattr(c.model, name):g}: what the compiler "
            f"computes again draws other random numbers, and gradients would be wrong (pytorch issue 190758); set "
            f"{name} = 0, or 'selective'" + (", or compile = 'blocks'" if name != "dropout" else ""),
        )
        for name in in_graph
    ]


def _deterministic(c) -> list[Check]:
    """What has no form that adds in one order, or chooses its kernels by how long they take."""
    on, kernel, mode = c.runtime.deterministic, c.model.attention, c.compile.compile_mode
    return [
        (
            ("deterministic", "attention"),
            on and kernel in UNORDERED_KERNELS,
            f"deterministic = true: not with attention = {kernel!r}, whose backward pass adds in any order; use "
            "'sdpa', 'flash', 'efficient', 'math' or 'manual'",
        ),
        (
            ("deterministic", "compile_mode"),
            on and c.compile.compile != "none" and mode.startswith("max-autotune"),
            f"deterministic = true: not with compile_mode = {mode!r}, which chooses kernels by a race; use 'default'",
        ),
    ]


def _gradient_sums(c) -> list[Check]:
    """What cannot be together with gradients that do not go through autograd."""
    t, mode, asked = c.training, c.compile.compile_mode, c.training.gradient_sums == "fused"
    cannot = [
        ("loss_kernel", t.loss_kernel == "full", "the head's is made by the loss; set loss_kernel = 'fused'"),
        ("float8", t.float8, "float8 has products of its own; set float8 = false"),
        (
            "data_parallel",
            c.parallel.data_parallel != "ddp",
            "FSDP2 sums gradients of shards itself; set data_parallel = 'ddp'",
        ),
        ("tensor_parallel", c.parallel.tensor_parallel > 1, "matrices are split; set tensor_parallel = 1"),
        (
            "compile_mode",
            c.compile.compile != "none" and mode in CUDA_GRAPH_MODES,
            f"the CUDA graphs of {mode!r} do not see them; set compile_mode = 'default'",
        ),
    ]
    return [
        (
            ("gradient_sums", name),
            asked and broken,
            f"gradient_sums = 'fused': not with {name} as it is: {why}",
        )
        for name, broken, why in cannot
    ]


def _step_graph(c) -> list[Check]:
    """What a step that is one CUDA graph cannot hold: whatever asks the device, counts on the host, changes shape."""
    t, o, m = c.training, c.optimizer, c.memory
    recomputes = m.activation_checkpointing not in ("none", "budget")
    cannot = [
        ("processes", c.parallel.processes, c.parallel.processes > 1, "it is of one process"),
        ("optimizer", o.optimizer, o.optimizer not in RECORDED, f"it can be one of {', '.join(RECORDED)}"),
        ("optimizer_offload", True, o.optimizer_offload, "its updates wait for the host"),
        ("precision", t.precision, t.precision == "fp16", "the host reads its loss scale; use bf16"),
        (
            "gradient_sums",
            t.gradient_sums,
            t.gradient_sums != "autograd",
            "its steps are counted; use autograd",
        ),
        (
            "pruning",
            c.pruning.pruning,
            c.pruning.pruning != "none",
            "the host knows when weights are ranked; use none",
        ),
        ("float8", True, t.float8, "not tried"),
        ("first_length", t.first_length, t.first_length > 0, "all steps must have one shape; use 0"),
        (
            "activation_checkpointing",
            m.activation_checkpointing,
            recomputes,
            "it asks for random states; use none",
        ),
        (
            "compile_mode",
            c.compile.compile_mode,
            c.compile.compile != "none" and c.compile.compile_mode in CUDA_GRAPH_MODES,
            "it has graphs of its own; use default",
        ),
        (
            "noise_scale_interval",
            c.logging.noise_scale_interval,
            c.logging.noise_scale_interval > 0,
            "it looks into steps; use 0",
        ),
        ("profile_steps", c.runtime.profile_steps, c.runtime.profile_steps > 0, "there are no parts; use 0"),
    ]
    return [
        (
            ("step_graph", name),
            c.compile.step_graph and broken,
            f"step_graph = true: not with {name} = {value!r}: {why}",
        )
        for name, value, broken, why in cannot
    ]


def _on_a_cpu(c) -> list[Check]:
    """What would do nothing there. With device = 'auto' only the machine can tell: engine/runtime.py and others."""
    of_a_gpu = {
        "tf32": c.runtime.tf32,
        "allocator": c.runtime.allocator != "default",
        "float8": c.training.float8,
        "step_graph": c.compile.step_graph,
    }
    shown = {"allocator": repr(c.runtime.allocator)}
    return [
        (
            ("device", name),
            c.run.device == "cpu" and asked,
            f"{name} = {shown.get(name, 'true')}: would do nothing with device = 'cpu'; it needs a GPU",
        )
        for name, asked in of_a_gpu.items()
    ]
