"""Runs of the GPU tests are forked from one process that has imported torch: see fork_server.py."""

import pytest
import torch
from engine_runs import Lab

SERVER = pytest.StashKey()


@pytest.fixture(scope="session")
def server(request, tmp_path_factory):
    from fork_server import ForkServer

    with ForkServer(Lab(tmp_path_factory.mktemp("server")).environment()) as started:
        request.config.stash[SERVER] = started
        yield started


@pytest.fixture(scope="module", autouse=True)
def forked_runs(request):
    """Within a module of this directory, `Lab.launch` forks what may be forked."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.is_available():
            patch.setattr(Lab, "server", request.getfixturevalue("server"))
        yield


def pytest_terminal_summary(terminalreporter, config):
    if server := config.stash.get(SERVER, None):
        why = f": {server.problem}" if server.problem else ""
        terminalreporter.write_line(f"{server.forked} runs were forked, {server.refused} could not be{why}")
