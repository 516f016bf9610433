"""How weights are updated, and how the learning rate goes."""

from dataclasses import dataclass

from engine.declare import setting
from engine.optimizers import OPTIMIZERS, WITH_TWO_MOMENTS


@dataclass(frozen=True)
class Optimizer:
    optimizer: str = setting("adamw", "optimizer", choices=OPTIMIZERS)
    lr: float = setting(1e-3, "learning rate at its peak", above=0)
    lr_rule: str = setting(
        "none",
        "how lr follows the batch size: times batch_size / lr_batch_size (linear), its square root (sqrt), or not",
        choices=("none", "linear", "sqrt"),
    )
    lr_batch_size: int = setting(
        0,
        "batch size for which lr is meant",
        unit="sequences",
        at_least=0,
        only_if={"lr_rule": ("linear", "sqrt")},
    )
    weight_decay: float = setting(0.1, "weight decay of matrices and embeddings", at_least=0)
    beta1: float = setting(
        0.9,
        "decay of the first moment",
        at_least=0,
        below=1,
        only_if={"optimizer": WITH_TWO_MOMENTS},
    )
    beta2: float = setting(
        0.95,
        "decay of the second moment",
        at_least=0,
        below=1,
        only_if={"optimizer": WITH_TWO_MOMENTS},
    )
    epsilon: float = setting(
        1e-8,
        "added to the root of the second moment",
        above=0,
        only_if={"optimizer": WITH_TWO_MOMENTS},
    )
    amsgrad: bool = setting(
        False,
        "divide by the root of the largest second moment so far (AMSGrad)",
        only_if={"optimizer": ("adamw", "adam")},
    )
    spam_threshold: float = setting(
        5000.0,
        "a gradient whose square is above this many times its second moment is cut to that",
        above=0,
        only_if={"optimizer": ("spam",)},
    )
    spam_reset_steps: int = setting(
        500,
        "updates between resets of both moments; 0: none",
        unit="steps",
        at_least=0,
        only_if={"optimizer": ("spam",)},
    )
    spam_warmup_steps: int = setting(
        150,
        "updates over which their size grows from 0 after each reset; 0: none",
        unit="steps",
        at_least=0,
        only_if={"optimizer": ("spam",)},
    )
    spam_first_warmup: bool = setting(
        False,
        "the same at the start too, on top of the schedule's own warm-up",
        only_if={"optimizer": ("spam",)},
    )
    spam_grace_steps: int = setting(
        20,
        "updates after the start and each reset in which nothing is cut, because second moments are of few",
        unit="steps",
        at_least=0,
        only_if={"optimizer": ("spam",)},
    )
    spam_density: float = setting(
        1.0,
        "share of a matrix's entries, drawn anew at each reset, that have moments and are updated",
        above=0,
        at_most=1,
        only_if={"optimizer": ("spam",)},
    )
    legacy_threshold: float = setting(
        50.0,
        "a gradient above the root of this many times its second moment is cut to that",
        above=0,
        only_if={"optimizer": ("adamwspam_legacy",)},
    )
    legacy_spike: float = setting(
        2.0,
        "standard deviations above the mean of the last gradient norms that halve the first moment",
        above=0,
        only_if={"optimizer": ("adamwspam_legacy",)},
    )
    legacy_reset_counts: int = setting(
        1000,
        "counts between resets of both moments, of which each update takes two",
        at_least=1,
        only_if={"optimizer": ("adamwspam_legacy",)},
    )
    legacy_warmup_counts: int = setting(
        100,
        "counts after each reset over which the learning rate grows again; 0: none",
        at_least=0,
        only_if={"optimizer": ("adamwspam_legacy",)},
    )
    momentum: float = setting(0.9, "momentum", at_least=0, below=1, only_if={"optimizer": ("sgd",)})
    muon_lr: float = setting(
        0.02,
        "peak learning rate of the blocks' matrices; of the rest it is lr",
        above=0,
        only_if={"optimizer": ("muon",)},
    )
    muon_momentum: float = setting(
        0.95,
        "Nesterov momentum of the blocks' matrices",
        at_least=0,
        below=1,
        only_if={"optimizer": ("muon",)},
    )
    muon_weight_decay: float = setting(
        0.01,
        "weight decay of the blocks' matrices, of which muon_lr times this is taken a step",
        at_least=0,
        only_if={"optimizer": ("muon",)},
    )
    muon_precision: str = setting(
        "bf16",
        "dtype of the products that orthogonalise an update",
        choices=("bf16", "fp32"),
        only_if={"optimizer": ("muon",)},
    )
    nesterov: bool = setting(False, "Nesterov momentum", only_if={"optimizer": ("sgd",)})
    optimizer_fallback: str = setting(
        "none",
        "what to use, on record, where the library of the optimizer is missing; none: an error",
        choices=("none", "adamw"),
        only_if={"optimizer": ("adamw8bit",)},
    )
    optimizer_offload: bool = setting(
        False, "keep the optimizer's state in host memory between steps (saves GPU memory, costs time)"
    )


@dataclass(frozen=True)
class Schedule:
    schedule: str = setting(
        "cosine", "shape of the learning rate after warm-up", choices=("cosine", "linear", "constant")
    )
    warmup_steps: int = setting(
        0, "linear warm-up", unit="steps", at_least=0, only_if={"warmup_epochs": (0,)}
    )
    warmup_epochs: float = setting(
        0.0,
        "linear warm-up in epochs in place of warmup_steps, rounded up to whole steps; 0: warmup_steps",
        unit="epochs",
        at_least=0,
    )
    min_lr_fraction: float = setting(
        0.1,
        "learning rate at the last step, as a fraction of lr",
        at_least=0,
        at_most=1,
        only_if={"schedule": ("cosine", "linear")},
    )
