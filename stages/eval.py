"""EVAL: a finished run → results/<study>/test/<run>-<seed>.json, its figures on the test split.

Of a run on dialogues also what a ranker that only counts words gets of the same candidates, and with hits_candidates
both among more of them.

python -m stages.eval results/<study>/<run>-<seed> OUTPUT.json
"""

import sys
import tempfile
from pathlib import Path

from engine import children
from engine.errors import ConfigError, command
from stages import ranking


@command
def main() -> None:
    if len(sys.argv) != 3:
        raise ConfigError("usage: python -m stages.eval RUN_DIRECTORY OUTPUT.json")
    directory, output = map(Path, sys.argv[1:])
    run_engine("engine.evaluate", directory, "test", output)
    ranking.add(directory, output)
    if ranking.asked_for_more(directory, output):
        with tempfile.TemporaryDirectory() as scratch:
            more = Path(scratch) / "hits.json"
            run_engine("engine.hits", directory, "--output", more)
            ranking.add_more(directory, output, more)


def run_engine(module: str, *arguments: object) -> None:
    """Run a module of the engine, and end as it does where it fails."""
    if code := children.start([sys.executable, "-m", module, *map(str, arguments)]).wait():
        sys.exit(code)


if __name__ == "__main__":
    main()
