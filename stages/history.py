"""How a study's figures went over the commits and DVC experiments of this repository; nothing is checked out.

    python -m stages.history STUDY                     a row where a run's figures changed, from reports/STUDY/metrics
    python -m stages.history STUDY --metric NAME       of another figure than the study's own
    python -m stages.history STUDY --chart FILE.svg    and a picture of it
    python -m stages.history records/X/report          of a published record

Commits are those of the branch that is checked out, a merge as one; then the workspace, where it says something else.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from functools import cache
from pathlib import Path

from engine.errors import ConfigError, command
from metrics.history import Figures, Revision, changes, ends, figures, frame, then_and_now
from metrics.measures import METRICS, amount
from plots import history
from plots.svg import svg
from stages.study import one_of
from stages.summarize import show_table, terminal

# Where DVC keeps what `dvc exp run` made: the commit that it came from, and its name.
EXPERIMENT = re.compile(r"refs/exps/([0-9a-f]{2})/([0-9a-f]{38})/(.+)")
WORKSPACE = "workspace"
SHORT = 7  # characters of a commit
CAUTION = (
    "means over seeds, as each revision reported them, and no interval between two: settings, data or machine may "
    "have changed, see `dvc params diff REVISION REVISION`"
)


def git(*arguments: str) -> str:
    """What git prints.

    Raises:
        ConfigError: it fails, with what it says.
    """
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise ConfigError(done.stderr.strip() or f"exit status {done.returncode}", f"git {arguments[0]}")
    return done.stdout


def revisions(directory: Path) -> list[Revision]:
    """Every revision whose files under `directory`/metrics differ from the one before, oldest first."""
    place = f"{directory.as_posix()}/metrics/"
    log = git("log", "--first-parent", "--reverse", "--format=%H%x1f%ct%x1f%cs%x1f%s", "--", place)
    found: list[tuple[int, Revision]] = []
    before: Figures = {}
    for line in log.splitlines():
        commit, seconds, date, subject = line.split("\x1f")
        runs = committed(commit, place)
        found.append((int(seconds), Revision(commit[:SHORT], date, subject, runs, before)))
        before = runs
    found += _experiments(place, [one.runs for _, one in found])
    found.sort(key=lambda one: one[0])  # stable: commits of one second stay in their order
    now = Revision(WORKSPACE, "now", "what is not committed", _workspace(directory), before)
    return [*(one for _, one in found), now]


def _experiments(place: str, commits: list[Figures]) -> list[tuple[int, Revision]]:
    """(seconds since 1970, the experiment), each beside the commit that it came from, without what was committed."""
    found = []
    form = "%(refname)%1f%(objectname)%1f%(committerdate:unix)%1f%(committerdate:short)"
    for line in git("for-each-ref", f"--format={form}", "refs/exps").splitlines():
        ref, commit, seconds, date = line.split("\x1f")
        if named := EXPERIMENT.fullmatch(ref):
            base = named[1] + named[2]
            runs, before = committed(commit, place), committed(base, place)
            runs = {run: own for run, own in runs.items() if all(own != one.get(run) for one in commits)}
            says = f"experiment from {base[:SHORT]}"
            found.append((int(seconds), Revision(named[3], date, says, runs, before, aside=True)))
    return found


def committed(commit: str, place: str) -> Figures:
    """run → its figures in a commit; none where it has no such files."""
    found: Figures = {}
    for line in git("ls-tree", "-z", commit, "--", place).split("\0"):
        kind, _, path = line.partition("\t")
        if path.endswith(".json"):
            name = f"{commit[:SHORT]}:{path}"
            found[Path(path).stem] = _figures(_blob(kind.split()[2]), name)
    return found


@cache
def _blob(digest: str) -> str:
    """The same text is in many commits."""
    return git("cat-file", "blob", digest)


def _workspace(directory: Path) -> Figures:
    return {
        path.stem: _figures(path.read_text(encoding="utf-8"), str(path))
        for path in sorted((directory / "metrics").glob("*.json"))
    }


def _figures(text: str, where: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"is not valid JSON: {error}", where) from None
    if not isinstance(found, dict):
        raise ConfigError(f"must hold one JSON object, got {type(found).__name__}", where)
    return found


def chosen(name: str | None, known: tuple[str, ...], where: str) -> str:
    """The figure asked for, or the study's own.

    Raises:
        ConfigError: no revision has it.
    """
    if problems := list(one_of("--metric", name, known)) if name else []:
        raise ConfigError(problems, where)
    return name or known[0]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="its name, or a directory that holds metrics/")
    parser.add_argument("--metric", help="default: the study's own")
    parser.add_argument("--chart", type=Path, metavar="FILE.svg")
    arguments = parser.parse_args()
    directory = Path(arguments.study) if "/" in arguments.study else Path("reports") / arguments.study
    found = revisions(directory)
    if not (known := figures(found)):
        raise ConfigError(
            "no commit, experiment or workspace has its figures; run it, and commit", str(directory)
        )
    metric = chosen(arguments.metric, known, str(directory))
    rows = changes(found, metric)
    shown = list(dict.fromkeys((one.revision.name, one.revision.date, one.revision.says) for one in rows))
    console = terminal()
    counted = f"{amount(len(rows), 'change')} of a run's figures in {amount(len(shown), 'revision')}"
    show_table(console, f"{directory}: {counted}", history.table(rows, metric))
    for name, date, says in shown:
        console.print(f"{name}, {date}: {says}")
    for old, new in ends(rows):
        console.print(f"- {then_and_now(old, new, metric)}")
    console.print(f"* {CAUTION}")
    if arguments.chart:
        of = METRICS[metric]
        chart = history.timeline(frame(rows, metric), f"{directory}: {of.label}", of.axis)
        picture = svg(chart, "history", f"Chart: {of.label} of {directory} over revisions")
        arguments.chart.write_text(picture + "\n", encoding="utf-8")
        console.print(f"\nChart: {arguments.chart}", soft_wrap=True)


if __name__ == "__main__":
    main()
