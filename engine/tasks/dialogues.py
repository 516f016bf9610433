"""Dialogues: which of several replies was given, and the tokens of the one that was; a sample is one such row.

The loss is (λ · tokens + choice) / (λ + 1): the mean over the true replies' tokens of the whole step, and the mean
over its rows, whatever ranks and micro-batches they are on.
"""

import math

import torch

from engine import losses, parallel
from engine.config import Config
from engine.data.choices import ChoiceOrder, Choices, eval_batches, lines_of
from engine.errors import ConfigError
from engine.ledger import Line
from engine.objectives import ReplyAndChoice
from engine.tasks import scoring

EVAL_COLUMNS = ("val_loss", "val_accuracy", "val_lm_loss", "val_mc_loss")
COUNTED = "examples"


def room(config: Config) -> int:
    """Tokens that may be before a reply."""
    return config.model.context - config.data.max_reply_tokens


def train_order(tokens, config: Config) -> ChoiceOrder:
    """The rows of every step, in `tokens`, an engine.data.prepare.Tokens. Raises ConfigError if they do not fit."""
    needed, reply = tokens.meta["context_tokens"], config.data.max_reply_tokens
    if needed > room(config):
        raise ConfigError(
            f"context = {config.model.context}: rows have up to {needed} tokens before a reply, and {reply} are for "
            f"it; set context = {needed + reply} or more, or a lower length_percentile"
        )
    t = config.training
    return ChoiceOrder(
        tokens.train, room(config), reply, t.batch_size, config.order_seed, redraw=t.redraw_candidates
    )


def targets_per_sample(config: Config) -> int:
    """The choice: replies have different numbers of tokens."""
    return 1


def tokens_per_sample(config: Config) -> int:
    """All candidates behind their context, or behind one."""
    count, reply = config.data.candidates, config.data.max_reply_tokens
    return room(config) + count * reply if config.model.shared_context else count * config.model.context


def loss(config: Config, vocabulary_size: int, group=None) -> ReplyAndChoice:
    """The run's objective; group: none, it is not split."""
    t = config.training
    return ReplyAndChoice(
        vocabulary_size, t.lm_loss_weight, kernel=t.loss_kernel, chunk_tokens=t.loss_chunk_tokens, group=group
    )


def evaluate(model, rows: Choices, config: Config, ranks: parallel.Ranks, limit: int = 0) -> dict[str, float]:
    """Scores of all `rows`: loss, lm_loss (nats per token of true replies), mc_loss (nats per row), accuracy (share
    of rows), count (rows) and reply_tokens."""
    assert not limit, "every row is scored"
    objective = parallel.unwrapped(model).loss
    batches = eval_batches(
        rows,
        room(config),
        config.data.max_reply_tokens,
        config.evaluation.eval_batch_size,
        rank=ranks.data_rank,
        world=ranks.data_size,
    )

    def score(inputs, targets):
        parts, _ = model(inputs, targets)
        return torch.cat([parts.double(), objective.counts(targets).double()])

    batches = ((torch.from_numpy(inputs), torch.from_numpy(targets)) for inputs, targets in batches)
    found = torch.tensor(scoring.sums(model, batches, score, config, ranks), dtype=torch.float64)
    sums, counts = found.chunk(2)
    scores = dict(zip(objective.PARTS, (sums / counts).tolist(), strict=True))
    scores |= {"loss": objective.weighed(sums, counts).sum().item()}
    return scores | {"reply_tokens": int(counts[0]), "count": int(counts[1])}


def sha256(rows: Choices, config: Config, limit: int = 0) -> str:
    """What `evaluate` scores, in hex: the rows with their candidates, whole."""
    return rows.sha256()


def figures(scores: dict[str, float], split: dict, prefix: str) -> dict[str, float]:
    """Loss and its parts, accuracy, and the perplexity of true replies, under `prefix`; it is not capped."""
    nats = scores["lm_loss"]
    found = {f"{prefix}_{name}": scores[name] for name in ("loss", "accuracy", "lm_loss", "mc_loss")}
    found[f"{prefix}_reply_perplexity"] = math.exp(nats) if nats < 700 else math.inf
    return found


def amount(meta: dict) -> str:
    """Training rows, how many of the published ones those of the source were, what was dropped, whose distractors."""
    splits = meta["splits"]
    words = (
        f"{splits['train']['rows']:,} training, {splits['validation']['rows']:,} validation and "
        f"{splits['test']['rows']:,} test replies among {meta['choices']}, no persona in two splits"
    )
    source, published = meta["source_rows"]["train"], meta["of_rows"].get("train")
    if published and source < published:
        share = 100 * source / published
        words += f", from {source:,} of the {published:,} published training replies ({share:.0f} %)"
    dropped = [f"{count:,} {why}" for why, count in meta["dropped"].items() if count]
    words += f", dropped {', '.join(dropped)}" if dropped else ""
    cut = [f"{count:,} of {name}" for name, count in meta["shortened"].items()]
    words += f", without their oldest turns {', '.join(cut)}" if cut else ""
    return f"{words}; distractors {meta['distractors']}"


def empty_batch(config: Config, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    reply = config.data.max_reply_tokens
    lines = lines_of(room(config), reply) + config.data.candidates
    return (
        torch.empty(sequences, 2, lines, reply, dtype=torch.int64),
        torch.empty(sequences, 1 + reply, dtype=torch.int64),
    )


def flop_parameters(model) -> int:
    """All but the embedding, which is looked up: as the head's weight it is multiplied by few tokens only."""
    return sum(p.numel() for p in model.parameters()) - model.token_embedding.weight.numel()


def lines(run, inputs: torch.Tensor) -> list[Line]:
    """Which loss kernel ran, and how many tokens were computed for a row; `inputs` (b, 2, lines, R)."""
    model, config = parallel.unwrapped(run.model), run.config
    rows, reply = len(inputs), config.data.max_reply_tokens
    return losses.lines(model.loss, config.training, rows * reply)
