"""Techniques alone and combined: each experiment is a base, and slots whose levels differ from it in some settings.

A technique's effect alone is base + technique against base; its effect combined is everything on against
everything on without it. So no combined effect is credited to one technique.
"""

import itertools
from dataclasses import dataclass, field

from benchmarks.recipes import BEST

ON = "on"


@dataclass(frozen=True)
class Experiment:
    """`slots`: {slot: {level: settings}}; a slot that is in no level is as in `base`."""

    name: str
    question: str
    base: dict
    slots: dict[str, dict[str, dict]]
    all_on: dict[str, str] = field(
        default_factory=dict
    )  # slot → level, when everything is on; empty: only alone
    swaps: bool = True  # also measure, with everything on, the levels that all_on does not have
    # (slot, level) → the levels that it cannot be without: alone it is measured on top of them
    needs: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    varies: tuple[
        str, ...
    ] = ()  # the slots that are measured, where not all are; the others may be in all_on
    crossed: bool = False  # instead of all that: every combination
    means: bool = False  # some steps do more than others, which a median does not see: also compare means

    def combinations(self) -> list[dict[str, str]]:
        """The combinations to measure, {slot: level}, the base first, each once."""
        if self.crossed:
            choices = [[None, *levels] for levels in self.slots.values()]
            found = [
                {slot: level for slot, level in zip(self.slots, chosen, strict=True) if level}
                for chosen in itertools.product(*choices)
            ]
        else:
            alone = [self.alone(slot, level) for slot in self._varied for level in self.slots[slot]]
            found = [{}, *(levels for pair in alone for levels in pair), *self._combined()]
        return [levels for i, levels in enumerate(found) if levels not in found[:i]]

    @property
    def _varied(self) -> tuple[str, ...]:
        return self.varies or tuple(self.slots)

    def alone(self, slot: str, level: str) -> tuple[dict[str, str], dict[str, str]]:
        """The combinations whose ratio is the effect of a level alone: without it, and with it."""
        needed = self.needs.get((slot, level), {})
        return needed, needed | {slot: level}

    def combined(self, slot: str, level: str) -> tuple[dict[str, str], dict[str, str]]:
        """The combinations whose ratio is the effect of a level among all others: without it, and with it."""
        needed = self.needs.get((slot, level), {})
        others = {s: chosen for s, chosen in self.all_on.items() if s != slot} | needed
        return others, others | {slot: level}

    def _combined(self) -> list[dict[str, str]]:
        if not self.all_on:
            return []
        levels = [(slot, level) for slot in self._varied for level in self.slots[slot]]
        pairs = [self.combined(*one) for one in levels if self.swaps or self.all_on.get(one[0]) == one[1]]
        without = [pair[0] for pair in pairs if pair[0] != self.all_on]
        return [self.all_on, *without, *(pair[1] for pair in pairs)]

    def settings(self, levels: dict[str, str]) -> dict:
        """What the run of a combination has in place of the size's own settings."""
        found = dict(self.base)
        for slot, level in levels.items():
            found |= self.slots[slot][level]
        return found


CHECKPOINTING = {
    "full": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
    "every_2": {"activation_checkpointing": "every_n", "checkpoint_every": 2},
}
BUDGETS = {
    f"budget_{share}": {"activation_checkpointing": "budget", "memory_budget": share}
    for share in (0.7, 0.5, 0.3, 0.1)
}
OPTIMIZERS = {
    "sgd": {"optimizer": "sgd"},
    "adam": {"optimizer": "adam"},
    "adamw, amsgrad": {"amsgrad": True},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "muon": {"optimizer": "muon"},
    # Without warm-up: it takes as long, and in so few steps the loss of a run with it would not fall.
    "spam": {"optimizer": "spam", "spam_warmup_steps": 0},
    "spam at density 0.5": {"optimizer": "spam", "spam_warmup_steps": 0, "spam_density": 0.5},
    "adamwspam_legacy": {"optimizer": "adamwspam_legacy"},
}
GPU = BEST["cuda"]
GPU_BLOCKS = GPU | {"compile": "blocks"}
BY_AUTOGRAD = {"gradient_sums": "autograd"}
BY_BLOCK = BY_AUTOGRAD | {"compile": "blocks"}  # a gathered block ends a graph
TWO_SHARDS = {"processes": 2, "data_parallel": "fsdp"}
STATE = {"pruning": "state", "optimizer": "adamwprune"}

LATENT = {"attention_form": "latent", "latent_width": 128}
RECIPROCAL = LATENT | {"reciprocal_alpha": 0.25}

