"""What a run prints is kept in its directory: whole, at once, over a kill, and never beside another run's rows."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from engine_runs import REPOSITORY

from engine import children, rundir
from stages import output, train

RUN, BESIDE = Path("results/s/r-1"), Path("results/s/.r-1.log")
# Makes the run's directory as the engine does, and prints what it is given.
CHILD = """
import os, sys
from pathlib import Path
from engine import rundir
rundir.make_anew(Path("results/s/r-1"))
exec(sys.argv[1])
"""
SAYS = 'print("one"); print("a warning", file=sys.stderr); print("two")'
DIES = 'print("last words"); os.kill(os.getpid(), 9)'  # which nobody flushes

WAITS = """
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
signal.alarm(20)  # where nobody tells it
print("one")
signal.pause()
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def started(code: str, settings: str = "abc", show=lambda lines: [*lines]) -> int:
    """Run a child that executes `code` as the stage runs the engine; its status."""
    with output.Kept(RUN, settings) as kept:
        status = output.run([sys.executable, "-c", CHILD, code], kept, show)
        if status == 0:
            (RUN / "metrics.json").touch()
            kept.ended()
    return status


def lines(path: Path = RUN / "output.log") -> list[str]:
    """Of a file of output, the starts by their settings."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        is_start = line.startswith('{"event": "started"')
        found.append(f"started {json.loads(line)['config_sha256']}" if is_start else line)
    return found


def test_both_streams_are_kept_and_passed_on(capfd):
    assert started(SAYS, show=lambda found: print(*found, sep="", end="")) == 0
    assert sorted(lines()) == ["a warning", "one", "started abc", "two"] and lines()[0] == "started abc"
    assert lines().index("one") < lines().index("two")
    assert capfd.readouterr() == ("one\ntwo\n", "a warning\n")
    assert not BESIDE.exists()


def test_a_line_is_in_the_runs_directory_before_it_is_shown():
    seen = []
    assert started(SAYS, show=lambda found: seen.extend(line.strip() in lines() for line in found)) == 0
    assert seen == [True, True]


def test_a_killed_run_keeps_its_words_and_goes_on_in_the_same_file():
    """Also where DVC removes the directory before the run is started again."""
    assert started(DIES) == -signal.SIGKILL
    first = ["started abc", "last words"]
    assert lines() == first == lines(BESIDE)
    shutil.rmtree(RUN)
    assert started(DIES) == -signal.SIGKILL
    assert started('print("whole")') == 0
    assert lines() == [*first, *first, "started abc", "whole"] and not BESIDE.exists()


def test_other_settings_or_a_run_that_had_ended_begin_anew():
    started(DIES, "abc")
    assert started(SAYS, "def") == 0
    assert lines()[0] == "started def" and "last words" not in lines()
    before = lines()
    with output.Kept(RUN, "def"):  # the engine refuses, before it makes the directory
        assert lines() == before
    assert started('print("again")', "def") == 0
    assert lines() == ["started def", "again"]


def test_what_another_process_keeps_is_left_alone():
    with output.Kept(RUN, "abc") as first:
        rundir.make_anew(RUN)
        with output.Kept(RUN, "abc") as second:
            second.write("process 1 is writing it")
            second.ended()
        first.write("one")
        assert lines() == lines(BESIDE) == ["started abc", "one"]


def test_a_run_by_hand_has_nothing_of_an_earlier_one():
    started(DIES)
    rundir.make_anew(RUN)
    assert [path.name for path in RUN.iterdir()] == ["events.jsonl"]


def test_without_links_it_is_copied_when_the_run_has_ended(monkeypatch):
    def none(*_):
        raise OSError("not supported")

    monkeypatch.setattr(rundir.os, "link", none)
    with output.Kept(RUN, "abc") as kept:
        rundir.make_anew(RUN)
        kept.write("one\n")
        assert not (RUN / "output.log").exists()
        kept.ended()
    assert lines() == ["started abc", "one"] and not BESIDE.exists()


def test_a_full_disk_is_said_once_and_the_run_goes_on(capsys):
    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    with output.Kept(RUN, "abc") as kept:
        kept._file.close()
        kept._file = Full()
        kept.write("one")
        kept.write("two")
        kept.ended()
    assert capsys.readouterr().err == "results/s/.r-1.log: No space left on device; the rest is not kept\n"


def test_bytes_that_are_no_text_are_kept_as_what_they_are():
    assert started(r'sys.stdout.buffer.write(b"a\xff\n")') == 0
    assert lines() == ["started abc", r"a\xff"]


def test_an_interruption_ends_the_engine_and_keeps_what_it_said():
    def interrupted(found):
        next(iter(found))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="^$"):
        started(WAITS, show=interrupted)
    assert lines() == ["started abc", "one", "told to end"] == lines(BESIDE)


@pytest.mark.parametrize(
    ("code", "status", "is_kept_beside"),
    [
        ('print("one")', 0, False),
        ("""print('{"event": "diverged"}'); sys.exit(4)""", 0, False),
        ('print("one"); sys.exit(3)', 3, True),
    ],
    ids=["complete", "diverged", "out of memory"],
)
def test_the_stage_keeps_it(monkeypatch, code, status, is_kept_beside):
    Path("r.toml").write_text('[run]\nstudy = "s"\nrun = "r"\n')
    monkeypatch.setattr(children, "training", lambda *_: [sys.executable, "-c", CHILD, code])
    monkeypatch.setattr(sys, "argv", ["train", "r.toml"])
    with pytest.raises(SystemExit, match=str(status)):
        train.main()
    assert len(lines()) == 2 and BESIDE.exists() == is_kept_beside


def test_a_run_of_the_engine_has_it_beside_what_is_documented(lab):
    done = lab.start("-m", "stages.train", lab.file(study="s", run="r", steps=2, log_interval=1))
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert len(printed) >= 2 and [line for line in lines() if line in printed] == printed
    assert {"output.log", "metrics.json", "steps.csv"} <= {path.name for path in RUN.iterdir()}
    assert not BESIDE.exists()
