"""What the runs of a plan read that must be on this machine before the first one starts: data, and weights.

Gives problems in words. It reads no data and changes nothing; a study is valid without what it finds absent, but the
runs that need it could not be trained.
"""

from engine import starts
from engine.config import Config
from engine.data import places
from engine.errors import ConfigError


def input_problems(configs: dict[str, Config]) -> list[str]:
    """Data and weights that the planned runs name and that are not there, each once, with the runs that want it.

    configs: {"<run>-<seed>": Config}.
    """
    problems = places.problems(next(iter(configs.values())).data) if configs else []
    wanted: dict[str, list[str]] = {}
    for config in configs.values():
        if config.model.init_from:
            wanted.setdefault(config.model.init_from, []).append(config.run.run)
    for init_from, runs in wanted.items():
        try:
            starts.kind(init_from)
        except ConfigError as error:
            names = ", ".join(dict.fromkeys(runs))
            problems += [f"runs.{names}: init_from = {init_from!r}: {problem}" for problem in error.problems]
    return problems