EXPERIMENTS = {
    "cuda": (
        Experiment(
            "techniques",
            "What does each technique give alone, and what among all others?",
            {"precision": "bf16", "pad_vocabulary_to": 1},
            {
                "compile": {"model": {"compile": "model"}, "blocks": {"compile": "blocks"}},
                "residual stream": {"bf16": {"residual_precision": "bf16"}},
                "loss": {"fused": {"loss_kernel": "fused"}, "chunked": {"loss_kernel": "chunked"}},
                "attention": {
                    kernel: {"attention": kernel} for kernel in ("cudnn", "flash", "efficient", "manual")
                },
                "padded vocabulary": {ON: {"pad_vocabulary_to": 64}},
                "tf32": {ON: {"tf32": True}},
                "expandable segments": {ON: {"allocator": "expandable_segments"}},
            },
            {
                "compile": "model",
                "residual stream": "bf16",
                "loss": "fused",
                "attention": "cudnn",
                "padded vocabulary": ON,
                "tf32": ON,
                "expandable segments": ON,
            },
        ),
        Experiment(
            "precision",
            "What do lower precisions give, without the compiler?",
            {"pad_vocabulary_to": 64},
            {
                "precision": {"bf16": {"precision": "bf16"}, "fp16": {"precision": "fp16"}},
                "tf32": {ON: {"tf32": True}},
            },
            {"precision": "bf16", "tf32": ON},
        ),
        Experiment(
            "checkpointing",
            "What memory does each way of recomputing activations save, at what speed?",
            GPU_BLOCKS,
            {"checkpointing": CHECKPOINTING | BUDGETS},
        ),
        Experiment(
            "smallest",
            "How little memory does a step need, and what does that cost?",
            GPU_BLOCKS,
            {
                "checkpointing": {name: CHECKPOINTING[name] for name in ("full", "selective")},
                "loss": {"chunked": {"loss_kernel": "chunked"}},
            },
            crossed=True,
        ),
        Experiment(
            "compile_modes",
            "Which way of compiling pays?",
            GPU | BY_AUTOGRAD | {"compile": "none"},  # CUDA graphs do not see the other sums
            {
                "compile": {
                    "blocks": {"compile": "blocks"},
                    "blocks, reduce-overhead": {"compile": "blocks", "compile_mode": "reduce-overhead"},
                    "model": {"compile": "model"},
                    "model, dynamic shapes": {"compile": "model", "compile_dynamic": True},
                    "model, reduce-overhead": {"compile": "model", "compile_mode": "reduce-overhead"},
                    "model, max-autotune": {"compile": "model", "compile_mode": "max-autotune-no-cudagraphs"},
                }
            },
        ),
        Experiment(
            "on_top",
            "What else pays, or costs, on top of the best settings?",
            GPU,
            {
                "gradient sums": {"by autograd": BY_AUTOGRAD},
                "float8": {ON: BY_AUTOGRAD | {"float8": True}},
                "activation": {"relu_squared": {"activation": "relu_squared"}},
                "8-bit optimizer": {ON: {"optimizer": "adamw8bit"}},
                "optimizer in host memory": {ON: {"optimizer_offload": True}},
                "Python's own garbage collection": {ON: {"gc_interval": 0}},
                "device monitor": {"5 a second": {"monitor_interval": 0.2}, "20": {"monitor_interval": 0.05}},
            },
        ),
        Experiment(
            "attention_forms",
            "What does latent attention cost or save, and its reciprocal term, by fused kernels and written out?",
            GPU,
            {
                "attention": {
                    "multi-head, flash": {"attention": "flash"},
                    "latent, cudnn": LATENT,
                    "latent, flash": LATENT | {"attention": "flash"},
                    "latent, keys repeated for heads": LATENT | {"attention": "efficient"},
                    "latent, one query for all heads": LATENT | {"latent_query": "shared"},
                    "latent, one map of values": LATENT | {"latent_value": "shared"},
                    "reciprocal, fused": RECIPROCAL | {"attention": "flex"},
                    "reciprocal, fused, whole context": RECIPROCAL
                    | {"attention": "flex", "reciprocal_window": 1024},
                    "reciprocal, written out": RECIPROCAL | {"attention": "manual"},
                }
            },
        ),
        Experiment(
            "pruning",
            "What does pruning cost a step: its masks, and ranking all weights now and then?",
            GPU,
            {
                "pruning": {
                    "state, ranked every 5th step": STATE | {"pruning_interval": 5},
                    "magnitude, ranked every 5th": {"pruning": "magnitude", "pruning_interval": 5},
                    "movement, ranked every 5th": {"pruning": "movement", "pruning_interval": 5},
                    "state, ranked every step": STATE | {"pruning_interval": 1},
                    "state, by a sample, every step": STATE | {"pruning_interval": 1, "pruning_sample": 0.02},
                }
            },
            means=True,
        ),
        Experiment(
            "optimizers",
            "What does each optimizer's update cost a step, beside fused AdamW's?",
            GPU,
            {"optimizer": OPTIMIZERS},
        ),
        Experiment(
            "frontier",
            "How do memory and speed grow with the micro-batch, with and without checkpointing?",
            GPU_BLOCKS,
            {
                "checkpointing": {name: CHECKPOINTING[name] for name in ("selective", "full")},
                "micro-batch": {str(n): {"micro_batch_size": n} for n in (8, 16, 64, 128)},
            },
            crossed=True,
        ),
        Experiment(
            "spreading",
            "How much faster are two GPUs at the same global batch?",
            GPU,
            {
                "two GPUs": {
                    "ddp": {"processes": 2},
                    "fsdp, model gathered as one": TWO_SHARDS | BY_AUTOGRAD | {"shard_unit": "model"},
                    "fsdp, kept gathered": TWO_SHARDS | BY_BLOCK | {"reshard_after_forward": False},
                    "fsdp": TWO_SHARDS | BY_BLOCK,
                    "ddp, bound to cores": {"processes": 2, "cpu_affinity": True},
                    "ddp, gradients by autograd": {"processes": 2} | BY_AUTOGRAD,
                    "tensor parallel": {"processes": 2, "tensor_parallel": 2} | BY_AUTOGRAD,
                }
            },
        ),
    ),
    "cpu": (
        Experiment(
            "techniques",
            "What does each technique give alone, and what among all others?",
            {},
            {
                "compile": {"model": {"compile": "model"}, "blocks": {"compile": "blocks"}},
                "loss": {"fused": {"loss_kernel": "fused"}, "chunked": {"loss_kernel": "chunked"}},
                "attention": {"math": {"attention": "math"}, "manual": {"attention": "manual"}},
            },
            {"compile": "model", "loss": "fused"},
        ),
        Experiment(
            "checkpointing",
            "What memory does each way of recomputing activations save, at what speed?",
            BEST["cpu"] | {"compile": "blocks"},
            {"checkpointing": CHECKPOINTING | BUDGETS},
        ),
    ),
}
