"""A run's model and optimizer, built in a fixed order, and what can be told wrong before that.

Build order: seeded weights on the CPU → given weights → tensor parallel → float8 → gradient sums → activation
checkpointing → compile → spread over ranks → optimizer. Sharding comes after the seeded initialisation, so it cannot
change the weights a run starts from.
"""

import importlib

import torch
import torch.nn as nn

from engine import compiling, float8, ladder, parallel, pretrained, runtime, step_graph, tasks, world
from engine.config import Config
from engine.errors import ConfigError
from engine.gradient_sums import GradientSums
from engine.memory import apply_activation_checkpointing
from engine.models import MODELS
from engine.models.attention import kernel_problems, select_attention
from engine.offload import offload
from engine.optimizers import OPTIMIZERS, groups
from engine.step import AUTOCAST


def check(config: Config, ranks: parallel.Ranks) -> None:
    """Raise ConfigError for what only shows once devices and processes are known."""
    t = config.training
    per_rank = config.rank_sequences(ranks.data_size)
    rest = config.parallel.shard_samples and t.batch_size % ranks.data_size
    micro = t.micro_batch_size or per_rank
    problems = [
        *world.check(config, ranks.world_size),
        *dict.fromkeys(
            problem
            for precision in (t.precision, config.eval_precision)
            for problem in kernel_problems(
                config.model.attention,
                ranks.device,
                precision=precision,
                dropout=config.model.dropout,
                masked=(config.model.model == "classifier" and config.model.padding_mask)
                or config.model.shared_context,
            )
        ),
        *runtime.check(config.runtime, ranks.device.type),
        *ladder.check(config, ranks.world_size, ranks.device.type),
        *step_graph.check(config.compile.step_graph, ranks.device.type, ranks.world_size),
        *float8.check(t.float8, ranks.device, micro * config.model.context),
    ]
    if rest:
        problems.append(
            f"batch_size = {t.batch_size}: must be a multiple of the {ranks.data_size} processes that read "
            "different data"
        )
    elif per_rank % micro:
        problems.append(
            f"micro_batch_size = {micro}: must divide the {per_rank} sequences that each of {ranks.data_size} "
            "ranks has in a step"
        )
    elif config.logging.noise_scale_interval and per_rank == micro:
        problems.append(
            f"noise_scale_interval = {config.logging.noise_scale_interval}: compares the micro-batches of a rank, "
            f"and micro_batch_size = {micro} is all that each of {ranks.data_size} has in a step; make it smaller"
        )
    if problems:
        raise ConfigError(problems)


def build_model(config: Config, vocabulary_size: int, ranks: parallel.Ranks, classes: int = 0) -> nn.Module:
    """The run's model, wrapped and spread; unless it was given weights, they depend on `seed` alone.

    classes: of labelled rows; 0 for text.
    """
    m = config.model
    torch.manual_seed(config.run.seed)
    build = importlib.import_module(MODELS[m.model]).build
    model = build(m, vocabulary_size, config.logging.activation_norm_layers, classes)
    model.drawn_with = torch.initial_seed()  # the generator's own
    model.given_weights = pretrained.load_into(model, m, config.tokens_directory) if m.init_from else []
    model.to(ranks.device)
    model.loss = tasks.of(config).loss(config, vocabulary_size, ranks.tensor_group)
    select_attention(m.attention, ranks.device)
    parallel.apply_tensor_parallel(model, ranks)
    if config.training.float8:
        float8.convert(model)
    if config.training.gradient_sums == "fused":
        model.gradient_sums = GradientSums(model, AUTOCAST[config.training.precision], ranks.data_size)
    model.draws = apply_activation_checkpointing(
        model,
        config.memory,
        width=m.width,
        dropout=m.dropout,
        compiled=config.compile.compile != "none",
    )
    budget = config.memory.activation_checkpointing == "budget"
    compiling.apply(model, config.compile, kept=config.memory.memory_budget if budget else 1.0)
    # Dropout draws from a stream of its own for every part of the data.
    torch.manual_seed(config.run.seed * 1_000_003 + ranks.data_rank)
    return parallel.spread(model, config.parallel, ranks)


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The run's optimizer over its parameter groups."""
    build = importlib.import_module(OPTIMIZERS[config.optimizer.optimizer]).build
    optimizer = build(groups.of(model, config.optimizer, seed=config.run.seed), config.optimizer)
    return offload(optimizer) if config.optimizer.optimizer_offload else optimizer
