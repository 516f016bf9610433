"""The engine's own recipe for a race: settings in place of its size's, and of those of BEST.

The same as a run of a study, which a test compares: conf/study/chargpt_quick.yaml, run `quick`. It is the soonest to
nanoGPT's loss that was found, not the lowest loss: that is the recipe of conf/study/chargpt.yaml.
"""

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
