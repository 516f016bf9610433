"""Rules between the settings of batches, steps, learning rates and what a step sees."""

from engine.optimizers import ON_DEVICE_ONLY
from engine.rules.check import Check

SHAPES = 8  # torch._dynamo.config.recompile_limit


def checks(c) -> list[Check]:
    """The rules of this file, for a Config."""
    return [
        *_batch(c),
        *_shards(c.parallel),
        *_lr(c.optimizer),
        *_offload(c.optimizer),
        *_spam(c.optimizer),
        *_steps(c),
        *_lengths(c),
        *_curriculum(c),
    ]


def _batch(c) -> list[Check]:
    """How the batch divides over processes and micro-batches."""
    batch, tensor, processes = c.training.batch_size, c.parallel.tensor_parallel, c.parallel.processes
    micro, replicas = c.training.micro_batch_size or 1, max(processes // tensor, 1)
    replicas = replicas if c.parallel.shard_samples else 1
    shared = "processes" if tensor == 1 else "processes / tensor_parallel"
    parts = f"{shared} = {replicas}"
    if c.training.micro_batch_size:
        parts = f"micro_batch_size × {shared} = {micro} × {replicas}"
    return [
        (
            ("batch_size", "micro_batch_size", "processes", "tensor_parallel"),
            batch % (micro * replicas) != 0,
            f"batch_size = {batch}: must be a multiple of {parts}",
        ),
        (
            ("processes", "tensor_parallel"),
            processes % tensor != 0,
            f"processes = {processes}: must be a multiple of tensor_parallel = {tensor}",
        ),
    ]


def _shards(p) -> list[Check]:
    """Every process reading the same is a mistake, unless it is asked for."""
    return [
        (
            ("shard_samples", "on_shared_samples"),
            not p.shard_samples and p.on_shared_samples == "refuse",
            "shard_samples = false: all processes would read the same samples, which is work that counts once; set "
            "shard_samples = true, or on_shared_samples = 'report' to train all the same and have its figures say so",
        ),
        (
            ("shard_samples", "processes", "tensor_parallel"),
            not p.shard_samples and p.processes == p.tensor_parallel,
            "shard_samples = false: would do nothing where one process reads the samples",
        ),
    ]


def _lr(o) -> list[Check]:
    return [
        (
            ("lr_rule", "lr_batch_size"),
            o.lr_rule != "none" and not o.lr_batch_size,
            f"lr_rule = {o.lr_rule!r}: needs lr_batch_size, the batch size for which lr = {o.lr:g} is meant",
        )
    ]


def _offload(o) -> list[Check]:
    return [
        (
            ("optimizer_offload", "optimizer"),
            o.optimizer_offload and o.optimizer in ON_DEVICE_ONLY,
            f"optimizer_offload = true: not with optimizer = {o.optimizer!r}, which needs all of its state before it "
            "updates the first parameter; set optimizer_offload = false",
        )
    ]


def _spam(o) -> list[Check]:
    period, warmup, grace = o.spam_reset_steps, o.spam_warmup_steps, o.spam_grace_steps
    return [
        (
            ("optimizer", "spam_grace_steps", "spam_reset_steps"),
            o.optimizer == "spam" and 0 < period <= grace,
            f"spam_grace_steps = {grace}: nothing would ever be cut, because a reset comes every "
            f"spam_reset_steps = {period}; set it to < {period}, or spam_reset_steps = 0",
        ),
        (
            ("optimizer", "spam_first_warmup", "spam_warmup_steps"),
            o.optimizer == "spam" and o.spam_first_warmup and not warmup,
            "spam_first_warmup = true: would do nothing with spam_warmup_steps = 0; set it to ≥ 1, or "
            "spam_first_warmup = false",
        ),
        (
            ("optimizer", "spam_warmup_steps", "spam_reset_steps"),
            o.optimizer == "spam" and 0 < period < warmup,
            f"spam_warmup_steps = {warmup}: updates would never reach their full size, because a reset comes every "
            f"spam_reset_steps = {period}; set it to ≤ {period}, or spam_reset_steps = 0",
        ),
    ]


def _steps(c) -> list[Check]:
    steps, warmup, traced = c.training.steps, c.schedule.warmup_steps, c.runtime.profile_steps
    epochs, warmup_epochs = c.training.epochs, c.schedule.warmup_epochs
    return [
        (
            ("warmup_epochs", "epochs"),
            0 < epochs < warmup_epochs,
            f"warmup_epochs = {warmup_epochs:g}: must be ≤ epochs = {epochs:g}",
        ),
        (
            ("warmup_steps", "steps"),
            warmup > steps,
            f"warmup_steps = {warmup}: must be ≤ steps = {steps}",
        ),
        (
            ("profile_steps", "steps"),
            traced > 0 and steps < traced + 4,
            f"profile_steps = {traced}: needs steps ≥ {traced + 4}, because the first are warm-up",
        ),
    ]


def _lengths(c) -> list[Check]:
    """Lengths double from first_length to context, and each has a step at least."""
    first, steps, context = c.training.first_length, c.training.lengthening_steps, c.model.context
    doublings = (context // first).bit_length() - 1 if first else 0
    names = ("first_length", "lengthening_steps")
    return [
        (
            ("first_length", "context"),
            first > 0 and (first << doublings != context or not doublings),
            f"first_length = {first}: must double to context = {context}: {context} / 2, / 4, / 8 or so on, if whole",
        ),
        (
            names,
            bool(steps) and not first,
            f"lengthening_steps = {steps}: would do nothing with first_length = 0",
        ),
        (
            (*names, "context", "steps"),
            first > 0 and not doublings <= steps <= c.training.steps,
            f"lengthening_steps = {steps}: must be from {doublings}, so that each shorter length has a step, to "
            f"steps = {c.training.steps}",
        ),
        (
            ("first_length", "context", "compile", "compile_dynamic"),
            c.compile.compile != "none" and not c.compile.compile_dynamic and doublings >= SHAPES,
            f"first_length = {first}: {doublings + 1} lengths are more shapes than the {SHAPES} that torch.compile "
            "makes graphs for; set a longer first_length, or compile_dynamic = true",
        ),
    ]


def _curriculum(c) -> list[Check]:
    t = c.training
    return [
        (
            ("curriculum", "curriculum_steps", "steps"),
            t.curriculum != "none" and not 1 <= t.curriculum_steps <= t.steps,
            f"curriculum_steps = {t.curriculum_steps}: must be from 1 to steps = {t.steps}",
        )
    ]
