"""Two nodes: torchrun is started once on each, as docs/multi-node.md says, and the engine trains over both.

On this machine a node is a directory: nothing is shared but the network. The nodes meet in a file instead of at a
host's port, because a port that is free now may be taken a moment later; torchrun chooses all other ports itself.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from engine_runs import Lab, column, ledger, read_json

pytestmark = pytest.mark.slow

RUN = {"steps": 3, "run": "two", "data_parallel": "fsdp", "processes": 2}


def start(node: Lab, meeting_point: Path) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "two", "--rdzv-endpoint", str(meeting_point)]
    meeting += ["--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1"]
    return subprocess.Popen(
        [*launcher, *meeting, "-m", "engine.train", node.file(**RUN)],
        cwd=node.directory,
        env=node.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_nodes_train_what_one_process_does(tmp_path, monkeypatch):
    nodes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        nodes.append(Lab(tmp_path / name))
    running = [start(node, tmp_path / "meeting") for node in nodes]
    try:
        told = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(told)

    # Each node made its own tokens; one of them has rank 0, which alone wrote the results.
    assert all((node.directory / "tokens/by_hand/meta.json").exists() for node in nodes)
    [results] = [node.directory / "results" for node in nodes if (node.directory / "results").exists()]
    run = results / "by_hand/two-1"
    lines = ledger(run)
    assert [what for what, line in lines.items() if not line["agrees"]] == []
    assert lines["sharding"]["in_effect"] == "fsdp over 2 ranks" and lines["processes"]["in_effect"] == "2"
    assert read_json(run / "metrics.json")["status"] == "complete"

    monkeypatch.chdir(results.parent)
    one = nodes[0].train(run="one", steps=RUN["steps"])
    for name in ("train_loss", "grad_norm"):
        assert column(run, name) == pytest.approx(column(one, name), rel=1e-5)
