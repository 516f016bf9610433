"""Rules between settings: each value is right by itself, but not together with the others. A file a subject.

Like engine/config.py it imports no torch, reads neither environment nor hardware, and changes no value.
"""

from collections.abc import Collection

from engine.pruning import rules as pruning
from engine.rules import data, kept, machine, training

SUBJECTS = (data, training, pruning, machine, kept)  # in the order in which problems are told


def problems(config, unknown: Collection[str]) -> list[str]:
    """The rules that `config`, an engine.config.Config, breaks; none that hangs on an `unknown` value."""
    checks = [check for subject in SUBJECTS for check in subject.checks(config)]
    return [message for names, broken, message in checks if broken and not set(names) & set(unknown)]
