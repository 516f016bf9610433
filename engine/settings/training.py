"""What a step is, what is pruned meanwhile, and which updates are refused."""

from dataclasses import dataclass

from engine.declare import setting
from engine.pruning import METHODS, PATTERNS, PRUNES, SIGNED_METHODS, THRESHOLDS
from engine.pruning.ramp import RAMPS
from engine.pruning.scores import SCORES


@dataclass(frozen=True)
class Training:
    steps: int = setting(100, "optimizer steps", unit="steps", at_least=1, only_if={"epochs": (0,)})
    epochs: float = setting(
        0.0,
        "length in epochs in place of steps: as many steps as have all their samples, rounded up; 0: steps",
        unit="epochs",
        at_least=0,
    )
    batch_size: int = setting(
        16, "sequences in one optimizer step, over all ranks and micro-batches", unit="sequences", at_least=1
    )
    micro_batch_size: int = setting(
        0, "sequences in one forward pass of one rank; 0: no accumulation", unit="sequences", at_least=0
    )
    first_length: int = setting(
        0,
        "tokens of the first steps' sequences, into which samples are cut; doubles up to context in equal parts of "
        "lengthening_steps; 0: whole samples from the first step",
        unit="tokens",
        at_least=0,
        only_if={"model": ("gpt",)},
    )
    lengthening_steps: int = setting(
        0, "steps with sequences shorter than context, if first_length is set", unit="steps", at_least=0
    )
    curriculum: str = setting(
        "none",
        "which samples the first steps draw from: all, or those with the commonest tokens first (rarity)",
        choices=("none", "rarity"),
        only_if={"model": ("gpt",)},
    )
    curriculum_steps: int = setting(
        0,
        "steps until samples are drawn from all",
        unit="steps",
        at_least=0,
        only_if={"curriculum": ("rarity",)},
    )
    curriculum_start: float = setting(
        0.1,
        "share of the samples, the easiest, that the first step draws from",
        above=0,
        below=1,
        only_if={"curriculum": ("rarity",)},
    )
    redraw_candidates: bool = setting(
        False,
        "each epoch has wrong replies of its own beside a training row's true one, drawn from the true replies of "
        "other training dialogues; false: those in the token files, in every epoch",
        only_if={"model": ("double_heads",)},
    )
    average_decay: float = setting(
        0.0,
        "decay of an exponential moving average of the weights, which evaluations and the final model have; 0: none",
        at_least=0,
        below=1,
    )
    clip_norm: float = setting(
        1.0, "gradients are scaled down to this global norm; 0: no clipping", at_least=0
    )
    lm_loss_weight: float = setting(
        1.0,
        "weight of the reply's tokens, λ, in the loss (λ · tokens + choice) / (λ + 1)",
        at_least=0,
        only_if={"model": ("double_heads",)},
    )
    precision: str = setting(
        "fp32", "fp32, or bf16 or fp16 autocast over fp32 weights", choices=("fp32", "bf16", "fp16")
    )
    loss_scale: float = setting(
        65536.0, "first loss scale of fp16", above=0, only_if={"precision": ("fp16",)}
    )
    float8: bool = setting(
        False, "linear layers of the blocks multiply in float8 (torchao)", only_if={"precision": ("bf16",)}
    )
    loss_kernel: str = setting(
        "full",
        "full: logits and their gradient whole; fused: the gradient overwrites the logits; chunked: fused, and "
        "only a chunk of the logits exists at a time",
        choices=("full", "fused", "chunked"),
        only_if={"model": ("gpt", "double_heads")},
    )
    loss_chunk_tokens: int = setting(
        4096, "tokens of one chunk", unit="tokens", at_least=1, only_if={"loss_kernel": ("chunked",)}
    )
    gradient_sums: str = setting(
        "autograd",
        "how matrices' gradients are summed over micro-batches: by autograd, or fused: by the products that make "
        "them, with the weights cast once a step",
        choices=("autograd", "fused"),
        only_if={"precision": ("bf16",), "model": ("gpt", "double_heads")},
    )


@dataclass(frozen=True)
class Pruning:
    pruning: str = setting(
        "none",
        "weights that become zero during training: the smallest (magnitude), those that moved towards zero by their "
        "gradients (movement) or from where they began (movement_original), or by the optimizer's moments (state)",
        choices=METHODS,
    )
    pruning_score: str = setting(
        "bitter3",
        "what state ranks weights by: a definition of engine/pruning/scores.py",
        choices=SCORES,
        only_if={"pruning": ("state",)},
    )
    sparsity: float = setting(
        0.5,
        "share of the prunable weights that are zero at the end",
        above=0,
        below=1,
        only_if={"pruning": PRUNES},
    )
    pruning_start: int = setting(
        0, "updates before any weight is pruned", unit="steps", at_least=0, only_if={"pruning": PRUNES}
    )
    pruning_hold: int = setting(
        0,
        "last updates of the run, for which sparsity stays at its end",
        unit="steps",
        at_least=0,
        only_if={"pruning": PRUNES},
    )
    pruning_ramp: str = setting(
        "linear",
        "how sparsity rises: evenly, slowly at first (cubic_late), or slowly at last (cubic_early)",
        choices=RAMPS,
        only_if={"pruning": PRUNES},
    )
    pruning_interval: int = setting(
        50, "updates between rankings of the weights", unit="steps", at_least=1, only_if={"pruning": PRUNES}
    )
    pruning_threshold: str = setting(
        "global",
        "weights are ranked together (global), each tensor's by themselves (layer), or so with 0.7 × sparsity in the "
        "first tensor to 1.3 × in the last (layer_ramp)",
        choices=THRESHOLDS,
        only_if={"pruning": PRUNES},
    )
    pruning_sample: float = setting(
        1.0,
        "share of the scores, drawn at random, from which a threshold is estimated; 1: exact",
        above=0,
        at_most=1,
        only_if={"pruning": PRUNES},
    )
    pruning_pattern: str = setting(
        "unstructured",
        "any weights, or two of every four neighbours of a row (2:4); a mask only: products stay dense",
        choices=PATTERNS,
        only_if={"pruning": PRUNES},
    )
    pruning_exclude: str = setting(
        "",
        "parts of names of tensors that are not pruned, with commas: token_embedding,layers.0; empty: the weights of "
        "all linear layers are, the head's with them, and a token embedding that is tied to it",
        only_if={"pruning": PRUNES},
    )
    pruning_regrowth: bool = setting(
        False,
        "pruned weights come back when others rank below them",
        only_if={"pruning": (*SIGNED_METHODS, "state")},
    )


@dataclass(frozen=True)
class Guards:
    on_divergence: str = setting(
        "abort",
        "abort: a loss or gradient that is not finite, or a loss that rises, ends the run; skip: updates that are "
        "not finite or a spike are skipped and counted first; off: train on",
        choices=("abort", "skip", "off"),
    )
    divergence_rise: float = setting(
        2.0,
        "rise of the smoothed training loss above its minimum that ends the run; 0: any is let be",
        unit="nats",
        at_least=0,
        only_if={"on_divergence": ("abort", "skip")},
    )
    spike_norms: float = setting(
        10.0,
        "a gradient norm above this many times the median of those before it is a spike; 0: none is",
        at_least=0,
        only_if={"on_divergence": ("abort", "skip")},
    )
    max_skipped_steps: int = setting(
        10,
        "skipped updates after which one more ends the run",
        unit="steps",
        at_least=1,
        only_if={"on_divergence": ("skip",)},
    )
