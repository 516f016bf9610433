"""A forked run is the run that a process of its own would be, and what a fork cannot be is refused."""

import pytest
from engine_runs import Lab, column
from fork_server import ForkServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ForkServer(Lab(tmp_path_factory.mktemp("server")).environment()) as started:
        yield started


@pytest.fixture
def forking(lab, server, monkeypatch):
    monkeypatch.setattr(Lab, "server", server)
    monkeypatch.setattr(lab, "start", lambda *_, **__: pytest.fail("a process was started"))
    return lab


def test_a_forked_run_is_the_run(forking, server):
    before = server.forked
    expected = column(forking.train(run="here"), "train_loss")
    for name in ("one", "two"):
        run = forking.launch(run=name)
        assert column(run, "train_loss") == expected and run.is_relative_to(forking.directory)
    assert server.forked == before + 2
    assert '"event": "evaluation"' in (forking.directory / "stdout.txt").read_text()


def test_a_forked_run_that_fails_says_why(forking, server):
    config, file = forking.config(), forking.file(data_dir="nowhere")
    done = server.train(config, file, forking.directory, forking.environment())
    assert done.returncode == 2 and "nowhere" in done.stderr
    assert forking.launch().is_dir()  # and the next is none the worse


@pytest.mark.parametrize("settings", [{"deterministic": True}, {"cpu_threads": 1}])
def test_what_torch_reads_when_it_is_imported_is_no_forks(lab, server, monkeypatch, settings):
    before = server.refused
    monkeypatch.setattr(Lab, "server", server)
    commands = []
    monkeypatch.setattr(lab, "start", lambda *command, **_: commands.append(command) or lab)
    monkeypatch.setattr(lab, "returncode", 0, raising=False)
    lab.launch(**settings)
    assert commands == [("-m", "engine.train", "run.toml")] and server.refused == before + 1


@pytest.mark.parametrize(("environment", "is_refused"), [({}, False), ({"OMP_NUM_THREADS": "2"}, True)])
def test_another_environment_is_no_forks(forking, server, environment, is_refused):
    config, file = forking.config(), forking.file()
    found = server.train(config, file, forking.directory, forking.environment(**environment))
    assert (found is None) == is_refused


def test_a_server_that_ends_refuses_and_says_why(lab):
    environment = lab.environment(PYTHONHOME="nowhere")  # so that Python does not start
    with ForkServer(environment) as ended:
        found = ended.train(lab.config(), lab.file(), lab.directory, environment)
    assert found is None and ended.problem == "the fork server ended, or gave no answer for 120 s"
