"""Every setting of a run: name, type, default, unit, rule and meaning, declared once.

This module imports no torch, so that a mistake is reported in a fraction of a second. It must not read the
environment or the hardware, and must never change a value: a value is taken as given or refused. Rules between
settings are in engine/rules.py.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from engine import rules
from engine.data import BY_POSITION, DIALOGUES, DOCUMENTS, LABELLED, TEXTS, TOKENIZERS
from engine.declare import Setting, setting
from engine.errors import ConfigError
from engine.models import MODELS
from engine.optimizers import OPTIMIZERS, WITH_TWO_MOMENTS
from engine.pruning import METHODS, PATTERNS, PRUNES, SIGNED_METHODS, THRESHOLDS
from engine.pruning.ramp import RAMPS
from engine.pruning.scores import SCORES

try:
    import tomllib
except ModuleNotFoundError:  # Python < 3.11 on a GPU node
    import tomli as tomllib


@dataclass(frozen=True)
class Run:
    study: str = setting("by_hand", "name of the study this run belongs to")
    run: str = setting("run", "name of the run within its study")
    seed: int = setting(1, "seed of initial weights, data order and dropout", at_least=0, at_most=2**32 - 1)
    device: str = setting("auto", "device; auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class Data:
    dataset: str = setting(
        "stdlib",
        "source of the text, of the labelled rows or of the dialogues",
        choices=TEXTS | LABELLED | DIALOGUES,
    )
    data_dir: str = setting(
        "",
        "directory that holds the data set's files; empty: fetch it by name",
        only_if={
            "dataset": (
                "wikitext2",
                "tinyshakespeare",
                "text",
                *DOCUMENTS,
                "ag_news",
                "imdb",
                "table",
                *DIALOGUES,
            )
        },
    )
    data_file: str = setting(
        "", "the file whose text is cut by position into splits", only_if={"dataset": ("text_file",)}
    )
    validation_percent: int = setting(
        5,
        "held out for validation: of the characters, cut off behind the training text; or of the documents, chosen "
        "by a hash of their text; of dialogues, of the personas, so chosen, where there is no file of them",
        unit="%",
        at_least=1,
        at_most=50,
        only_if={"dataset": (*BY_POSITION, *DOCUMENTS, *DIALOGUES)},
    )
    test_percent: int = setting(
        5,
        "held out for the test: of the characters, cut off behind the validation text; or of the documents, chosen "
        "by a hash of their text; 0: no test",
        unit="%",
        at_least=0,
        at_most=49,
        only_if={"dataset": (*BY_POSITION, *DOCUMENTS)},
    )
    tokenizer: str = setting("bytes", "how text becomes tokens", choices=TOKENIZERS)
    vocab_size: int = setting(
        4096,
        "vocabulary of a trained or a hashing tokenizer",
        unit="tokens",
        at_least=257,
        only_if={"tokenizer": ("bpe", "hashed_words", "frequent_words")},
    )
    tokenizer_dir: str = setting(
        "",
        "directory with encoder.json and vocab.bpe; empty: fetch them by name",
        only_if={"tokenizer": ("gpt2",)},
    )
    max_train_bytes: int = setting(
        0,
        "training text is cut after this many bytes, of documents after a whole one; 0: all of it",
        unit="bytes",
        at_least=0,
        only_if={"dataset": tuple(TEXTS)},
    )
    text_column: str = setting(
        "text",
        "column with the text; several, joined by a space: title,description",
        only_if={"dataset": ("table",)},
    )
    label_column: str = setting("label", "column with the label", only_if={"dataset": ("table",)})
    validation_rows: int = setting(
        2000,
        "rows held out of the training rows for validation, chosen by a hash of their text, where there is no file "
        "of them",
        unit="rows",
        at_least=1,
        only_if={"dataset": tuple(LABELLED)},
    )
    test_rows: int = setting(
        2000,
        "rows held out of the training rows for the test, where there is no file of them; the same for any "
        "validation_rows",
        unit="rows",
        at_least=1,
        only_if={"dataset": ("table", "synthetic")},
    )
    max_train_rows: int = setting(
        0,
        "training rows used, chosen by a hash of their text; 0: all",
        unit="rows",
        at_least=0,
        only_if={"dataset": (*LABELLED, *DIALOGUES)},
    )
    candidates: int = setting(
        8,
        "replies to choose from, one of them the true one",
        at_least=2,
        only_if={"dataset": tuple(DIALOGUES)},
    )
    length_percentile: float = setting(
        95.0,
        "share of the training rows, the shortest before the reply, that are used; in validation and test the oldest "
        "turns of longer ones are left out",
        unit="%",
        above=0,
        at_most=100,
        only_if={"dataset": tuple(DIALOGUES)},
    )
    max_reply_tokens: int = setting(
        32,
        "room for a reply with its speaker and its end; training rows with a longer one are left out",
        unit="tokens",
        at_least=3,
        only_if={"dataset": tuple(DIALOGUES)},
    )


@dataclass(frozen=True)
class Model:
    model: str = setting("gpt", "architecture", choices=MODELS)
    layers: int = setting(4, "transformer blocks", at_least=1)
    heads: int = setting(4, "attention heads", at_least=1)
    width: int = setting(128, "model width", unit="features", at_least=1)
    mlp_width: int = setting(
        0,
        "inner width of the MLP; 0: 4 × width, or of gated ones the width with as many parameters",
        unit="features",
        at_least=0,
    )
    context: int = setting(128, "sequence length", unit="tokens", at_least=1)
    norm_placement: str = setting("pre", "layer norm before or after each sublayer", choices=("pre", "post"))
    attention: str = setting(
        "sdpa",
        "attention implementation: torch's choice of kernel, one of its kernels, or written out; flex: the kernels "
        "of the reciprocal term, in compiled graphs",
        choices=("sdpa", "flash", "cudnn", "efficient", "math", "manual", "flex"),
    )
    attention_form: str = setting(
        "multi_head",
        "multi-head attention, or latent attention (MLA)",
        choices=("multi_head", "latent"),
        only_if={"model": ("gpt",)},
    )
    padding_mask: bool = setting(
        True,
        "attention and pooling leave padding out; false: they see it",
        only_if={"model": ("classifier",)},
    )
    latent_width: int = setting(
        128,
        "width of the latent keys and values, shared by the heads",
        unit="features",
        at_least=1,
        only_if={"attention_form": ("latent",)},
    )
    latent_query: str = setting(
        "per_head",
        "each head has its own latent query, or all share one",
        choices=("per_head", "shared"),
        only_if={"attention_form": ("latent",)},
    )
    latent_value: str = setting(
        "per_head",
        "each head has its own map of the latent values to its width, or all share one",
        choices=("per_head", "shared"),
        only_if={"attention_form": ("latent",)},
    )
    reciprocal_alpha: float = setting(
        0.0, "weight of the reciprocal term; 0: none", only_if={"attention_form": ("latent",)}
    )
    reciprocal_window: int = setting(
        64,
        "how far back the reciprocal term reaches",
        unit="tokens",
        at_least=0,
        only_if={"attention_form": ("latent",)},
    )
    activation: str = setting(
        "gelu",
        "non-linearity of the MLP; gated ones (swiglu, geglu) are 8/3 wide, so that the parameters stay equal",
        choices=("gelu", "gelu_tanh", "relu", "swiglu", "geglu"),
    )
    positions: str = setting(
        "learned", "how a token's position is known", choices=("learned", "sinusoidal", "rotary")
    )
    residual_precision: str = setting(
        "fp32",
        "precision of the residual stream under precision = bf16",
        choices=("fp32", "bf16"),
        only_if={"precision": ("bf16",)},
    )
    pad_vocabulary_to: int = setting(
        1,
        "embedding rows are padded to a multiple of this, for speed; padding is never predicted",
        unit="rows",
        at_least=1,
        only_if={"model": ("gpt", "double_heads")},
    )
    shared_context: bool = setting(
        False,
        "what was said before the candidates is computed once for all of them; false: once for each",
        only_if={"model": ("double_heads",)},
    )
    init_from: str = setting(
        "",
        "directory of a finished run, or of a GPT-2 in Hugging Face format, to start from; empty: seeded",
        only_if={"model": ("gpt", "double_heads")},
    )
    tie_embeddings: bool = setting(
        True, "output head shares the token embedding's weight", only_if={"model": ("gpt", "double_heads")}
    )
    bias: bool = setting(True, "biases in linear layers and layer norms")
    dropout: float = setting(0.0, "dropout probability", at_least=0, below=1)
    embedding_dropout: float = setting(
        0.0, "dropout probability of the embedding", at_least=0, below=1, only_if={"model": ("classifier",)}
    )
    token_dropout: float = setting(
        0.0,
        "probability that a training token's embedding is left out",
        at_least=0,
        below=1,
    )
    output_dropout: float = setting(
        0.0,
        "dropout probability of what the output head reads",
        at_least=0,
        below=1,
        only_if={"model": ("gpt", "double_heads")},
    )


@dataclass(frozen=True)
class Optimizer:
    optimizer: str = setting("adamw", "optimizer", choices=OPTIMIZERS)
    lr: float = setting(1e-3, "peak learning rate", above=0)
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
        "updates over which their size grows from 0, at the start and after each reset; 0: none",
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
    warmup_steps: int = setting(0, "linear warm-up", unit="steps", at_least=0)
    min_lr_fraction: float = setting(
        0.1,
        "learning rate at the last step, as a fraction of lr",
        at_least=0,
        at_most=1,
        only_if={"schedule": ("cosine", "linear")},
    )


@dataclass(frozen=True)
class Training:
    steps: int = setting(100, "optimizer steps", unit="steps", at_least=1)
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
        only_if={"precision": ("bf16",), "model": ("gpt",)},
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


@dataclass(frozen=True)
class Evaluation:
    eval_interval: int = setting(
        50, "steps between evaluations; the last step is always evaluated", unit="steps", at_least=1
    )
    eval_batch_size: int = setting(
        16, "sequences in one evaluation batch of one rank", unit="sequences", at_least=1
    )
    eval_tokens: int = setting(
        0,
        "validation tokens used during training; 0: all (the test is always whole)",
        unit="tokens",
        at_least=0,
        only_if={"model": ("gpt",)},
    )
    eval_stride: int = setting(
        0,
        "tokens between evaluation windows; smaller than context: sliding windows; 0: context",
        unit="tokens",
        at_least=0,
        only_if={"model": ("gpt",)},
    )
    eval_train_rows: int = setting(
        0,
        "training rows, the first of the files, that each evaluation scores too, as it does the others; 0: none",
        unit="rows",
        at_least=0,
        only_if={"model": ("double_heads",)},
    )
    eval_precision: str = setting(
        "precision",
        "dtype of the matrix products of an evaluation; precision: as in training. One for all runs of a study",
        choices=("precision", "fp32", "bf16", "fp16"),
    )
    sample_tokens: int = setting(
        0,
        "tokens of a sample of text that each evaluation leaves; 0: none",
        unit="tokens",
        at_least=0,
        only_if={"model": ("gpt",)},
    )
    latency_lengths: tuple[int, ...] = setting(
        (),
        "sequence lengths at which the final model's latency is measured after training, and its cache",
        only_if={"model": ("gpt",)},
    )
    sample_prompt: str = setting("", "text that samples go on from; empty: how the validation text begins")


@dataclass(frozen=True)
class Saving:
    checkpoint_interval: int = setting(
        0, "steps between checkpoints for resuming; 0: none", unit="steps", at_least=0
    )


@dataclass(frozen=True)
class Logging:
    log_interval: int = setting(10, "steps between progress lines", unit="steps", at_least=1)
    activation_norm_layers: tuple[int, ...] = setting((), "blocks whose output norm (RMS) is recorded")
    gradient_norm_layers: tuple[int, ...] = setting(
        (), "blocks whose gradient norm, before clipping, is recorded"
    )
    noise_scale_interval: int = setting(
        0,
        "steps between measurements of the gradient noise scale, from the gradients of a step's micro-batches; each "
        "costs another forward and backward pass; 0: none",
        unit="steps",
        at_least=0,
    )

    attention_sequences: int = setting(
        0,
        "validation sequences on which evaluations measure the entropy and reciprocity of attention; 0: none",
        unit="sequences",
        at_least=0,
        only_if={"model": ("gpt",)},
    )
    monitor_interval: float = setting(
        0.0,
        "seconds between samples of the device's memory, utilisation, temperature and power in the steps; 0: none",
        unit="s",
        at_least=0,
    )
    reciprocity_window: int = setting(
        64,
        "how far apart two tokens are at most whose scores of each other reciprocity compares",
        unit="tokens",
        at_least=1,
    )


@dataclass(frozen=True)
class Config:
    """One run, complete and valid. A consumer is given its own section, never the whole."""

    run: Run
    data: Data
    model: Model
    optimizer: Optimizer
    schedule: Schedule
    training: Training
    pruning: Pruning
    guards: Guards
    parallel: Parallel
    memory: Memory
    compile: Compile
    runtime: Runtime
    evaluation: Evaluation
    saving: Saving
    logging: Logging

    @property
    def directory(self) -> Path:
        """Where this run writes, relative to the working directory."""
        return Path("results") / self.run.study / f"{self.run.run}-{self.run.seed}"

    @property
    def peak_lr(self) -> float:
        """The learning rate at the schedule's peak: lr, times what lr_rule makes of batch_size / lr_batch_size.

        In decimals, as one would work it out by hand.
        """
        o, batch = self.optimizer, self.training.batch_size
        if o.lr_rule == "none":
            return o.lr
        ratio = Fraction(batch, o.lr_batch_size)
        if o.lr_rule == "linear":
            return float(Fraction(repr(o.lr)) * ratio)
        return o.lr * math.sqrt(ratio)

    def rank_sequences(self, data_size: int) -> int:
        """Sequences of a step that each of `data_size` ranks reads: its part, or without shards all of them."""
        return self.training.batch_size // (data_size if self.parallel.shard_samples else 1)

    @property
    def tokens_directory(self) -> Path:
        """Where this run's token files are, relative to the working directory."""
        return Path("tokens") / self.run.study

    @property
    def eval_precision(self) -> str:
        """The precision that evaluations have: their own, or that of training."""
        asked = self.evaluation.eval_precision
        return self.training.precision if asked == "precision" else asked

    @property
    def flat(self) -> dict:
        """Every setting by its name."""
        return {name: value for section in SECTIONS for name, value in vars(getattr(self, section)).items()}


