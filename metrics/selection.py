"""Which of a study's runs `only` chooses. Only the standard library is imported: conf/hydra_plugins loads it."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch

NOT = "!"  # before a pattern: without the runs that it matches


def chosen(runs: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The runs that a pattern matches, without those that one after a `!` does; with such ones alone, all others."""
    wanted = [p for p in patterns if not p.startswith(NOT)] or ["*"]
    unwanted = [p.removeprefix(NOT) for p in patterns if p.startswith(NOT)]
    return [
        name
        for name in runs
        if any(fnmatch(name, p) for p in wanted) and not any(fnmatch(name, p) for p in unwanted)
    ]
