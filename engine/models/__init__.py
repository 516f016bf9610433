"""MODELS: name → module.

To add one: a file with `build(settings, vocabulary_size, norm_layers, classes)` and TASK, the module of what it
trains for (engine/tasks/); and its line here.
"""

MODELS = {
    "gpt": "engine.models.gpt",
    "classifier": "engine.models.classifier",
    "double_heads": "engine.models.double_heads",
}
