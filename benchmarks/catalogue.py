"""The roadmap's catalogue: every technique of it, how it is switched on, where its rows are, and what tests it.

Data only. Rows are found by slot and level (benchmarks/techniques.py), the run that shows the effect on the loss by
the settings that switch the technique on (conf/study/chargpt_techniques.yaml). Tests hold that each setting is the
engine's and that each test exists.
"""

from dataclasses import dataclass, field

from benchmarks.factorial import ON

UNIT, DISTRIBUTED, GPU = "tests/unit/test_", "tests/distributed/test_", "tests/gpu/test_"
AC = (
    f"{UNIT}step.py::test_activation_checkpointing_changes_memory_and_nothing_else",
    f"{GPU}gpu.py::test_activation_checkpointing_reduces_activation_memory_and_nothing_else",
)
COMPILE = (f"{UNIT}compiling.py::test_compiled_blocks_give_eagers_losses_and_prove_that_they_were_compiled",)
KERNEL = (
    f"{UNIT}model.py::test_both_attentions_are_the_same_function",
    f"{UNIT}model_parts.py::test_the_selected_kernel_runs",
)
LOSS = (f"{UNIT}loss_kernels.py::test_chunks_of_any_size_give_the_loss_and_gradients_of_plain_cross_entropy",)
MLP = (f"{UNIT}model_parts.py::test_an_activation_by_its_formula",)
SPREAD = (
    f"{DISTRIBUTED}same_as_one_process.py::test_losses_gradient_norms_and_weights_are_those_of_one_process",
)
SCHEDULE = (f"{UNIT}schedule.py::test_decay_never_rises_and_ends_at_its_minimum",)
ANY = "…"  # a number that depends on the size of the run


@dataclass(frozen=True)
class Technique:
    """One row of the table. Without settings it is not built, and `why` says why."""

    name: str
    on: dict = field(default_factory=dict)  # the settings that switch it on
    slot: str = ""  # of benchmarks/techniques.py; empty: it has no effect on speed and memory to measure
    level: str = ON
    tests: tuple[str, ...] = ()
    why: str = ""
    same_loss: bool = False  # its tests show that it trains as one process does; no study need

    @property
    def switch(self) -> str:
        """The settings in words."""
        return ", ".join(f"{name} = {_word(value)}" for name, value in self.on.items()) or "–"


