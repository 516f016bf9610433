"""Rules between the settings of what a run evaluates, measures and leaves."""

from collections.abc import Sequence

from engine.rules.check import Check

SHORTEST_INTERVAL = 0.05  # seconds between two looks at the device


def checks(c) -> list[Check]:
    """The rules of this file, for a Config."""
    return [
        *_evaluation(c),
        *_best(c),
        *_samples(c.evaluation),
        *_probes(c),
        *_attention_metrics(c),
        *_latency(c),
        *_monitor(c.logging.monitor_interval),
        *_names(c.run),
    ]


def _evaluation(c) -> list[Check]:
    wanted, stream = c.evaluation.eval_precision, c.model.residual_precision
    return [
        (
            ("eval_precision", "residual_precision", "float8"),
            wanted in ("fp32", "fp16") and (stream == "bf16" or c.training.float8),
            f"eval_precision = {wanted!r}: a model with a bf16 residual stream or float8 layers is scored in bf16; "
            "set eval_precision = 'bf16' for all runs",
        ),
        (
            ("eval_train_rows", "max_train_rows"),
            0 < c.data.max_train_rows < c.evaluation.eval_train_rows,
            f"eval_train_rows = {c.evaluation.eval_train_rows}: must be ≤ max_train_rows = "
            f"{c.data.max_train_rows}",
        ),
    ]


def _best(c) -> list[Check]:
    """keep_best needs another evaluation to choose from than the last step's."""
    steps, every, prunes = c.training.steps, c.evaluation.eval_interval, c.pruning.pruning != "none"
    first = steps - c.pruning.pruning_hold if prunes else 1  # the updates from which evaluations count
    others = (steps - 1) // every - (first - 1) // every
    which = f"of evaluations at the target sparsity, with pruning_hold = {c.pruning.pruning_hold}, " * prunes
    more = " or a longer pruning_hold" * prunes
    return [
        (
            ("keep_best", "eval_interval", "steps", "pruning", "pruning_hold"),
            c.saving.keep_best and others < 1,
            f"keep_best = true: would do nothing with eval_interval = {every} and steps = {steps}: {which}there "
            f"is the last step's alone; set a smaller eval_interval{more}, or keep_best = false",
        )
    ]


def _samples(e) -> list[Check]:
    return [
        (
            ("sample_prompt", "sample_tokens"),
            bool(e.sample_prompt) and not e.sample_tokens,
            f"sample_prompt = {e.sample_prompt!r}: would do nothing with sample_tokens = 0",
        )
    ]


def _probes(c) -> list[Check]:
    noise, accumulates = (
        c.logging.noise_scale_interval,
        0 < c.training.micro_batch_size < c.training.batch_size,
    )
    layers, stride = c.model.layers, c.evaluation.eval_stride
    probed = {
        f"{what}_norm_layers": getattr(c.logging, f"{what}_norm_layers")
        for what in ("activation", "gradient")
    }
    return [
        (
            ("noise_scale_interval", "steps"),
            noise > c.training.steps,
            f"noise_scale_interval = {noise}: must be ≤ steps = {c.training.steps}",
        ),
        (
            ("noise_scale_interval", "micro_batch_size", "batch_size"),
            noise > 0 and not accumulates,
            f"noise_scale_interval = {noise}: compares the micro-batches of a step, and there is one; set "
            "micro_batch_size to half of batch_size or less",
        ),
        (
            ("noise_scale_interval", "optimizer"),
            noise > 0 and c.optimizer.optimizer == "adamwspam_legacy",
            f"noise_scale_interval = {noise}: not with optimizer = 'adamwspam_legacy', which cuts gradients "
            "before the norm of a step is taken, but not those of one micro-batch; set noise_scale_interval = 0",
        ),
        (
            ("eval_stride", "context"),
            stride > c.model.context,
            f"eval_stride = {stride}: must be ≤ context = {c.model.context}",
        ),
        *(
            (
                (name, "layers"),
                any(not 0 <= block < layers for block in blocks),
                f"{name} = {list(blocks)}: blocks are numbered 0 to {layers - 1}",
            )
            for name, blocks in probed.items()
        ),
        *(
            ((name,), len(set(blocks)) < len(blocks), f"{name} = {list(blocks)}: names a block twice")
            for name, blocks in probed.items()
        ),
    ]


def _attention_metrics(c) -> list[Check]:
    count, window, tensor = (
        c.logging.attention_sequences,
        c.logging.reciprocity_window,
        c.parallel.tensor_parallel,
    )
    return [
        (
            ("attention_sequences", "reciprocity_window"),
            not count and window != type(c.logging)().reciprocity_window,
            f"reciprocity_window = {window}: would do nothing with attention_sequences = 0",
        ),
        (
            ("attention_sequences", "context"),
            count > 0 and c.model.context < 2,
            f"attention_sequences = {count}: a context of {c.model.context} token has no pairs to look at",
        ),
        (
            ("attention_sequences", "tensor_parallel"),
            count > 0 and tensor > 1,
            f"attention_sequences = {count}: not with tensor_parallel = {tensor}: a process has only some heads",
        ),
    ]


def _latency(c) -> list[Check]:
    found = latency_problems("latency_lengths", c.evaluation.latency_lengths, c.model.context)
    return [(("latency_lengths", "context"), True, message) for message in found]


def latency_problems(name: str, lengths: Sequence[int], context: int) -> list[str]:
    """What is wrong with the lengths that `name` gives, for a model that sees `context` tokens."""
    found = []
    if any(not 2 <= n <= context for n in lengths):
        found.append(f"{name} = {list(lengths)}: each must be from 2 to context = {context}")
    if len(set(lengths)) < len(lengths):
        found.append(f"{name} = {list(lengths)}: names a length twice")
    return found


def _monitor(interval: float) -> list[Check]:
    return [
        (
            ("monitor_interval",),
            0 < interval < SHORTEST_INTERVAL,
            f"monitor_interval = {interval:g}: must be 0 or ≥ {SHORTEST_INTERVAL:g}, so that it disturbs no step",
        )
    ]


def _names(run) -> list[Check]:
    return [
        (
            (name,),
            not value.replace("_", "").isalnum(),
            f"{name} = {value!r}: letters, digits and _ only, because it names files and stages",
        )
        for name, value in (("study", run.study), ("run", run.run))
    ]
