"""Classification: one label a row; the loss is a sum over rows."""

import torch
import torch.nn.functional as F

from engine import compiling, parallel
from engine.config import Config
from engine.data.batches import IGNORED
from engine.data.examples import PADDING, ExampleOrder, eval_batches
from engine.ledger import Line
from engine.objectives import ClassLabel
from engine.step import autocast
from engine.tasks import scoring

EVAL_COLUMNS = ("val_loss", "val_accuracy")
COUNTED = "examples"
SAME_LOGITS = (
    1e-3  # of the largest; rounding of products with other shapes stays below, padding that is seen does not
)


def train_order(tokens, config: Config) -> ExampleOrder:
    """The rows of every step, in `tokens`, an engine.data.prepare.Tokens."""
    return ExampleOrder(tokens.train, config.model.context, config.training.batch_size, config.order_seed)


def targets_per_sample(config: Config) -> int:
    return 1


def tokens_per_sample(config: Config) -> int:
    return config.model.context


def loss(config: Config, vocabulary_size: int, group=None) -> ClassLabel:
    return ClassLabel()


def evaluate(model, rows, config: Config, ranks: parallel.Ranks, limit: int = 0) -> dict[str, float]:
    """loss (nats per row), accuracy (share of rows) and count (rows scored) of `rows`, an Examples."""
    assert not limit, "every row is scored"
    batches = eval_batches(
        rows,
        config.model.context,
        config.evaluation.eval_batch_size,
        rank=ranks.data_rank,
        world=ranks.data_size,
    )

    def score(inputs, targets):
        logits, _ = model(inputs)
        real = targets != IGNORED
        nats = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
        right = ((logits.argmax(-1) == targets) & real).sum()
        return torch.stack([nats.double(), right.double(), real.sum().double()])

    batches = ((torch.from_numpy(inputs), torch.from_numpy(targets)) for inputs, targets in batches)
    nats, right, count = scoring.sums(model, batches, score, config, ranks)
    return {"loss": nats / count, "accuracy": right / count, "count": int(count)}


def sha256(rows, config: Config, limit: int = 0) -> str:
    """What `evaluate` scores, in hex: the rows and their labels, whole. How far a model reads into one is its own."""
    return rows.sha256()


def figures(scores: dict[str, float], split: dict, prefix: str) -> dict[str, float]:
    """Loss and accuracy under `prefix`."""
    return {f"{prefix}_{name}": scores[name] for name in ("loss", "accuracy")}


def amount(meta: dict) -> str:
    """Training rows, how many of the published ones those of the source were, and what was dropped of these."""
    rows, held = meta["splits"]["train"]["rows"], meta["splits"]["validation"]["rows"]
    source, published = meta["source_rows"]["train"], meta["of_rows"].get("train")
    words = f"{rows:,} training and {held:,} validation rows, {len(meta['classes'])} classes"
    if published and source < published:
        words += f", from {source:,} of the {published:,} published training rows ({100 * source / published:.0f} %)"
    dropped = [f"{count:,} {why}" for why, count in meta["dropped"].items() if count]
    return words + (f", dropped {', '.join(dropped)}" if dropped else "")


def empty_batch(config: Config, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (sequences, config.model.context)
    return torch.empty(shape, dtype=torch.int64), torch.empty(sequences, dtype=torch.int64)


def flop_parameters(model) -> int:
    """All but the embedding, which is looked up."""
    return sum(p.numel() for p in model.parameters()) - model.token_embedding.weight.numel()


def lines(run, inputs: torch.Tensor) -> list[Line]:
    """Whether padding changes what the model says; `inputs` (b, T) of one micro-batch. Every rank must call this.

    The longest row is cut in half and scored with padding behind it and without, uncompiled and in eval mode; in fp32
    where the model can be, because rounding may be as large as what little padding does.
    """
    wanted, model, m = run.config.model.padding_mask, run.model, run.config.model
    length = inputs.size(1)
    real = (inputs != PADDING).sum(1)
    half = max(int(real.max()) // 2, 1)
    row = inputs[real.argmax()][None].clone()
    row[:, half:] = PADDING
    in_fp32 = m.residual_precision == "fp32" and not run.config.training.float8
    precision = "fp32" if in_fp32 else run.config.eval_precision
    was_training = model.training
    model.eval()
    with (
        torch.no_grad(),
        compiling.eager(run.config.compile.compile),
        autocast(precision, inputs.device),
    ):
        padded, cut = (model(x)[0].float() for x in (row, row[:, :half]))
    model.train(was_training)
    moved = ((padded - cut).abs().max() / padded.abs().max()).item()
    seen = moved > (SAME_LOGITS if in_fp32 else 50 * SAME_LOGITS)
    how = (
        f"logits of a row of {half} tokens with and without {length - half} of padding: {moved:.1e} apart; "
        f"padding is {100 * (1 - real.float().mean().item() / length):.0f} % of a step"
    )
    agrees = wanted != seen or half == length
    return [
        Line("padding_mask", str(wanted).lower(), "padding seen" if seen else "padding left out", how, agrees)
    ]
