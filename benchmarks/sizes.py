"""The task that every peer is given: shape of the model, and tokens of a step.

A size says what is computed. How a peer computes it (precision, compile) is the best that it offers there; the
engine's is in benchmarks/recipes.py.
"""

import math
from dataclasses import dataclass


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
    tokenizer: str  # words or chars
    vocabulary: int  # of the synthetic text
    lr: float
    warmup: int  # steps before the timed ones
    steps: int  # timed steps
    limit_seconds: int  # for one run of one peer
    accumulation: int = 1  # forward passes in one step
    repeats: int = 1  # each peer runs so often, in turns
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


def _smoke(name: str, **own) -> Size:
    """A task that only shows that everything runs."""
    return Size(name=name, device="cpu", heads=2, limit_seconds=60, **own)


def _classifier(name: str, **shape: int) -> Size:
    return Size(
        name=name,
        device="cuda",
        **shape,
        micro_batch=480,
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
            limit_seconds=400,
        ),
        # The roadmap's: GPT-2 124M with 16,384 tokens a step, so that a plain fp32 loop fits and takes no minutes
        Size(
            name="roadmap",
            device="cuda",
            **GPT2_124M,
            context=1024,
            micro_batch=16,
            tokenizer="words",
            vocabulary=50258,  # even, so that two processes can split it
            train_tokens=1_000_000,
            lr=6e-4,
            warmup=5,
            steps=15,
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
        _smoke(
            "char_smoke",
            layers=1,
            width=16,
            context=32,
            micro_batch=4,
            tokenizer="chars",
            vocabulary=65,
            lr=1e-3,
            warmup=2,
            steps=8,
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
        _smoke(
            "persona_smoke",
            layers=1,
            width=16,
            context=200,
            micro_batch=2,
            accumulation=2,
            tokenizer="bytes",
            vocabulary=261,
            lr=1e-2,
            warmup=2,
            steps=6,
            choices=3,
        ),
        _smoke(
            "smoke",
            layers=2,
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
