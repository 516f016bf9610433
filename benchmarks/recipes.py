"""How the engine does a task: its settings where it is at its best, and what the task itself asks of it."""

import math

from benchmarks.sizes import Size

# At its best on each device. Anything not here or in `engine_settings` is its default.
BEST = {
    "cpu": {},
    "cuda": {
        "precision": "bf16",
        "residual_precision": "bf16",
        "loss_kernel": "fused",
        "gradient_sums": "fused",
        "compile": "model",
        "attention": "cudnn",
        "tf32": True,
        "allocator": "expandable_segments",
    },
}

BEST_OF_DIALOGUES = {
    name: BEST["cuda"][name] for name in ("precision", "residual_precision", "compile", "tf32")
}
BEST_OF_DIALOGUES |= {"shared_context": True, "loss_kernel": "fused", "allocator": "expandable_segments"}

# Of a race: settings in place of its size's, and of those of BEST. The same as a run of a study, which a test
# compares: conf/study/chargpt_quick.yaml, run `quick`. It is the soonest to nanoGPT's loss that was found, not the
# lowest loss: that is the recipe of conf/study/chargpt.yaml.
CHAR = {
    "positions": "rotary",
    "activation": "swiglu",
    "bias": False,
    "dropout": 0.1,
    "optimizer": "muon",
    "muon_lr": 0.02,
    "muon_weight_decay": 0.1,
    "lr": 2e-3,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "warmup_steps": 50,
    "schedule": "linear",
    "min_lr_fraction": 0.02,
    "steps": 600,
    "batch_size": 64,
    "precision": "bf16",
    "compile": "model",
    "step_graph": True,
    "tf32": True,
}


def best(size: Size) -> dict:
    """The engine's settings of BEST that have an effect on the task; in a race its recipe."""
    if size.target_loss:
        return race_settings(size)
    if size.choices and size.device == "cuda":
        return BEST_OF_DIALOGUES
    return {"precision": "bf16", "compile": "model", "tf32": True} if size.classes else BEST[size.device]


def race_settings(size: Size) -> dict:
    """The recipe, evaluated often, with nothing else between its steps; on a CPU only as many steps as there are."""
    found = CHAR | {"eval_interval": size.eval_interval, "eval_tokens": 0, "checkpoint_interval": 0}
    found |= {"eval_batch_size": size.micro_batch, "micro_batch_size": 0}
    if size.device == "cpu":
        found |= {"precision": "fp32", "compile": "none", "tf32": False}
        found |= {"steps": size.total_steps, "warmup_steps": 2, "batch_size": size.micro_batch}
    return found


def engine_settings(size: Size, data: dict) -> dict:
    """The engine's flat settings for this task, without those of BEST. `data`: where the text is.

    Checkpoints and progress lines are on, as in a real run.
    """
    own = {"pad_vocabulary_to": size.row_multiple, "bias": False, "eval_tokens": 8 * size.context}
    if size.classes:  # as in the study, but for its dropout of tokens
        own = {"model": "classifier", "norm_placement": "post", "positions": "sinusoidal", "dropout": 0.1}
    if size.choices:
        own = {
            "model": "double_heads",
            "pad_vocabulary_to": size.row_multiple,
            "dropout": 0.1,
            "clip_norm": 0.0,
        }
        own |= {"weight_decay": 0.0}
    return {
        "device": size.device,
        **data,
        **own,
        "layers": size.layers,
        "heads": size.heads,
        "width": size.width,
        "mlp_width": size.mlp_width,
        "context": size.context,
        "lr": size.lr,
        "schedule": "constant",
        "warmup_steps": size.lr_warmup_steps,
        "steps": size.total_steps,
        "batch_size": size.samples,
        "micro_batch_size": size.micro_batch,
        "eval_interval": size.total_steps,
        "eval_batch_size": 8,
        "checkpoint_interval": math.ceil(size.total_steps / 2),
    }
