"""One process of one run, top to bottom: build, train, save.

    python -m engine.train FILE.toml
    torchrun --nproc-per-node N -m engine.train FILE.toml

Settings are checked before torch is imported. It writes into results/<study>/<run>-<seed>/ (engine/rundir.py) and
prints one JSON line an interval. It must not know about studies, DVC or charts.

Exit status: 0 complete, 2 a user's mistake, 3 out of memory, 1 anything else.
"""

import sys

from engine import runtime
from engine.config import load
from engine.errors import ConfigError, command

OUT_OF_MEMORY = 3


@command
def main() -> None:
    if len(sys.argv) != 2:
        raise ConfigError("usage: python -m engine.train FILE.toml")
    config = load(sys.argv[1])
    runtime.before_torch(config.runtime)
    from engine.optimizers import missing_library

    if problem := missing_library(config.optimizer):
        raise ConfigError(problem, sys.argv[1])
    from engine.launch import tokens_for

    tokens = tokens_for(config)
    from engine import ladder
    from engine.trainer import run  # torch is imported from here on

    try:
        run(config, tokens)
    except Exception as error:
        if not ladder.is_out_of_memory(error):
            raise
        print(f"out of memory: {error}", file=sys.stderr, flush=True)
        sys.exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
