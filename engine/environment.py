"""What a run ran on: hardware, versions, and the state of the code. Written once, to env.json."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.nvml import Gpu, NvmlError

CODE = Path(__file__).parent  # what the state of the code is asked of, wherever the process works
PATIENCE_SECONDS = 20  # for each question to git
NOT_KNOWN = dict.fromkeys(("driver_version", "pcie_generation", "pcie_width"))


def _git(*arguments: str) -> bytes | None:
    """What git says in the engine's directory; None without git, outside a repository, or where it takes too long."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, timeout=PATIENCE_SECONDS, check=True, cwd=CODE
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def describe(device: torch.device, world_size: int, devices: Sequence[dict] = ()) -> dict:
    """A JSON-able record of this machine and checkout. No host name, no user name, no path.

    devices: of all ranks, as engine.preflight.device_map tells.
    """
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "device_memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30
        if on_gpu
        else None,
        **(_installed(device) if on_gpu else NOT_KNOWN),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": world_size,
        "devices": list(devices),
        **code(),
    }


def _installed(device: torch.device) -> dict[str, str | int | None]:
    """Driver and PCIe link of the GPU; None for what cannot be read here."""
    try:
        return Gpu.of(torch.cuda.get_device_properties(device)).installed()
    except (NvmlError, AttributeError):  # a driver that is too old has not all functions
        return dict(NOT_KNOWN)


def code() -> dict[str, str | bool | None]:
    """The commit of the engine's checkout, whether engine/ is otherwise than there, and a digest of how.

    The digest is the sha256 of `git diff HEAD` of engine/, its new files after it, each as its name and its bytes;
    None where nothing was changed, or nobody can say.
    """
    commit, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".")
    return {
        "git_commit": None if commit is None else commit.decode().strip(),
        "git_engine_changed": None if status is None else bool(status.strip()),
        "git_engine_diff_sha256": _diff_digest() if status and status.strip() else None,
    }


def _diff_digest() -> str | None:
    diff = _git("diff", "HEAD", "--no-color", "--no-ext-diff", "--", ".")
    new = _git("ls-files", "--others", "--exclude-standard", "-z", "--", ".")
    if diff is None or new is None:
        return None
    digest = hashlib.sha256(diff)
    try:
        for name in sorted(filter(None, new.split(b"\0"))):
            digest.update(name + (CODE / os.fsdecode(name)).read_bytes())
    except OSError:  # gone meanwhile, say
        return None
    return digest.hexdigest()


def processor() -> str:
    """The name of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown processor"
