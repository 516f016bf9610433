"""EVAL: a finished run → results/<study>/test/<run>-<seed>.json, its figures on the test split.

Of a run on dialogues also what a ranker that only counts words gets of the same candidates.

python -m stages.eval results/<study>/<run>-<seed> OUTPUT.json
"""

import sys
from pathlib import Path

from engine import children
from engine.errors import ConfigError, command
from stages import ranking


@command
def main() -> None:
    if len(sys.argv) != 3:
        raise ConfigError("usage: python -m stages.eval RUN_DIRECTORY OUTPUT.json")
    directory, output = sys.argv[1:]
    engine = children.start([sys.executable, "-m", "engine.evaluate", directory, "test", output])
    if code := engine.wait():
        sys.exit(code)
    ranking.add(Path(directory), Path(output))


if __name__ == "__main__":
    main()
