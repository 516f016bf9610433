"""Shared fixtures. Every test that trains does so in its own directory, with its own checkpoints."""

import os
import sys

import pytest

# Before anything imports torch, here and in child processes: with tiny models more threads only cost time.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A working directory with a small text data set, and the engine in it: see engine_runs.Lab."""
    from engine_runs import Lab

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    if "torch._dynamo" in sys.modules:  # a run is a process, whose graphs are its own
        sys.modules["torch._dynamo"].utils.counters.clear()
    return Lab(tmp_path)


class Interrupted(Exception):
    """Stands for whatever stops a run."""


@pytest.fixture
def interrupt(lab, monkeypatch):
    """interrupt(step, **settings): train until just before `step` (0-based), then stop; the run's directory."""
    from engine.step import Step

    def call(at: int, **settings):
        whole = Step.__call__

        def stop(self, step, micro_batches):
            if step == at:
                raise Interrupted
            return whole(self, step, micro_batches)

        with monkeypatch.context() as patched:
            patched.setattr(Step, "__call__", stop)
            with pytest.raises(Interrupted, match="^$"):
                lab.train(**settings)
        return lab.config(**settings).directory

    return call