SECTIONS = typing.get_type_hints(Config)


def _collect() -> dict[str, Setting]:
    found = {}
    for section, cls in SECTIONS.items():
        types = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            assert f.name not in found, f"setting {f.name} is declared twice"
            found[f.name] = Setting(f.name, section, types[f.name], f.default, **f.metadata)
    return found


SETTINGS = _collect()


def nearest(name: str) -> str:
    """' (nearest: X)' for the declared setting whose name or meaning is most like `name`, or ''."""

    def likeness(s: Setting) -> float:
        words = name.lower().replace("_", " ")
        by_meaning = difflib.SequenceMatcher(None, words, s.meaning.lower()[: len(words) + 5]).ratio()
        return max(difflib.SequenceMatcher(None, name.lower(), s.name).ratio(), by_meaning)

    best = max(SETTINGS.values(), key=likeness)
    return f" (nearest: {best.name})" if likeness(best) >= 0.6 else ""


def value_problems(values: Mapping) -> list[str]:
    """Problems with names, types and ranges of flat `values`."""
    problems = []
    for name, value in values.items():
        if name not in SETTINGS:
            problems.append(f"{name}: unknown setting{nearest(str(name))}")
        elif not SETTINGS[name].accepts(value):
            problems.append(f"{name} = {value!r}: must be {SETTINGS[name].allowed}")
    return problems


