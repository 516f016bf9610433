"""One process of one run, top to bottom: build, train, save.

    python -m engine.train FILE.toml
    torchrun --nproc-per-node N -m engine.train FILE.toml

Settings are checked before torch is imported. It writes into results/<study>/<run>-<seed>/ (engine/rundir.py) and
prints one JSON line an interval. It must not know about studies, DVC or charts.
"""

import sys

from engine.config import load
from engine.errors import ConfigError, command


@command
def main() -> None:
    if len(sys.argv) != 2:
        raise ConfigError("usage: python -m engine.train FILE.toml")
    config = load(sys.argv[1])
    from engine.launch import tokens_for

    tokens = tokens_for(config)
    from engine.trainer import run  # torch is imported from here on

    run(config, tokens)


if __name__ == "__main__":
    main()
