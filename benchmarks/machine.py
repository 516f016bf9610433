"""Where a measurement was made: `python -m benchmarks.machine DEVICE` prints one JSON object.

In a process of its own, so that the one that starts the peers holds no device.
"""

import json
import subprocess
import sys

import torch

from benchmarks.process import REPOSITORY
from engine.environment import describe


def facts(device: str) -> dict:
    """Hardware, versions and commit, without host or user. Raises RuntimeError without such a device."""
    command = [sys.executable, "-m", "benchmarks.machine", device]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"no {device} device: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(describe(torch.device(sys.argv[1]), 1)))
