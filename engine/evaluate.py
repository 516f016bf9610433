"""Evaluation of a finished run: every target of a split scored exactly once.

`python -m engine.evaluate RUN_DIRECTORY SPLIT OUTPUT.json` scores a finished run's final model; a diverged run has
none, and OUTPUT.json says so, as of a split without text (test_percent = 0). With `--weights best` it scores what the
run's best evaluation had (engine/best.py); OUTPUT.json says that too, and no study takes it for the final model. What
is scored and how is the task's (engine/tasks/).
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from engine import best, parallel, tasks, vocabulary
from engine.config import Config, Parallel, load
from engine.data.prepare import open_tokens
from engine.errors import command
from engine.models import MODELS
from engine.rundir import read_outcome, write_json


def evaluated(config: Config, rows, operand_dtype: torch.dtype, *, limit: int = 0) -> dict[str, str]:
    """What makes two evaluations the same: what was scored, and the dtype that the head's product had."""
    return {
        "evaluation_sha256": tasks.of(config).sha256(rows, config, limit),
        "evaluation_precision": str(operand_dtype).removeprefix("torch."),
    }


def final_model(
    directory: Path, config: Config, vocabulary_size: int, classes: int = 0, which: str = "final"
) -> torch.nn.Module:
    """The trained model of a run directory, on the CPU; which: of its weights, of engine.best.KINDS."""
    return plain_model(config, vocabulary_size, best.read(directory, which), classes)


def plain_model(
    config: Config, vocabulary_size: int, weights: dict[str, torch.Tensor], classes: int = 0
) -> torch.nn.Module:
    """The run's model with whole `weights`, neither spread nor compiled, on the CPU."""
    module = importlib.import_module(MODELS[config.model.model])
    model = module.build(config.model, vocabulary_size, classes=classes)
    model.load_state_dict(weights)
    model.loss = tasks.of(config).loss(config, vocabulary_size)
    return model


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("split", choices=("train", "validation", "test"))
    parser.add_argument("output", type=Path)
    best.add_argument(parser)
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
    vocabulary.require_same(arguments.directory, config.tokens_directory)
    task, rows = tasks.of(config), getattr(tokens, arguments.split)
    if not len(rows):
        reason = f"there is no {arguments.split} text"
        write_json(arguments.output, {**of, "split": arguments.split, "reason": reason})
        return
    ranks = parallel.start(Parallel(), config.run.device)  # however many processes trained it, one scores it
    classes, which = tasks.class_count(tokens.meta), arguments.weights
    model = final_model(arguments.directory, config, tokens.meta["vocabulary_size"], classes, which)
    model.to(ranks.device)
    if which == "best":
        of |= {"weights": "best", "weights_step": best.step_of(arguments.directory)}
    scores = task.evaluate(model, rows, config, ranks)
    found = {
        "split": arguments.split,
        task.COUNTED: scores["count"],
        **task.figures(scores, tokens.meta["splits"][arguments.split], arguments.split),
    }
    write_json(arguments.output, {**of, **found, **evaluated(config, rows, model.loss.operand_dtype)})


if __name__ == "__main__":
    main()
