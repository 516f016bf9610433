"""Language modelling: every token predicted from those before it; windows of one text."""

import hashlib
import math

import numpy as np
import torch

from engine import losses, parallel
from engine.config import Config
from engine.data.batches import IGNORED, TrainOrder, eval_batches, eval_windows
from engine.data.curriculum import CurriculumOrder
from engine.objectives import NextToken
from engine.tasks import scoring

EVAL_COLUMNS = ("val_loss",)
COUNTED = "tokens"


def train_order(tokens, config: Config) -> TrainOrder:
    """The windows of every step, in `tokens`, an engine.data.prepare.Tokens."""
    shape = (tokens.train, config.model.context, config.training.batch_size, config.order_seed)
    if config.training.curriculum == "none":
        return TrainOrder(*shape)
    return CurriculumOrder(*shape, config.training)


def targets_per_sample(config: Config) -> int:
    return config.model.context


def tokens_per_sample(config: Config) -> int:
    return config.model.context


def loss(config: Config, vocabulary_size: int, group=None) -> NextToken:
    """The run's objective; group: of tensor parallelism."""
    t = config.training
    return NextToken(vocabulary_size, kernel=t.loss_kernel, chunk_tokens=t.loss_chunk_tokens, group=group)


def evaluate(model, tokens, config: Config, ranks: parallel.Ranks, limit: int = 0) -> dict[str, float]:
    """loss (nats per token) and count (tokens scored) of the array `tokens`; limit: only so many (0: all)."""
    e, tokens = config.evaluation, tokens[: limit + 1] if limit else tokens
    batches = eval_batches(
        tokens,
        config.model.context,
        e.eval_batch_size,
        stride=e.eval_stride,
        rank=ranks.data_rank,
        world=ranks.data_size,
    )

    def score(inputs, targets):
        summed, _ = model(inputs, targets)
        return torch.stack([summed.double(), (targets != IGNORED).sum().double()])

    summed, count = scoring.sums(model, batches, score, config, ranks)
    return {"loss": summed / count, "count": int(count)}


def sha256(tokens, config: Config, limit: int = 0) -> str:
    """What `evaluate` scores, in hex: the tokens, where their windows begin, and how long those are."""
    tokens, context = tokens[: limit + 1] if limit else tokens, config.model.context
    starts = eval_windows(len(tokens), context, config.evaluation.eval_stride or context)
    digest = hashlib.sha256(f"{context} {len(tokens)} ".encode())
    digest.update(starts.astype("<i8").tobytes())
    digest.update(np.ascontiguousarray(tokens, dtype="<u4").tobytes())
    return digest.hexdigest()


def figures(scores: dict[str, float], split: dict, prefix: str) -> dict[str, float]:
    """Loss, perplexity and bits per byte under `prefix`; perplexity is not capped. split: its entry in meta.json."""
    nats = scores["loss"]
    return {
        f"{prefix}_loss": nats,
        f"{prefix}_perplexity": math.exp(nats) if nats < 700 else math.inf,
        f"{prefix}_bits_per_byte": nats / math.log(2) / split["bytes_per_token"],
    }


def amount(meta: dict) -> str:
    return f"{meta['splits']['train']['tokens']} tokens"


def empty_batch(config: Config, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (sequences, config.model.context)
    return torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64)


def flop_parameters(model) -> int:
    """All of them: the embedding too, because as the head's weight it is multiplied by."""
    return sum(p.numel() for p in model.parameters())


def lines(run, inputs: torch.Tensor) -> list:
    """Which loss kernel ran; `inputs` (b, T) of one micro-batch of this process."""
    model = parallel.unwrapped(run.model)
    return losses.lines(model.loss, run.config.training, inputs.numel())
