"""OPTIMIZERS: name → module. To add one: a file with `build(groups, settings)`, and its line here."""

OPTIMIZERS = {
    "adamw": "engine.optimizers.adamw",
    "adam": "engine.optimizers.adam",
    "sgd": "engine.optimizers.sgd",
}
