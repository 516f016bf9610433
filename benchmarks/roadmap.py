"""The roadmap's table, from rows: speed and memory of each technique alone and combined, its effect on the loss.

    python -m benchmarks.roadmap ROWS.jsonl… RESULTS
    python -m benchmarks.roadmap RECORD

RESULTS is results/<study> of the study whose runs are the techniques, after `summarize`. RECORD is a directory with
such rows, and the study's in results/ and report/. What has no row is shown as not measured; nothing is typed in.
"""

import csv
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.catalogue import ANY, CATALOGUE, Technique
from benchmarks.factorial import Experiment
from benchmarks.table import aligned, key, machine_words, ratios, read
from benchmarks.techniques import ROADMAP
from engine.errors import ConfigError, command

NOTICED = 0.02  # a ratio nearer to 1 is no effect
NOT_MEASURED = "not measured"
HELD = " held"
HELD_NOTE = (
    "* held: of the memory that the allocator held, because tensors inside a CUDA graph cannot be seen"
)
HEAD = [
    "technique",
    "switched on by",
    "status",
    "speed alone",
    "memory alone",
    "speed combined",
    "memory combined",
]
HEAD += ["effect on validation loss", "verdict"]


@dataclass(frozen=True)
class Effect:
    """Ratios of speed and of memory, or in words why there are none; `held`: of memory that the allocator held."""

    speed: float | None = None
    memory: float | None = None
    words: str = NOT_MEASURED
    held: bool = False

    def cells(self) -> list[str]:
        found = [self.words if x is None else f"{x:.2f}" for x in (self.speed, self.memory)]
        return [found[0], found[1] + HELD if self.held else found[1]]


@dataclass(frozen=True)
class Loss:
    """A run's difference to the baseline, as summarize has it; `verdict` empty: not measured."""

    words: str = NOT_MEASURED
    verdict: str = ""


def experiment_of(technique: Technique) -> Experiment:
    """The experiment that varies the technique's slot."""
    return next(
        e for e in ROADMAP if technique.slot in e.varies and technique.level in e.slots[technique.slot]
    )


def effect(rows: list[dict], pair: tuple[dict, dict]) -> Effect:
    """The effect of the second combination of levels against the first, in rows of one experiment."""
    without, with_it = ([row for row in rows if key(row["levels"]) == key(levels)] for levels in pair)
    if not with_it:
        return Effect()
    if all(row["status"] != "ok" for row in with_it):
        return Effect(words=with_it[-1]["status"])
    if all(row["status"] != "ok" for row in without):
        return Effect(words=f"baseline {without[-1]['status']}" if without else NOT_MEASURED)
    memory = "host_peak_gib" if rows[0]["device"] == "cpu" else "peak_gib"
    names = "tokens_per_second", memory, "peak_reserved_gib"
    found = [ratios(with_it, without, name) for name in names]
    speed, tensors, held = (statistics.median(values) if values else None for values in found)
    return Effect(speed, held if tensors is None else tensors, held=tensors is None and held is not None)


def losses(results: Path | None) -> list[tuple[dict, Loss]]:
    """(settings of a run, its effect on the loss) of the study in `results`; none without it.

    Raises ConfigError where the study was not summarized.
    """
    if results is None:
        return []
    study = json.loads((results / "configs" / "study.json").read_text(encoding="utf-8"))
    places = [
        results.parent.parent / "reports" / results.name / "table.csv",
        results.parent / "report" / "table.csv",
    ]
    table = next((place for place in places if place.is_file()), None)
    if table is None:
        raise ConfigError("its study has no table.csv; run `dvc repro`", str(results))
    with table.open(newline="", encoding="utf-8") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    return [(own, _loss(rows[run])) for run, own in study["runs"].items() if run != study["baseline"]]


def _loss(row: dict) -> Loss:
    if row["verdict"] == "missing":  # no seed was run
        return Loss()
    if not row["difference"]:
        return Loss(row["verdict"], row["verdict"])
    half = float(row["difference_half_width"] or 0)
    digits = max(4, 1 - math.floor(math.log10(half))) if half else 4  # two of the half-width, or more
    interval = f" ± {half:.{digits}f}" if row["difference_half_width"] else ""
    return Loss(f"{float(row['difference']):+.{digits}f}{interval}, {row['verdict']}", row["verdict"])


