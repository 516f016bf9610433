"""`engine.train` with two probes, started by torchrun in test_same_as_one_process.py.

    probed_train.py FILE.toml LOG_DIRECTORY [STOP_AT]

Every file that this process opens for writing, makes, renames or removes below results/ is noted in
LOG_DIRECTORY/writes-<rank>.json. With STOP_AT the process fails just before that step (0-based).
"""

import atexit
import json
import os
import sys
from pathlib import Path

RESULTS = Path("results").absolute()
writes: list[str] = []


def note(event: str, arguments: tuple) -> None:
    """An audit hook: called by Python before each of its own file operations."""
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        return
    if isinstance(arguments[0], str | bytes | os.PathLike):
        path = Path(os.fsdecode(arguments[0])).absolute()
        if RESULTS in path.parents:
            writes.append(f"{event} {path.relative_to(RESULTS)}")


def main() -> None:
    file, log, *stop_at = sys.argv[1:]
    sys.addaudithook(note)
    atexit.register(lambda: Path(log, f"writes-{os.environ['RANK']}.json").write_text(json.dumps(writes)))
    from engine import train
    from engine.step import Step

    whole = Step.__call__

    def call(self, step, micro_batches):
        if stop_at and step == int(stop_at[0]):
            raise SystemExit("stopped by the test")
        return whole(self, step, micro_batches)

    Step.__call__ = call
    sys.argv = ["engine.train", file]
    train.main()


if __name__ == "__main__":
    main()
