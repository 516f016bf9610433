"""The engine's own recipe for a race: settings in place of its size's, and of those of BEST.

The same as a run of a study, which a test compares: conf/study/chargpt.yaml, run `recipe`.
"""

CHAR = {
    "positions": "rotary",
    "activation": "swiglu",
    "bias": False,
    "dropout": 0.3,
    "lr": 2e-3,
    "beta2": 0.99,
    "weight_decay": 0.3,
    "warmup_steps": 100,
    "schedule": "cosine",
    "min_lr_fraction": 0.02,
    "steps": 2000,
    "batch_size": 64,
    "precision": "bf16",
    "compile": "model",
    "tf32": True,
}
