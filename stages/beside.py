"""Two sets of rows of one study beside each other: does what came out on one machine, or engine, come out again?

    python -m stages.beside FIRST SECOND        directories of results: results/STUDY, records/X/results

Compared are the seeds that both have. A verdict is of those seeds alone; for all of a side's, see its own report.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.errors import ConfigError, command
from metrics import beside, rows
from metrics.rows import Results, ResultsError
from plots.beside import sentences, tables
from stages.history import SHORT
from stages.summarize import show_table, terminal


def made_on(results: Results) -> str:
    """The machines, versions and commits that a side's rows name."""
    environments = [one.env for one in results.runs if one.state == "complete"]

    def named(key: str) -> list[str]:
        return list(dict.fromkeys(str(env[key]) for env in environments if env.get(key)))

    commits = ", ".join(commit[:SHORT] for commit in named("git_commit"))
    machines = named("device_name") or named("device")
    parts = (
        ", ".join(machines),
        *(f"torch {version}" for version in named("torch")),
        f"commit {commits}" if commits else "",
    )
    return "; ".join(part for part in parts if part)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    directories = vars(parser.parse_args())
    try:
        both = {side: rows.read(directory) for side, directory in directories.items()}
        found = beside.beside(*both.values())
    except ResultsError as error:
        raise ConfigError(str(error)) from None
    console = terminal()
    console.print(f"Study {found.second.results.study.name}, twice")
    for side, directory in directories.items():
        console.print(f"{side}: {directory.as_posix()}: {made_on(both[side])}")
    console.print()
    for title, table in tables(found):
        show_table(console, title, table)
    for sentence in sentences(found):
        console.print(f"- {sentence}")


if __name__ == "__main__":
    main()
