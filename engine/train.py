"""One process of one run, top to bottom: build, train, save.

    python -m engine.train FILE.toml
    torchrun --nproc-per-node N -m engine.train FILE.toml

Settings are checked before torch is imported. It writes into results/<study>/<run>-<seed>/ (engine/rundir.py) and
prints one JSON line an interval. It must not know about studies, DVC or charts.

Exit status: 0 complete, 2 a user's mistake, 3 out of memory, 4 diverged (engine/guards.py), 5 the run's processes did
not all meet (engine/preflight.py), 1 anything else. Under torchrun it is each process's own; torchrun's is 1.
"""

import os
import sys

from engine import runtime
from engine.config import load
from engine.errors import ConfigError, command

OUT_OF_MEMORY, DIVERGED = 3, 4
WHAT_NEXT = (
    "a lower lr, more warmup_steps or a smaller clip_norm often helps; on_divergence = 'skip' leaves out spiking "
    "updates, 'off' trains on"
)


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
    from engine import guards, ladder, preflight
    from engine.trainer import run  # torch is imported from here on

    try:
        run(config, tokens)
    except guards.Diverged as end:
        if os.environ.get("RANK", "0") == "0":  # all processes come to the same end
            print(f"diverged {end}. {config.directory} says so; {WHAT_NEXT}", file=sys.stderr, flush=True)
        sys.exit(DIVERGED)
    except preflight.NotMet as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(preflight.NOT_MET)
    except Exception as error:
        if not ladder.is_out_of_memory(error):
            raise
        print(f"out of memory: {error}", file=sys.stderr, flush=True)
        sys.exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
