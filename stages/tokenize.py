"""TOKENIZE: a study's data settings → tokens/<study>/ (memory-mapped token files and meta.json).

python -m stages.tokenize results/<study>/configs/data.toml tokens/<study>
"""

import sys
from pathlib import Path

from engine.config import load
from engine.data.prepare import prepare
from engine.errors import ConfigError, command


@command
def main() -> None:
    if len(sys.argv) != 3:
        raise ConfigError("usage: python -m stages.tokenize DATA.toml DIRECTORY")
    settings = load(sys.argv[1], only=("data",)).data
    meta = prepare(settings, Path(sys.argv[2]))
    for split, facts in meta["splits"].items():
        rows = f"{facts['rows']:,} rows, " if "rows" in facts else ""
        print(
            f"tokenize: {settings.dataset} {split}: {rows}{facts['tokens']:,} tokens, {facts['bytes']:,} bytes, "
            f"sha256 {facts['sha256_text'][:12]}",
            file=sys.stderr,
        )
    for reason, rows in meta.get("dropped", {}).items():
        if rows:
            print(f"tokenize: {settings.dataset}: {rows:,} rows dropped: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
