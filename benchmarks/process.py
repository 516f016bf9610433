"""One peer in a process of its own, with a time limit: what came of it, never a silent gap."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.task import Task

REPOSITORY = Path(__file__).resolve().parents[1]
LAST_LINES = 12  # of a failed peer's output, kept in its row


def run(module: str, task: Task, directory: Path, limit_seconds: float) -> dict:
    """Measure the peer of `module` in `directory`; its result with `status`, and `last_lines` where it failed.

    status: ok, missing (a library or checkout is not there), out of memory, error, or timeout. A peer that takes
    longer is ended with all the processes that it started.
    """
    task_file, result, log = (directory / name for name in ("task.json", "result.json", "log.txt"))
    task_file.write_text(task.to_json(), encoding="utf-8")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.peer", module, str(task_file), str(result)]
    with log.open("wb") as output:
        code = _wait(command, directory, output, limit_seconds)
    if code == 0:
        measured = json.loads(result.read_text(encoding="utf-8"))
        if "missing" in measured:
            return {"status": "missing", "last_lines": [measured["missing"]]}
        return {"status": "ok", **measured}
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
    if code is None:
        return {"status": "timeout", "last_lines": [*lines, f"ended after {limit_seconds:g} s"]}
    status = "out of memory" if "out of memory" in "\n".join(lines) else "error"
    return {"status": status, "last_lines": lines or [f"exit status {code}"]}


def _wait(command: list[str], directory: Path, output, limit_seconds: float) -> int | None:
    """The exit status of `command`, or None if it was ended at the limit."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        cwd=directory,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",  # so that the log ends with what was said last
            "PLUMBLINE_CHECKPOINTS": str(directory / "checkpoints"),
        },
        start_new_session=True,
    )
    try:
        return process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also when this process is told to end
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