def _word(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


BF16 = {"precision": "bf16"}
CATALOGUE = (
    Technique(
        "mixed precision, bf16",
        BF16,
        "mixed precision",
        "bf16",
        (f"{GPU}gpu.py::test_bf16_is_in_effect_and_close_to_fp32",),
    ),
    Technique(
        "mixed precision, fp16",
        {"precision": "fp16"},
        "mixed precision",
        "fp16",
        (f"{UNIT}loss_scale.py::test_fp16_trains_as_fp32_does",),
    ),
    Technique(
        "TF32",
        {"tf32": True},
        "tf32",
        ON,
        (f"{GPU}runtime_gpu.py::test_tf32_rounds_products_only_when_it_is_asked_for",),
    ),
    Technique(
        "bf16 residual stream",
        BF16 | {"residual_precision": "bf16"},
        "residual stream",
        "bf16",
        (f"{UNIT}model.py::test_the_residual_stream_has_the_precision_asked_for",),
    ),
    Technique(
        "quantised forward, float8",
        BF16 | {"float8": True},
        "float8",
        ON,
        (f"{UNIT}float8.py::test_loss_and_gradients_are_those_of_bf16_to_float8_precision",),
    ),
    Technique(
        "fused gradient sums",
        BF16 | {"loss_kernel": "fused", "gradient_sums": "fused"},
        "gradient sums",
        "fused",
        (f"{UNIT}gradient_sums.py::test_sums_are_those_of_autograd",),
    ),
    Technique(
        "activation checkpointing, full", {"activation_checkpointing": "full"}, "checkpointing", "full", AC
    ),
    Technique(
        "activation checkpointing, selective",
        {"activation_checkpointing": "selective"},
        "checkpointing",
        "selective",
        (*AC, f"{UNIT}memory.py::test_selective_checkpointing_keeps_what_is_dear"),
    ),
    Technique(
        "activation checkpointing, every 2nd",
        {"activation_checkpointing": "every_n", "checkpoint_every": 2},
        "checkpointing",
        "every_2",
        AC,
    ),
    Technique(
        "activation checkpointing, memory budget",
        {"compile": "model", "activation_checkpointing": "budget", "memory_budget": 0.5},
        "checkpointing",
        "budget",
        (f"{UNIT}compiling.py::test_a_budget_that_the_compiler_was_not_given",),
    ),
    Technique(
        "gradient accumulation",
        {"micro_batch_size": ANY},
        "accumulation",
        "4 parts",
        (f"{UNIT}step.py::test_accumulation_is_the_big_batch",),
    ),
    Technique(
        "allocator, expandable segments",
        {"allocator": "expandable_segments"},
        "expandable segments",
        ON,
        (f"{GPU}runtime_gpu.py::test_expandable_segments_are_used_and_seen_in_the_ledger",),
    ),
    Technique("torch.compile, whole model", {"compile": "model"}, "compile", "model", COMPILE),
    Technique("torch.compile, blocks", {"compile": "blocks"}, "compile", "blocks", COMPILE),
    Technique(
        "CUDA graphs (reduce-overhead)",
        {"compile": "model", "compile_mode": "reduce-overhead"},
        "compile mode",
        "reduce-overhead",
        (f"{GPU}runtime_gpu.py::test_a_replayed_graph_is_not_visible",),
    ),
    Technique(
        "CUDA graph of the whole step",
        {"step_graph": True},
        "step graph",
        ON,
        (
            f"{GPU}step_graph_gpu.py::test_a_replayed_step_is_the_step",
            f"{UNIT}step_graph.py::test_a_step_that_was_not_replayed_is_told_by_the_ledger",
        ),
    ),
    Technique(
        "torch.compile, max-autotune",
        {"compile": "model", "compile_mode": "max-autotune-no-cudagraphs"},
        "compile mode",
        "max-autotune",
        COMPILE,
    ),
    Technique("attention, SDPA", {"attention": "sdpa"}, "attention", "sdpa", KERNEL),
    Technique("attention, memory-efficient", {"attention": "efficient"}, "attention", "efficient", KERNEL),
    Technique(
        "attention, FlashAttention-2",
        BF16 | {"attention": "flash"},
        "attention",
        "flash",
        (*KERNEL, f"{GPU}gpu.py::test_flash_attention_is_in_the_ledger"),
    ),
    Technique(
        "attention, cuDNN",
        BF16 | {"attention": "cudnn"},
        "attention",
        "cudnn",
        (f"{GPU}models.py::test_the_selected_kernel_runs_and_is_the_same_function",),
    ),
    Technique("fused loss", {"loss_kernel": "fused"}, "loss", "fused", LOSS),
    Technique(
        "fused loss in chunks", {"loss_kernel": "chunked", "loss_chunk_tokens": ANY}, "loss", "chunked", LOSS
    ),
    Technique(
        "padded vocabulary",
        {"pad_vocabulary_to": 64},
        "padded vocabulary",
        ON,
        (f"{UNIT}model.py::test_padding_of_the_vocabulary_changes_nothing",),
    ),
    Technique(
        "8-bit AdamW",
        {"optimizer": "adamw8bit"},
        "8-bit AdamW",
        ON,
        (
            f"{UNIT}optimizers.py::test_eight_bit_updates_are_those_of_adamw_to_the_precision_of_its_moments",
            f"{UNIT}optimizers.py::test_a_run_with_the_fallback_is_adamws_and_says_so",
        ),
    ),
    Technique(
        "CPU offload of the optimizer",
        {"optimizer_offload": True},
        "optimizer in host memory",
        ON,
        (f"{UNIT}offload.py::test_offload_changes_no_bit",),
    ),
    Technique("activation, GELU by tanh", {"activation": "gelu_tanh"}, "activation", "gelu_tanh", MLP),
    Technique("activation, ReLU", {"activation": "relu"}, "activation", "relu", MLP),
    Technique("activation, SwiGLU", {"activation": "swiglu"}, "activation", "swiglu", MLP),
    Technique("activation, GeGLU", {"activation": "geglu"}, "activation", "geglu", MLP),
    Technique(
        "progressive sequence length",
        {"first_length": ANY, "lengthening_steps": ANY},
        "sequence length",
        "half at first",
        (
            f"{UNIT}lengths.py::test_a_run_has_the_same_samples_and_tokens_as_without",
            f"{UNIT}lengths.py::test_a_schedule_that_is_off_in_silence_is_told",
        ),
    ),
    Technique(
        "curriculum",
        {"curriculum": "rarity", "curriculum_steps": ANY},
        "curriculum",
        "rarity",
        (
            f"{UNIT}curriculum.py::test_a_step_draws_distinct_samples_of_the_easiest_only",
            f"{UNIT}curriculum.py::test_a_curriculum_that_is_off_in_silence_is_told",
        ),
    ),
    Technique("learning rate, linear decay", {"schedule": "linear"}, tests=SCHEDULE),
    Technique("learning rate, constant", {"schedule": "constant"}, tests=SCHEDULE),
    Technique("two processes, DDP", {"processes": 2}, "processes", "ddp", SPREAD, same_loss=True),
    Technique(
        "two processes, FSDP2",
        {"processes": 2, "data_parallel": "fsdp"},
        "processes",
        "fsdp",
        SPREAD,
        same_loss=True,
    ),
    Technique(
        "tensor parallel",
        {"processes": 2, "tensor_parallel": 2},
        "processes",
        "tensor parallel",
        SPREAD,
        same_loss=True,
    ),
    Technique(
        "CPU affinity",
        {"processes": 2, "cpu_affinity": True},
        "CPU affinity",
        ON,
        (f"{UNIT}runtime.py::test_each_process_is_bound_to_its_own_cores",),
        same_loss=True,
    ),
    Technique(
        "dynamic sparse attention",
        why="an idea of the roadmap; at these lengths attention is a small part of a step",
    ),
    Technique(
        "buffer swapping",
        why="an idea of the roadmap; recomputation saves the same memory without a copy to the host",
    ),
)
