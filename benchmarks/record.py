"""A record of measurements: README.md, made from the raw rows (*.jsonl) that lie in its directory.

    python -m benchmarks.record records/NAME

Every figure comes from the rows. What a person has to say, such as what was tried and did not pay, is in notes.md
beside them and is put at the end.
"""

import json
import sys
from pathlib import Path

from benchmarks.table import read, tables
from engine.errors import ConfigError, command


def page(name: str, files: dict[str, list[dict]], notes: str) -> str:
    """The page. `files`: the rows of each file, by its name."""
    rows = [row for own in files.values() for row in own]
    machines = dict.fromkeys(_machine(row) for row in rows)
    commands = dict.fromkeys(f"    {row['command']}" for row in rows)
    parts = [
        f"# {name}",
        "Speed and memory, each table from one run on one machine; how to read them is in benchmarks/README.md.",
        "Where: " + "; ".join(machines) + ".",
        "Commands:",
        "\n".join(commands),
        "Raw rows: " + ", ".join(f"[{file}]({file})" for file in files) + ". This page is made from them by",
        f"    python -m benchmarks.record records/{name}",
        "```\n" + tables(rows) + "\n```",
    ]
    return "\n\n".join(parts + ([notes.strip()] if notes.strip() else [])) + "\n"


def _machine(row: dict) -> str:
    m, commit = row["machine"], row["git_commit"]
    changed = " with changes" if row["git_engine_changed"] else ""
    return (
        f"{m['device_name']}, {m['cpu_count']} CPU cores, {m['platform']}, torch {m['torch']}, "
        f"Python {m['python']}, commit {commit}{changed}"
    )


@command
def main(arguments: list[str]) -> None:
    """Write the README of one record."""
    if len(arguments) != 1:
        raise ConfigError("usage: python -m benchmarks.record records/NAME")
    directory = Path(arguments[0])
    files = {path.name: read([path]) for path in sorted(directory.glob("*.jsonl"))}
    if not any(files.values()):
        raise ConfigError("no rows (*.jsonl) here", str(directory))
    notes = directory / "notes.md"
    text = page(directory.resolve().name, files, notes.read_text(encoding="utf-8") if notes.is_file() else "")
    (directory / "README.md").write_text(text, encoding="utf-8")
    print(json.dumps({"readme": str(directory / "README.md"), "rows": sum(map(len, files.values()))}))


if __name__ == "__main__":
    main(sys.argv[1:])
