"""Rules between the settings of pruning and others, as engine/rules has them. It imports no torch."""

from engine.optimizers import ADAM_MOMENTS
from engine.pruning import SIGNED_METHODS
from engine.pruning.scores import SIGNED
from engine.rules.check import Check


def checks(c) -> list[Check]:
    """What pruning needs of the optimizer, of the steps and of its own settings."""
    p, optimizer, steps = c.pruning, c.optimizer.optimizer, c.training.steps
    on, length = p.pruning != "none", steps - p.pruning_start - p.pruning_hold
    state, pair = p.pruning == "state", p.pruning_pattern == "2:4"
    signed = p.pruning in SIGNED_METHODS or (state and p.pruning_score in SIGNED)
    ramp = ("pruning", "pruning_start", "pruning_hold", "steps")
    return [
        (
            ("optimizer", "pruning"),
            optimizer == "adamwprune" and not state,
            f"optimizer = 'adamwprune': prunes by its moments; set pruning = 'state', not {p.pruning!r}, or "
            "optimizer = 'adamw'",
        ),
        (
            ("optimizer", "pruning"),
            state and optimizer not in ADAM_MOMENTS,
            f"pruning = 'state': reads the moments of Adam, which optimizer = {optimizer!r} does not keep for every "
            f"parameter; set optimizer to one of {', '.join(ADAM_MOMENTS)}",
        ),
        (
            ("pruning", "optimizer_offload"),
            state and c.optimizer.optimizer_offload,
            "pruning = 'state': reads the moments on the device; set optimizer_offload = false",
        ),
        (
            ("pruning", "tensor_parallel"),
            on and c.parallel.tensor_parallel > 1,
            f"pruning = {p.pruning!r}: not with matrices that are split; set tensor_parallel = 1",
        ),
        (
            ramp,
            on and length < 1,
            f"pruning_start + pruning_hold = {p.pruning_start} + {p.pruning_hold}: must be < steps = {steps}, so "
            "that there is a ramp between",
        ),
        (
            (*ramp, "pruning_interval"),
            on and length >= 1 and p.pruning_interval > length,
            f"pruning_interval = {p.pruning_interval}: must be ≤ the {length} steps from pruning_start to the hold; "
            f"{length} prunes all at once, at their end",
        ),
        (
            ("pruning_score", "pruning_threshold"),
            state and p.pruning_score == "bitter4" and p.pruning_threshold != "layer_ramp",
            "pruning_score = 'bitter4': is bitter3 ranked within layers; set pruning_threshold = 'layer_ramp'",
        ),
        (
            ("pruning", "pruning_score", "pruning_regrowth"),
            on and p.pruning_regrowth and not signed,
            "pruning_regrowth = true: would do nothing where no score is below that of a pruned weight; it needs "
            f"pruning = {' or '.join(SIGNED_METHODS)}, or pruning_score = {' or '.join(SIGNED)}",
        ),
        (
            ("pruning", "pruning_regrowth", "pruning_hold"),
            on and p.pruning_regrowth and p.pruning_hold == 0,
            "pruning_regrowth = true: what comes back in the last ranking is 0 until its next update, and with "
            "pruning_hold = 0 there is none, so that more weights would be 0 than asked for; set "
            "pruning_hold ≥ 1",
        ),
        *_two_of_four(p, on and pair),
    ]


def _two_of_four(p, asked: bool) -> list[Check]:
    wanted = {
        "sparsity": (p.sparsity, 0.5),
        "pruning_sample": (p.pruning_sample, 1.0),
        "pruning_regrowth": (p.pruning_regrowth, False),
    }
    same = [
        (
            ("pruning_pattern", name),
            asked and value != needed,
            f"pruning_pattern = '2:4': needs {name} = {str(needed).lower()}, not {str(value).lower()}",
        )
        for name, (value, needed) in wanted.items()
    ]
    ramped = (
        ("pruning_pattern", "pruning_threshold"),
        asked and p.pruning_threshold == "layer_ramp",
        "pruning_pattern = '2:4': prunes half of every layer; set pruning_threshold = 'global' or 'layer'",
    )
    return [*same, ramped]
