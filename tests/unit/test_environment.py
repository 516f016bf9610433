"""What env.json says of the machine and of the code: a driver imitated, and a repository made for it."""

import hashlib
import subprocess

import pytest
import torch

from engine import environment, nvml

CPU = torch.device("cpu")
COMMITTED = {"git_engine_changed": False, "git_engine_diff_sha256": None}


def git(directory, *arguments: str) -> bytes:
    who = ("-c", "user.name=A. User", "-c", "user.email=user@localhost")
    done = subprocess.run(["git", *who, *arguments], cwd=directory, capture_output=True, check=True)
    return done.stdout


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """engine/ of a checkout with one commit; the process works elsewhere."""
    code, elsewhere = tmp_path / "checkout/engine", tmp_path / "elsewhere"
    code.mkdir(parents=True)
    elsewhere.mkdir()
    (code / "step.py").write_text("a = 1\n")
    git(code.parent, "init", "-q")
    git(code.parent, "add", "-A")
    git(code.parent, "commit", "-qm", "start")
    monkeypatch.setattr(environment, "CODE", code)
    monkeypatch.chdir(elsewhere)
    return code


def test_the_commit_is_that_of_the_engines_checkout(engine):
    commit = git(engine, "rev-parse", "HEAD").decode().strip()
    assert environment.code() == {"git_commit": commit, **COMMITTED}


def test_code_that_is_not_committed_has_a_digest(engine):
    (engine / "step.py").write_text("a = 2\n")
    found, diff = environment.code(), git(engine, "diff", "HEAD")
    assert b"+a = 2" in diff
    assert found["git_engine_changed"] and found["git_engine_diff_sha256"] == hashlib.sha256(diff).hexdigest()
    git(engine, "add", "-A")  # staged is not committed
    assert environment.code() == found
    (engine / "new.py").write_text("b\n")
    assert environment.code()["git_engine_diff_sha256"] == hashlib.sha256(diff + b"new.pyb\n").hexdigest()
    git(engine, "add", "-A")
    git(engine, "commit", "-qm", "both")
    assert environment.code().items() >= COMMITTED.items()


def test_what_is_outside_the_engine_does_not_matter(engine):
    """DVC writes dvc.lock and params.yaml between the runs of a study, whose code is the same."""
    (engine.parent / "params.yaml").write_text("lr: 1\n")
    git(engine.parent, "add", "-A")
    assert environment.code().items() >= COMMITTED.items()


@pytest.mark.parametrize("reason", ["no repository", "no git", "too slow"])
def test_without_git_nothing_is_known_and_nothing_fails(engine, tmp_path, monkeypatch, reason):
    if reason == "no repository":
        monkeypatch.setattr(environment, "CODE", tmp_path / "elsewhere")
    elif reason == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(environment, "PATIENCE_SECONDS", 0)
    assert set(environment.code().values()) == {None}


def test_the_driver_and_the_link_of_a_gpu_are_told(monkeypatch):
    class Installed:
        def installed(self):
            return {"driver_version": "580.95.05", "pcie_generation": 5, "pcie_width": 16}

    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(nvml.Gpu, "of", lambda properties: Installed())
    found = environment.describe(torch.device("cuda"), 1)
    assert (found["driver_version"], found["pcie_generation"], found["pcie_width"]) == ("580.95.05", 5, 16)

    def none(_):
        raise nvml.NvmlError("no driver")

    monkeypatch.setattr(nvml.Gpu, "of", none)
    unknown = environment.describe(torch.device("cuda"), 1)
    assert unknown.keys() == found.keys() == environment.describe(CPU, 1).keys()
    for one in (unknown, environment.describe(CPU, 1)):
        assert {one["driver_version"], one["pcie_generation"], one["pcie_width"]} == {None}
