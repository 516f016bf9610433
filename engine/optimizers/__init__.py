"""OPTIMIZERS: name → module. To add one: a file with `build(groups, settings)`, and its line here.

This module imports no torch: the settings are checked before anything heavy is loaded.
"""

import importlib
import importlib.util

OPTIMIZERS = {
    "adamw": "engine.optimizers.adamw",
    "adam": "engine.optimizers.adam",
    "adamw8bit": "engine.optimizers.adamw8bit",
    "sgd": "engine.optimizers.sgd",
    "muon": "engine.optimizers.muon",
    "spam": "engine.optimizers.spam",
    "adamwspam_legacy": "engine.optimizers.adamwspam_legacy",
    "adamwprune": "engine.optimizers.adamwprune",
}
# Those that keep `exp_avg` and `exp_avg_sq` of every parameter in fp32, which state-based pruning reads.
ADAM_MOMENTS = ("adamw", "adam", "adamwprune")
WITH_TWO_MOMENTS = ("adamw", "adam", "adamw8bit", "muon", "spam", "adamwspam_legacy", "adamwprune")
RECORDED = ("adamw", "adam", "sgd", "muon")  # those whose update can be part of a CUDA graph
LIBRARIES = {"adamw8bit": "bitsandbytes"}  # optimizer → the library that it needs, beyond torch
ON_DEVICE_ONLY = (
    "adamwspam_legacy",
    "adamwprune",
)  # all of their state is read at once: none can be offloaded
WITH_OWN_LINES = ("muon", "spam", "adamwspam_legacy")  # those whose module has `lines(settings, optimizer)`


def is_installed(library: str) -> bool:
    """Whether `import library` would find it; it is not imported."""
    return importlib.util.find_spec(library) is not None


def missing_library(settings) -> str | None:
    """What stops a run with these optimizer settings for want of a library; None if nothing does."""
    library = LIBRARIES.get(settings.optimizer)
    if library is None or settings.optimizer_fallback != "none" or is_installed(library):
        return None
    return (
        f"optimizer = {settings.optimizer!r}: needs {library}, which is not installed: "
        f'pip install {library}, or set optimizer_fallback = "adamw"'
    )


def lines(settings, optimizer) -> list:
    """The ledger's lines about an optimizer that has taken a step: see engine/optimizers/observe.py."""
    from engine.optimizers import observe

    found = observe.lines(settings, optimizer)
    if settings.optimizer in WITH_OWN_LINES:
        found += importlib.import_module(OPTIMIZERS[settings.optimizer]).lines(settings, optimizer)
    return found
