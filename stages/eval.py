"""EVAL: a finished run → results/<study>/test/<run>-<seed>.json, its figures on the test split.

python -m stages.eval results/<study>/<run>-<seed> OUTPUT.json
"""

import subprocess
import sys

from engine.errors import ConfigError, command
from engine.launch import die_with_parent


@command
def main() -> None:
    if len(sys.argv) != 3:
        raise ConfigError("usage: python -m stages.eval RUN_DIRECTORY OUTPUT.json")
    directory, output = sys.argv[1:]
    die_with_parent()
    sys.exit(
        subprocess.run(
            [sys.executable, "-m", "engine.evaluate", directory, "test", output], check=False
        ).returncode
    )


if __name__ == "__main__":
    main()
