"""What a run trains for: which samples, which loss, what an evaluation says of a model.

One module a task; a model's module names its own in TASK. A task's module has

    EVAL_COLUMNS                                 of evals.csv, after step and tokens_seen
    COUNTED                                      what "count" counts: tokens, examples
    train_order(tokens, config)                  the samples of every step (engine/data/order.py)
    targets_per_sample(config)                   targets that one sample has
    tokens_per_sample(config)                    tokens that are computed for one sample, padding included
    loss(config, vocabulary_size, group=None)    the objective to install as `model.loss`; PARTS, if it has several
    evaluate(model, rows, config, ranks, limit=0)    scores of a split: means over its targets, and their "count"
    sha256(rows, config, limit=0)                what `evaluate` scores, in hex
    figures(scores, split, prefix)               the scores as metrics.json names them; split: of meta.json
    amount(meta)                                 the training data in words
    empty_batch(config, sequences)               inputs and targets of that many samples, for planning memory
    flop_parameters(model)                       parameters that every token is multiplied by
    lines(run, inputs)                           the ledger's lines about what is the task's own
"""

import importlib
from types import ModuleType

from engine.config import Config
from engine.models import MODELS


def of(config: Config) -> ModuleType:
    """The task of the run's model."""
    return importlib.import_module(importlib.import_module(MODELS[config.model.model]).TASK)


def class_count(meta: dict) -> int:
    """How many classes labelled tokens with this meta.json have; 0 for text."""
    return len(meta.get("classes", ()))