def loss_of(technique: Technique, found: list[tuple[dict, Loss]]) -> Loss:
    """The effect of the run that has the technique's settings and no other."""
    for own, loss in found:
        if own.keys() == technique.on.keys() and all(v in (ANY, own[k]) for k, v in technique.on.items()):
            return loss
    return Loss()


def verdict(effects: tuple[Effect, ...], loss: Loss) -> str:
    """In words, by what the technique does among all others, or if that is not known alone."""
    if loss.verdict == "worse":
        return "costs loss"
    chosen = next((one for one in reversed(effects) if one.speed is not None), None)
    if chosen is None:
        if effects:  # it has speed and memory to measure
            return NOT_MEASURED
        better = {
            "better": "lowers the loss",
            "identical": "changes nothing",
            "equivalent": "no effect that matters",
            "inconclusive": "no effect shown",
        }
        return better.get(loss.verdict, NOT_MEASURED)
    faster, smaller = chosen.speed - 1, 1 - (chosen.memory or 1)
    gains = [words for gain, words in ((faster, "faster"), (smaller, "smaller")) if gain >= NOTICED]
    costs = [words for gain, words in ((faster, "slower"), (smaller, "larger")) if gain <= -NOTICED]
    said = " and ".join(gains) + (" but " if gains and costs else "") + " and ".join(costs)
    lower = "lowers the loss" if loss.verdict == "better" else ""
    return ", ".join(filter(None, (said, lower))) or "no gain"


def line(technique: Technique, rows: list[dict], found: list[tuple[dict, Loss]]) -> list[str]:
    """The technique's row of the table."""
    if not technique.on:
        return [technique.name, technique.switch, "not built", *["–"] * 5, technique.why]
    loss, effects = loss_of(technique, found), ()
    if technique.same_loss and not loss.verdict:
        loss = Loss("none, by its tests", "identical")
    if technique.slot:
        e = experiment_of(technique)
        own = [row for row in rows if row["experiment"] == e.name]
        pairs = e.alone(technique.slot, technique.level), e.combined(technique.slot, technique.level)
        effects = tuple(effect(own, pair) for pair in pairs)
    measured = any(one.speed is not None for one in effects) or bool(loss.verdict and not technique.same_loss)
    status = "tested, measured" if measured else "tested"
    cells = [cell for one in effects for cell in one.cells()] or ["–"] * 4
    return [technique.name, technique.switch, status, *cells, loss.words, verdict(effects, loss)]


def table(rows: list[dict], results: Path | None) -> str:
    """The whole roadmap, with where it was measured, and what is invalid."""
    found = losses(results)
    lines = [line(technique, rows, found) for technique in CATALOGUE]
    where = dict.fromkeys(machine_words(row) for row in rows)
    invalid = dict.fromkeys(
        f"* {row['experiment']}, {row['levels'] or 'base'}: {row['status']}: "
        + "; ".join(row.get("problems") or row.get("last_lines", [])[-1:])
        for row in rows
        if row["status"] != "ok"
    )
    text = ["Ratios of tokens a second (speed) and of peak memory; above 1 is more. " + "; ".join(where)]
    if any(cell.endswith(HELD) for one in lines for cell in one):
        invalid = {HELD_NOTE: None} | invalid
    return "\n".join([*text, "", aligned(HEAD, lines), *(["", *invalid] if invalid else [])])


def sources(paths: list[Path]) -> tuple[list[dict], Path | None]:
    """The rows of the roadmap's experiments, and the directory of its study's results, in these files or directories.

    Raises ConfigError for a path that is neither, and for two studies.
    """
    files, studies = [], []
    for path in paths:
        if path.is_file():
            files.append(path)
        elif (path / "configs" / "study.json").is_file():
            studies.append(path)
        elif path.is_dir():
            files += sorted(path.glob("*.jsonl"))
            studies += [path / "results"] if (path / "results").is_dir() else []
        else:
            raise ConfigError("no such file or directory", str(path))
    if len(studies) > 1:
        raise ConfigError(f"one study shows the effects on the loss, not {', '.join(map(str, studies))}")
    names = {e.name for e in ROADMAP}
    return [row for row in read(files) if row["experiment"] in names], studies[0] if studies else None


@command
def main(arguments: list[str]) -> None:
    """Print the table."""
    print(table(*sources([Path(argument) for argument in arguments])))


if __name__ == "__main__":
    main(sys.argv[1:])
