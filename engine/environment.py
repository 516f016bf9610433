"""What a run ran on: hardware, versions, and the state of the code. Written once, to env.json."""

import os
import platform
import subprocess
from collections.abc import Sequence

import torch


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def describe(device: torch.device, world_size: int, devices: Sequence[dict] = ()) -> dict:
    """A JSON-able record of this machine and checkout. No host name, no user name, no path.

    devices: of all ranks, as engine.preflight.device_map tells.
    """
    on_gpu = device.type == "cuda"
    status = _git("status", "--porcelain", "--", "engine")
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
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": world_size,
        "devices": list(devices),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_engine_changed": None if status is None else bool(status),
    }


def processor() -> str:
    """The name of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown processor"
