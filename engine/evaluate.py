"""Evaluation: the mean loss over every token of a split, each predicted exactly once.

`python -m engine.evaluate RUN_DIRECTORY SPLIT OUTPUT.json` scores a finished run's final model; a diverged run has
none, and OUTPUT.json says so.
"""

import argparse
import hashlib
import importlib
import math
import sys
from pathlib import Path

import numpy as np
import torch

from engine import compiling, parallel
from engine.config import Config, Parallel, load
from engine.data.batches import IGNORED, eval_batches, eval_windows
from engine.data.prepare import open_tokens
from engine.errors import command
from engine.models import MODELS
from engine.objectives import NextToken
from engine.rundir import read_outcome, write_json
from engine.step import autocast


def eval_precision(config: Config) -> str:
    """The precision that evaluations have: their own, or that of training."""
    asked = config.evaluation.eval_precision
    return config.training.precision if asked == "precision" else asked


@torch.no_grad()
def mean_loss(model, tokens, config: Config, ranks: parallel.Ranks, *, limit: int = 0) -> tuple[float, int]:
    """(nats per token, tokens scored) of `tokens` (numpy array); limit: only the first so many (0: all).

    The same windows whatever the batch size and the number of ranks; uncompiled, in eval mode.
    """
    e, context, precision = config.evaluation, config.model.context, eval_precision(config)
    tokens = tokens[: limit + 1] if limit else tokens
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    was_training = model.training
    model.eval()
    with compiling.eager(config.compile.compile):
        for inputs, targets in eval_batches(
            tokens,
            context,
            e.eval_batch_size,
            stride=e.eval_stride,
            rank=ranks.data_rank,
            world=ranks.data_size,
        ):
            inputs, targets = inputs.to(ranks.device), targets.to(ranks.device)  # noqa: PLW2901
            with autocast(precision, ranks.device):
                loss, _ = model(inputs, targets)
            sums += torch.stack([loss.double(), (targets != IGNORED).sum().double()])
    model.train(was_training)
    loss, count = parallel.total(sums).tolist()
    return loss / count, int(count)


def evaluation_sha256(tokens, config: Config, *, limit: int = 0) -> str:
    """What `mean_loss` scores, in hex: the tokens, where their windows begin, and how long those are."""
    tokens, context = tokens[: limit + 1] if limit else tokens, config.model.context
    starts = eval_windows(len(tokens), context, config.evaluation.eval_stride or context)
    digest = hashlib.sha256(f"{context} {len(tokens)} ".encode())
    digest.update(starts.astype("<i8").tobytes())
    digest.update(np.ascontiguousarray(tokens, dtype="<u4").tobytes())
    return digest.hexdigest()


def evaluated(model, tokens, config: Config, *, limit: int = 0) -> dict[str, str]:
    """What makes two evaluations the same: what was scored, and the dtype that the head's product had."""
    dtype = str(model.loss.operand_dtype).removeprefix("torch.")
    return {
        "evaluation_sha256": evaluation_sha256(tokens, config, limit=limit),
        "evaluation_precision": dtype,
    }


def figures(loss: float, bytes_per_token: float, prefix: str) -> dict[str, float]:
    """Loss, perplexity and bits per byte under `prefix`; perplexity is not capped."""
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {
        f"{prefix}_loss": loss,
        f"{prefix}_perplexity": perplexity,
        f"{prefix}_bits_per_byte": loss / math.log(2) / bytes_per_token,
    }


def final_model(directory: Path, config: Config, vocabulary_size: int) -> torch.nn.Module:
    """The trained model of a run directory, on the CPU."""
    from safetensors.torch import load_file

    return plain_model(config, vocabulary_size, load_file(directory / "model.safetensors"))


def plain_model(config: Config, vocabulary_size: int, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The run's model with whole `weights`, neither spread nor compiled, on the CPU."""
    module = importlib.import_module(MODELS[config.model.model])
    model = module.build(config.model, vocabulary_size)
    model.load_state_dict(weights)
    model.loss = NextToken(
        vocabulary_size, kernel=config.training.loss_kernel, chunk_tokens=config.training.loss_chunk_tokens
    )
    return model


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("split", choices=("train", "validation", "test"))
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    metrics = read_outcome(arguments.directory)
    of = {key: metrics[key] for key in ("status", "study", "run", "seed", "config_sha256")}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    if metrics["status"] == "diverged":
        write_json(arguments.output, {**of, "split": arguments.split, "reason": metrics["reason"]})
        print(
            f"{arguments.directory} diverged: there is no final model to score", file=sys.stderr, flush=True
        )
        return
    config = load(arguments.directory / "config.toml")
    tokens = open_tokens(config.tokens_directory, config.data)
    ranks = parallel.start(Parallel(), config.run.device)  # however many processes trained it, one scores it
    model = final_model(arguments.directory, config, tokens.meta["vocabulary_size"]).to(ranks.device)
    scored = getattr(tokens, arguments.split)
    loss, count = mean_loss(model, scored, config, ranks)
    per_token = tokens.bytes_per_token(arguments.split)
    found = {"split": arguments.split, "tokens": count, **figures(loss, per_token, arguments.split)}
    write_json(arguments.output, {**of, **found, **evaluated(model, scored, config)})


if __name__ == "__main__":
    main()
