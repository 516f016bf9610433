"""What a run is called, and what is measured and kept of it."""

from dataclasses import dataclass

from engine.declare import setting


@dataclass(frozen=True)
class Run:
    study: str = setting("by_hand", "name of the study this run belongs to")
    run: str = setting("run", "name of the run within its study")
    seed: int = setting(
        1,
        "seed of initial weights and dropout, and of the data order unless data_seed is set; evaluations follow from "
        "no seed",
        at_least=0,
        at_most=2**32 - 1,
    )
    data_seed: int = setting(
        -1,
        "seed of the data order: which samples a step has, and the wrong replies of redraw_candidates; -1: seed",
        at_least=-1,
        at_most=2**32 - 1,
    )
    device: str = setting("auto", "device; auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))


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
    hits_candidates: int = setting(
        0,
        "the test is scored among so many replies too: hits@1; 0: only among candidates",
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
    keep_best: bool = setting(
        False,
        "the weights of the best evaluation are kept beside the final ones: of the lowest validation loss, or of "
        "labelled rows the highest accuracy; with pruning only at the target sparsity",
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
