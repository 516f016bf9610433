"""EVAL: a finished run → results/<study>/test/<run>-<seed>.json, its figures on the test split.

python -m stages.eval results/<study>/<run>-<seed> OUTPUT.json
"""

import sys

from engine.errors import ConfigError, command
from stages import children


@command
def main() -> None:
    if len(sys.argv) != 3:
        raise ConfigError("usage: python -m stages.eval RUN_DIRECTORY OUTPUT.json")
    directory, output = sys.argv[1:]
    engine = children.start([sys.executable, "-m", "engine.evaluate", directory, "test", output])
    sys.exit(engine.wait())


if __name__ == "__main__":
    main()