def is_effective(name: str, values: Mapping) -> bool:
    """Whether setting `name` can have an effect in a run with these flat `values`."""
    return all(
        values.get(other, SETTINGS[other].default) in wanted
        for other, wanted in SETTINGS[name].only_if.items()
    )


def effect_problems(values: Mapping, unknown: Collection[str] = ()) -> dict[str, str]:
    """Settings that differ from their default and would do nothing, each with its message.

    None that hangs on an `unknown` value.
    """
    problems = {}
    for name, value in values.items():
        s = SETTINGS[name]
        if s.only_if.keys() & set(unknown):
            continue
        if s.typed(value) != s.default and not is_effective(name, values):
            needed = " and ".join(f"{k} = {' or '.join(map(_value, v))}" for k, v in s.only_if.items())
            actual = ", ".join(f"{k} = {_value(values.get(k, SETTINGS[k].default))}" for k in s.only_if)
            problems[name] = f"{name} = {value!r}: would do nothing with {actual}; it needs {needed}"
    return problems


def _value(value) -> str:
    """As TOML and YAML have it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def resolve(
    values: Mapping, where: str, problems: Sequence[str] = (), *, only: Collection[str] = ()
) -> Config:
    """Make the complete configuration from flat `values`; what is absent takes its default.

    only: the sections that `values` speak of, if not of all; then no rule counts that others have a part in.
    Raises ConfigError with every problem found, after the `problems` that the caller found already; `where`
    names the file in its message.
    """
    known = {k: v for k, v in values.items() if k in SETTINGS and SETTINGS[k].accepts(v)}
    unknown = values.keys() - known.keys()
    if only:
        unknown |= {s.name for s in SETTINGS.values() if s.section not in only}
    sections = {
        section: cls(**{k: SETTINGS[k].typed(v) for k, v in known.items() if SETTINGS[k].section == section})
        for section, cls in SECTIONS.items()
    }
    config = Config(**sections)
    problems = [
        *problems,
        *value_problems(values),
        *effect_problems(known, unknown).values(),
        *rules.problems(config, unknown),
    ]
    if problems:
        raise ConfigError(problems, where)
    return config


def tables(config: Config) -> dict[str, dict]:
    """The configuration as TOML tables: every setting that can have an effect, nothing else."""
    flat = config.flat
    return {
        section: {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in vars(getattr(config, section)).items()
            if is_effective(k, flat)
        }
        for section in SECTIONS
    }


def load(path: str | Path, *, only: Collection[str] = ()) -> Config:
    """Read one run's TOML file, or one of some sections `only`.

    Raises ConfigError for anything that is not exactly right.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file", str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not valid TOML: {error}", str(path)) from None
    flat, problems = {}, []
    for section, table in data.items():
        if not isinstance(table, dict):
            home = SETTINGS.get(section)
            hint = f"belongs under [{home.section}]" if home else f"unknown setting{nearest(section)}"
            problems.append(f"{section}: {hint}")
            flat |= {section: table} if home else {}
        elif section not in SECTIONS:
            problems.append(f"[{section}]: unknown table; the tables are {', '.join(SECTIONS)}")
        else:
            for name, value in table.items():
                if name in SETTINGS and SETTINGS[name].section != section:
                    problems.append(f"{name}: belongs under [{SETTINGS[name].section}], not [{section}]")
                flat[name] = value
    return resolve(flat, str(path), problems, only=only)


def main() -> None:
    """Print every setting: `python -m engine.config`."""
    for section in SECTIONS:
        print(f"\n[{section}]")
        for s in SETTINGS.values():
            if s.section == section:
                print(f"  {s.name} = {s.default!r}".ljust(38) + f"{s.meaning}; {s.allowed}")


if __name__ == "__main__":
    main()
