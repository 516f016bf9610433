"""TOKENIZE: a study's data settings → tokens/<study>/ (memory-mapped token files and meta.json).

python -m stages.tokenize results/<study>/configs/data.toml tokens/<study>
"""

import sys
from pathlib import Path

from engine.config import load
from engine.data.prepare import prepare
from engine.errors import ConfigError, command
from metrics.measures import amount


@command
def main() -> None:
    if len(sys.argv) != 3:
        raise ConfigError("usage: python -m stages.tokenize DATA.toml DIRECTORY")
    settings = load(sys.argv[1], only=("data",)).data
    meta = prepare(settings, Path(sys.argv[2]))
    for split, facts in meta["splits"].items():
        rows = "".join(
            f"{amount(facts[f'{one}s'], one)}, " for one in ("row", "document") if f"{one}s" in facts
        )
        print(
            f"tokenize: {settings.dataset} {split}: {rows}{facts['tokens']:,} tokens, {facts['bytes']:,} bytes, "
            f"sha256 {facts['sha256_text'][:12]}",
            file=sys.stderr,
        )
    one = "document" if meta["kind"] == "documents" else "row"
    for reason, count in meta.get("dropped", {}).items():
        if count:
            print(f"tokenize: {settings.dataset}: {amount(count, one)} dropped: {reason}", file=sys.stderr)
    if meta.get("unverified"):
        print(f"tokenize: {settings.dataset}: unverified: {meta['unverified']}", file=sys.stderr)
    if meta.get("stands_in_for"):
        print(f"tokenize: {settings.dataset} stands in for {meta['stands_in_for']}", file=sys.stderr)


if __name__ == "__main__":
    main()
