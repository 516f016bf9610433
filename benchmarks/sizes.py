"""The task that every peer is given: shape of the model, tokens of a step, and the engine's settings for it.

A size says what is computed. How a peer computes it (precision, compile) is the best that it offers there.
"""

import math
from dataclasses import dataclass

from benchmarks.recipes import CHAR


@dataclass(frozen=True)
class Size:
    """One task. `vocabulary` is what the synthetic text has; the token files decide what is used."""

    name: str
    device: str  # cpu or cuda
    layers: int
    heads: int
    width: int
    context: int  # tokens; of dialogues with the reply
    micro_batch: int  # sequences, or dialogues, in one forward pass
    accumulation: int  # forward passes in one step
    tokenizer: str  # words or chars
    vocabulary: int  # of the synthetic text
    lr: float
    warmup: int  # steps before the timed ones
    steps: int  # timed steps
    repeats: int  # each peer runs so often, in turns
    limit_seconds: int  # for one run of one peer
    train_tokens: int = 0  # of the synthetic text, where there is one
    row_multiple: int = 1  # embedding rows are padded to a multiple of this
    classes: int = 0  # of AG News' rows, which have a label; 0: a text
    choices: int = 0  # replies to choose from, of PERSONA-CHAT's rows; 0: no dialogues
    mlp_width: int = 0  # 0: 4 × width
    target_loss: float = 0.0  # nats a token of validation: a race to it, each peer by its own recipe; 0: none
    eval_interval: int = 0  # steps, of a race

    @property
    def step_tokens(self) -> int:
        """Of dialogues as if every reply had a context of its own, all of them full."""
        return self.samples * self.sample_tokens

    @property
    def samples(self) -> int:
        """Sequences, rows or dialogues of a step."""
        return self.micro_batch * self.accumulation

    @property
    def sample_tokens(self) -> int:
        return self.context * (self.choices or 1)

    def chance(self, vocabulary: int) -> float:
        """The loss of a model that knows nothing, in nats."""
        if self.choices:
            return (math.log(vocabulary) + math.log(self.choices)) / 2
        return math.log(self.classes or vocabulary)

    @property
    def total_steps(self) -> int:
        return self.warmup + self.steps

    @property
    def lr_warmup_steps(self) -> int:
        return min(10, self.total_steps)

    def rows(self, vocabulary: int) -> int:
        """Embedding rows for a vocabulary."""
        return -(-vocabulary // self.row_multiple) * self.row_multiple

    def flops_per_token(self, vocabulary: int) -> float:
        """Forward and backward, the same for every peer: 6 N + 12 L C T (PaLM, appendix B; attention not halved).

        N: weights of the matrix products, the head's with its padded rows.
        """
        inner = self.mlp_width or 4 * self.width
        head = (
            0 if self.classes else self.rows(vocabulary) * self.width
        )  # of classes it is a token's in hundreds
        weights = self.layers * (4 * self.width**2 + 2 * self.width * inner) + head
        return 6 * weights + 12 * self.layers * self.width * self.context


GPT2_124M = {"layers": 12, "heads": 12, "width": 768}


def _classifier(name: str, **shape: int) -> Size:
    return Size(
        name=name,
        device="cuda",
        **shape,
        micro_batch=480,
        accumulation=1,
        tokenizer="frequent_words",
        vocabulary=20_000,
        lr=1e-3,
        warmup=20,
        steps=150,
        repeats=3,
        limit_seconds=180,
        classes=4,
    )


SIZES = {
    size.name: size
    for size in (
        # nanoGPT's character model for a CPU, as in the command of its README
        Size(
            name="cpu",
            device="cpu",
            layers=4,
            heads=4,
            width=128,
            context=64,
            micro_batch=12,
            accumulation=1,
            tokenizer="chars",
            vocabulary=65,
            train_tokens=1_000_000,
            lr=1e-3,
            warmup=10,
            steps=200,
            repeats=5,
            limit_seconds=180,
        ),
        # GPT-2 124M, 131,072 tokens a step
        Size(
            name="gpu",
            device="cuda",
            **GPT2_124M,
            context=1024,
            micro_batch=32,
            accumulation=4,
            tokenizer="words",
            vocabulary=50257,
            train_tokens=4_000_000,
            row_multiple=64,
            lr=6e-4,
            warmup=5,
            steps=15,
            repeats=1,
            limit_seconds=400,
        ),
        # The roadmap's: GPT-2 124M with 16,384 tokens a step, so that a plain fp32 loop fits and takes no minutes
        Size(
            name="roadmap",
            device="cuda",
            **GPT2_124M,
            context=1024,
            micro_batch=16,
            accumulation=1,
            tokenizer="words",
            vocabulary=50258,  # even, so that two processes can split it
            train_tokens=1_000_000,
            lr=6e-4,
            warmup=5,
            steps=15,
            repeats=1,
            limit_seconds=240,
        ),
        # A race: nanoGPT's config/train_shakespeare_char.py, to the loss that it was measured to reach
        Size(
            name="char",
            device="cuda",
            layers=6,
            heads=6,
            width=384,
            context=256,
            micro_batch=64,
            accumulation=1,
            tokenizer="chars",
            vocabulary=65,
            lr=1e-3,
            warmup=100,
            steps=2400,
            repeats=3,
            limit_seconds=300,
            target_loss=1.4731,
            eval_interval=50,
        ),
        # Only shows that a race runs
        Size(
            name="char_smoke",
            device="cpu",
            layers=1,
            heads=2,
            width=16,
            context=32,
            micro_batch=4,
            accumulation=1,
            tokenizer="chars",
            vocabulary=65,
            lr=1e-3,
            warmup=2,
            steps=8,
            repeats=1,
            limit_seconds=60,
            target_loss=4.0,
            eval_interval=5,
        ),
        # The study agnews' two models, at its batch
        _classifier("agnews_small", layers=2, heads=4, width=128, mlp_width=256, context=128),
        _classifier("agnews_large", layers=4, heads=8, width=256, mlp_width=1024, context=256),
        # The study persona's model, at a micro-batch that a 32 GiB card of the original's held
        Size(
            name="persona",
            device="cuda",
            **GPT2_124M,
            context=264,  # 232 before a reply of 32: the 95th percentile of PERSONA-CHAT's rows
            micro_batch=13,
            accumulation=3,
            tokenizer="gpt2",
            vocabulary=50262,
            row_multiple=64,
            lr=6.25e-5,
            warmup=5,
            steps=30,
            repeats=3,
            limit_seconds=240,
            choices=8,
        ),
        Size(
            name="persona_smoke",
            device="cpu",
            layers=1,
            heads=2,
            width=16,
            context=200,
            micro_batch=2,
            accumulation=2,
            tokenizer="bytes",
            vocabulary=261,
            lr=1e-2,
            warmup=2,
            steps=6,
            repeats=1,
            limit_seconds=60,
            choices=3,
        ),
        # Only shows that everything runs
        Size(
            name="smoke",
            device="cpu",
            layers=2,
            heads=2,
            width=32,
            context=16,
            micro_batch=4,
            accumulation=2,
            tokenizer="words",
            vocabulary=301,
            train_tokens=20_000,
            row_multiple=64,
            lr=1e-2,
            warmup=3,
            steps=9,
            repeats=1,
            limit_seconds=60,
        ),
    )
}

OF_TEXT = ("engine", "bare", "nanogpt", "hf", "torchtitan")
OF_CLASSES = ("engine", "hashed")
OF_DIALOGUES = ("engine", "padded")
OF_A_RACE = ("engine", "nanogpt_char")


def peers(size: Size) -> tuple[str, ...]:
    """Those that can do the task."""
    if size.target_loss:
        return OF_A_RACE
    if size.choices:
        return OF_DIALOGUES
    return OF_CLASSES if size.classes else OF_TEXT


def best(size: Size) -> dict:
    """The engine's settings of BEST that have an effect on the task; in a race its recipe."""
    if size.target_loss:
        return race_settings(size)
    if size.choices and size.device == "cuda":
        return BEST_OF_DIALOGUES
    return {"precision": "bf16", "compile": "model", "tf32": True} if size.classes else BEST[size.device]


def race_settings(size: Size) -> dict:
    """The recipe, evaluated often, with nothing else between its steps; on a CPU only as many steps as there are."""
    found = CHAR | {"eval_interval": size.eval_interval, "eval_tokens": 0, "checkpoint_interval": 0}
    found |= {"eval_batch_size": size.micro_batch, "micro_batch_size": 0}
    if size.device == "cpu":
        found |= {"precision": "fp32", "compile": "none", "tf32": False}
        found |= {"steps": size.total_steps, "warmup_steps": 2, "batch_size": size.micro_batch}
    return found


# The engine at its best on each device. Anything not here or in `engine_settings` is its default.
BEST = {
    "cpu": {},
    "cuda": {
        "precision": "bf16",
        "residual_precision": "bf16",
        "loss_kernel": "fused",
        "gradient_sums": "fused",
        "compile": "model",
        "attention": "cudnn",
        "tf32": True,
        "allocator": "expandable_segments",
    },
}

BEST_OF_DIALOGUES = {
    name: BEST["cuda"][name] for name in ("precision", "residual_precision", "compile", "tf32")
}
BEST_OF_DIALOGUES |= {"shared_context": True, "loss_kernel": "fused", "allocator": "expandable_segments"}


def engine_settings(size: Size, data: dict) -> dict:
    """The engine's flat settings for this task, without those of BEST. `data`: where the text is.

    Checkpoints and progress lines are on, as in a real run.
    """
    own = {"pad_vocabulary_to": size.row_multiple, "bias": False, "eval_tokens": 8 * size.context}
    if size.classes:  # as in the study, but for its dropout of tokens
        own = {"model": "classifier", "norm_placement": "post", "positions": "sinusoidal", "dropout": 0.1}
    if size.choices:
        own = {
            "model": "double_heads",
            "pad_vocabulary_to": size.row_multiple,
            "dropout": 0.1,
            "clip_norm": 0.0,
        }
        own |= {"weight_decay": 0.0}
    return {
        "device": size.device,
        **data,
        **own,
        "layers": size.layers,
        "heads": size.heads,
        "width": size.width,
        "mlp_width": size.mlp_width,
        "context": size.context,
        "lr": size.lr,
        "schedule": "constant",
        "warmup_steps": size.lr_warmup_steps,
        "steps": size.total_steps,
        "batch_size": size.samples,
        "micro_batch_size": size.micro_batch,
        "eval_interval": size.total_steps,
        "eval_batch_size": 8,
        "checkpoint_interval": math.ceil(size.total_steps / 2),
    }


PEAK_FLOPS = {"H200": 989e12, "H100 80GB HBM3": 989e12}  # dense bf16, NVIDIA's data sheets


def peak_flops(device_name: str) -> float | None:
    """The nominal peak of the device, or None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
