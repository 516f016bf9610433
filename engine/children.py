"""How the engine is started by another process: as a child that does not outlive it. Imports no torch."""

import ctypes
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, so that a killed pipeline leaves no trainer behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def training(path: str, processes: int) -> list[str]:
    """The command that trains the run of TOML file `path` in `processes` processes (0: one)."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), "-m", "engine.train", path]


def start(command: list[str], **options) -> subprocess.Popen:
    """Start `command`; it ends when this process does, however that ends, and this one when its parent does."""
    die_with_parent()
    return subprocess.Popen(command, preexec_fn=die_with_parent, **options)  # noqa: PLW1509  no threads yet
