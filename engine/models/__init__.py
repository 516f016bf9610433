"""MODELS: name → module.

To add one: a file with `build(settings, vocabulary_size, norm_layers)`, and its line here.
"""

MODELS = {
    "gpt": "engine.models.gpt",
    "classifier": "engine.models.classifier",
}
