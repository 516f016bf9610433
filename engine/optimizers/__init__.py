"""OPTIMIZERS: name → module. To add one: a file with `build(groups, settings)`, and its line here."""

OPTIMIZERS = {
    "adamw": "engine.optimizers.adamw",
    "adam": "engine.optimizers.adam",
    "adamw8bit": "engine.optimizers.adamw8bit",
    "sgd": "engine.optimizers.sgd",
}
