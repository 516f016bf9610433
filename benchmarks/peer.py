"""The process of one peer: read the task, measure, write the result.

    python -m benchmarks.peer MODULE TASK.json RESULT.json

MODULE has `measure(task) -> dict` (see Meter.result). What it prints goes to the log and is no result. A library
or a checkout that is not there is the result {"missing": reason}.
"""

import importlib
import json
import resource
import sys
from pathlib import Path

from benchmarks.task import Missing, Task


def peak_host_gib() -> float:
    """The largest resident memory of this process or of one that it waited for."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 2**20


def main(module: str, task: str, result: str) -> None:
    try:
        task = Task.from_json(Path(task).read_text(encoding="utf-8"))
        measured = importlib.import_module(module).measure(task) | {"host_peak_gib": peak_host_gib()}
    except (Missing, ModuleNotFoundError) as error:
        measured = {"missing": str(error)}
    Path(result).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
