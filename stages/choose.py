"""Choose the best run of each grid of a study, for another study to compare on fresh seeds.

    python -m stages.choose STUDY       reads results/STUDY, writes conf/chosen/STUDY.yaml

So a comparison of optimizers is two studies: the first tries pairs of settings on its own seeds and is judged by
validation loss; the second takes over the best pairs (`defaults: [/chosen/STUDY, _self_]`), and the plan refuses it
on a seed that they were chosen on. Exit 2 where a grid has no run whose every seed ended.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from engine.errors import ConfigError, command
from metrics import grid_results, rows, summary
from metrics.words import with_interval

CHOSEN = Path("conf/chosen")


def choose(results: Path) -> str:
    """The text of the study's file under conf/chosen/.

    Raises:
        ConfigError: it has no grid, is judged by test data, or a grid of it has no stable run.
    """
    try:
        read = rows.read(results)
    except rows.ResultsError as error:
        raise ConfigError(str(error)) from None
    study, summed = read.study, summary.summarize(read)
    if not study.grid:
        raise ConfigError(f"{study.name} has no grid: there is nothing to choose from", str(results))
    if study.metric.startswith("test_"):
        raise ConfigError(
            f"metric = {study.metric}: choosing by test data would favour what is chosen; set metric: val_loss",
            str(results),
        )
    best = grid_results.best(summed)
    if absent := [name for name in study.grid if name not in best]:
        raise ConfigError(
            f"no run of the grid {', '.join(absent)} ended in all {len(study.seeds)} seeds", str(results)
        )
    chosen = {"study": study.name, "metric": study.metric, "seeds": list(study.seeds)}
    lines = [
        "# @package _global_",
        f"# Written by `python -m stages.choose {study.name}`: the best run of each of its grids.",
        f"chosen_from: {json.dumps(chosen)}",
        "runs:",
    ]
    for name, cell in best.items():
        lines.append(f"  # {cell.point.run}: {summed.metric.label} {with_interval(cell.estimate)}")
        lines.append(f"  {name}: {json.dumps(cell.point.settings)}")
    return "\n".join(lines) + "\n"


@command
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="name of a study with a grid, whose results are there")
    name = parser.parse_args(arguments).study
    text = choose(Path("results") / name)
    CHOSEN.mkdir(parents=True, exist_ok=True)
    (CHOSEN / f"{name}.yaml").write_text(text, encoding="utf-8")
    print(f"wrote {CHOSEN / f'{name}.yaml'}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
