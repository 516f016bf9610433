"""Where a step's time goes: traced only when asked for, and divided so that the parts add up."""

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from engine_runs import REPOSITORY, ledger, read_json

from engine import timeline
from engine.config import Runtime
from engine.profiling import END_OF_STEP, Profiler, part
from engine.timeline import PARTS, clip, contains, length, split, subtract, union

CAN_COMPILE = (
    shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()
)
SLEEPS = {"data": 0.010, "forward": 0.020, "backward": 0.040, "optimizer": 0.005}
OUTSIDE, EVALUATION = 0.003, 0.4


def loop(directory: Path, *, steps: int, wanted: int, first_step: int = 1, active: bool = True) -> Profiler:
    """A training loop of known durations, with an evaluation after every step."""
    a = torch.ones(64, 64)
    settings = Runtime(profile_steps=wanted)
    with Profiler(settings, directory, first_step=first_step, active=active) as profiler:
        for step in range(steps):
            for name, seconds in SLEEPS.items():
                with part(name):
                    time.sleep(seconds)
                    if name == "forward":
                        a @ a
            time.sleep(OUTSIDE)
            worked = profiler.step(step)
            assert worked == (
                wanted > 0 and active and step in (first_step - 1, first_step, first_step + wanted)
            )
            if step > first_step:
                time.sleep(EVALUATION)
    return profiler


# --- tracing


def test_the_parts_of_a_loop_are_measured_and_add_up(tmp_path):
    profiler = loop(tmp_path, steps=5, wanted=2)
    found = read_json(tmp_path / "profile.json")
    assert (found["first_step"], found["steps"], found["device"]) == (2, 2, "cpu")
    assert list(found["parts_ms"]) == list(PARTS)
    for name, seconds in SLEEPS.items():  # a busy machine sleeps longer
        assert 1000 * seconds <= found["parts_ms"][name] < 1000 * (seconds + 0.2)
    assert found["parts_ms"]["other"] >= 1000 * OUTSIDE
    assert found["parts_ms"]["communication"] == found["parts_ms"]["idle"] == 0
    assert sum(found["parts_ms"].values()) == pytest.approx(found["step_ms"], rel=1e-9)
    assert found["step_ms"] < 1000 * EVALUATION  # what is between steps is no part of one
    assert found["operations"][0]["ms"] > 0
    (product,) = (o for o in found["operations"] if o["name"] == "aten::mm")
    assert product["calls"] == 1
    (line,) = profiler.lines()
    assert line.agrees and (line.requested, line.in_effect) == ("2", "2")


def test_the_trace_is_what_chrome_reads(tmp_path):
    loop(tmp_path, steps=3, wanted=1)
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        names = [e["name"] for e in json.load(file)["traceEvents"] if e["ph"] == "X"]
    for name in SLEEPS:
        assert names.count(f"plumbline/{name}") == 1
    assert "aten::mm" in names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["profile.json", "trace.json.gz"]


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path):
    profiler = loop(tmp_path, steps=3, wanted=5)
    assert read_json(tmp_path / "profile.json")["steps"] == 1
    (line,) = profiler.lines()
    assert not line.agrees and line.in_effect == "1"


@pytest.mark.parametrize("steps", [1, 2])  # ready, and started
def test_a_run_that_ends_before_the_first_traced_step_leaves_nothing(tmp_path, steps):
    profiler = loop(tmp_path, steps=steps, wanted=1)
    assert not list(tmp_path.iterdir()) and not profiler.lines()[0].agrees
    assert part("forward") is part("backward")
    loop(tmp_path, steps=3, wanted=1)  # and torch's profiler can be started again
    assert (tmp_path / "profile.json").exists()


def test_a_failing_run_leaves_nothing_and_no_profiler(tmp_path):
    with (
        pytest.raises(InterruptedError, match="^$"),
        Profiler(Runtime(profile_steps=3), tmp_path, first_step=0) as profiler,
    ):
        for step in (-1, 0, 1):
            profiler.step(step)
        raise InterruptedError
    assert not list(tmp_path.iterdir()) and part("forward") is part("backward")


@pytest.mark.parametrize("settings", [{"wanted": 0}, {"wanted": 2, "active": False}])
def test_without_being_asked_nothing_is_traced(tmp_path, settings):
    profiler = loop(tmp_path, steps=3, **settings)
    assert not list(tmp_path.iterdir()) and profiler.lines() == []


def test_off_it_costs_nothing_and_loads_nothing():
    assert part("forward") is part("optimizer")  # one empty context for all
    code = "import engine.profiling as p, sys\nwith p.part('data'): pass\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "engine.timeline"} & set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs a C++ compiler and Python.h")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_code_is_not_compiled_again_for_the_trace(tmp_path):
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    model = torch.compile(torch.nn.Linear(8, 8), fullgraph=True)
    with Profiler(Runtime(profile_steps=2), tmp_path, first_step=1) as profiler:
        for step in range(5):
            with part("forward"):
                loss = model(torch.ones(2, 8)).sum()
            with part("backward"):
                loss.backward()
            profiler.step(step)
    assert graphs["unique_graphs"] == before + 1
    found = read_json(tmp_path / "profile.json")
    assert found["steps"] == 2 and found["parts_ms"]["forward"] > 0 and found["parts_ms"]["backward"] > 0
    assert any(o["name"].startswith(timeline.GRAPH) for o in found["operations"])


def test_a_run_divides_its_steps(lab):
    run = lab.train(profile_steps=2, steps=7)
    found = read_json(run / "profile.json")
    assert (found["first_step"], found["steps"]) == (4, 2)
    for name in ("data", "forward", "backward", "optimizer"):
        assert found["parts_ms"][name] > 0
    assert sum(found["parts_ms"].values()) == pytest.approx(found["step_ms"], rel=1e-9)
    assert len(found["operations"]) == timeline.TOP
    times = [o["ms"] for o in found["operations"]]
    assert times == sorted(times, reverse=True)
    assert ledger(run)["profile_steps"]["agrees"]


# --- dividing, by hand (microseconds)


def event(
    cat: str, name: str, start: float, end: float, *, tid: int = 1, correlation: int | None = None
) -> dict:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid, "args": args}


def marked(name: str, start: float, end: float) -> dict:
    return event("user_annotation", name if name == END_OF_STEP else f"plumbline/{name}", start, end)


def launch(number: int, time: float, name: str, start: float, end: float, cat: str = "kernel") -> list[dict]:
    """A kernel that runs from start to end, launched by the host at `time`, from any thread."""
    return [
        event("cuda_runtime", "cudaLaunchKernel", time, time + 1, tid=9, correlation=number),
        event(cat, name, start, end, tid=7, correlation=number),
    ]


def test_a_gpus_step_is_divided_by_where_its_kernels_were_launched():
    events = [
        marked("data", 0, 10),
        marked("forward", 10, 20),
        marked("backward", 20, 30),
        marked("optimizer", 30, 40),
        marked(END_OF_STEP, 50, 51),
        *launch(1, 5, "Memcpy HtoD", 10, 15, "gpu_memcpy"),  # data
        *launch(2, 12, "gemm", 20, 120),  # forward, long after its launch
        *launch(3, 22, "gemm", 120, 220),  # backward
        *launch(4, 25, "ncclDevKernel_AllReduce", 200, 260),  # 20 hidden by backward, 40 not
        *launch(5, 32, "adamw", 260, 300),
        *launch(6, 45, "sum", 300, 310),  # outside every part
        # Evaluation: in no step. Its last kernel ends at 500.
        *launch(7, 400, "gemm", 410, 500),
        # The second step: the host waited for data until 600 and the device for it; it ends at 700.
        marked("data", 450, 600),
        marked("forward", 600, 610),
        marked(END_OF_STEP, 640, 641),
        *launch(8, 605, "gemm", 620, 700),
        # A kernel that was launched before the trace began belongs to no step.
        event("kernel", "gemm", -50, 4, tid=7, correlation=99),
        event("gpu_user_annotation", "plumbline/forward", 20, 120, tid=7),
    ]
    found = split(events)
    # Step 1 from 0 to 310: idle 0–20 less the copy at 10–15; data waited until 10.
    # Step 2 from 500 to 700: data waited until 600, then idle until 620.
    parts = {
        "data": 5 + 10 + 100,
        "forward": 100 + 80,
        "backward": 100,
        "optimizer": 40,
        "communication": 40,
        "other": 10,
        "idle": 5 + 20,
    }
    assert found["parts_ms"] == pytest.approx({k: v / 2 / 1000 for k, v in parts.items()})
    assert found["step_ms"] == pytest.approx((310 + 200) / 2 / 1000)
    assert sum(found["parts_ms"].values()) == pytest.approx(found["step_ms"])
    assert found["communication_overlapped_ms"] == pytest.approx(20 / 2 / 1000)
    assert (found["steps"], found["device"]) == (2, "cuda")
    assert found["operations"][0] == {"name": "gemm", "ms": pytest.approx(280 / 2 / 1000), "calls": 1.5}
    assert {o["name"] for o in found["operations"]} == {
        *("gemm", "ncclDevKernel_AllReduce", "adamw", "sum", "Memcpy HtoD")
    }


def test_the_kernels_of_a_graph_belong_to_its_launch_and_streams_count_once():
    events = [
        marked("forward", 0, 10),
        marked(END_OF_STEP, 20, 21),
        *launch(1, 5, "a", 10, 30),
        event("kernel", "b", 20, 50, tid=8, correlation=1),  # on another stream, at the same time
    ]
    found = split(events)
    assert found["parts_ms"]["forward"] == pytest.approx(0.040)
    assert found["parts_ms"]["idle"] == pytest.approx(0.010) and found["step_ms"] == pytest.approx(0.050)


def test_on_a_cpu_communication_is_what_computing_does_not_hide():
    events = [
        marked("forward", 0, 100),
        event("cpu_op", "aten::addmm", 10, 90),
        event("cpu_op", "aten::mm", 20, 60),
        marked("backward", 100, 300),
        event("cpu_op", "aten::mm", 110, 200),
        event("user_annotation", "gloo:all_reduce", 150, 260, tid=5),  # 50 hidden, 60 waited for
        event("cpu_op", "aten::copy_", 150, 260, tid=6),  # not what the loop waits for
        marked("optimizer", 300, 310),
        marked(END_OF_STEP, 330, 331),
    ]
    found = split(events)
    parts = {"data": 0, "forward": 100, "backward": 140, "optimizer": 10, "communication": 60, "other": 20}
    assert found["parts_ms"] == pytest.approx({k: v / 1000 for k, v in {**parts, "idle": 0}.items()})
    assert found["communication_overlapped_ms"] == pytest.approx(0.050)
    assert found["operations"] == [
        {"name": "aten::mm", "ms": pytest.approx(0.130), "calls": 2},
        {"name": "aten::copy_", "ms": pytest.approx(0.110), "calls": 1},
        {"name": "aten::addmm", "ms": pytest.approx(0.040), "calls": 1},  # without the product inside
    ]


# --- intervals


def test_intervals_against_sets_of_numbers():
    points = range(7)
    some = [[(a, b) for a, b in itertools.combinations(points, 2)][i::4] for i in range(4)]
    for left, right in itertools.product([*some, [], [(1, 2)], [(0, 1), (3, 4)], [(0, 6)]], repeat=2):
        a, b = union(left), union(right)
        inside = {x for s, e in left for x in range(s, e)}
        taken = {x for s, e in right for x in range(s, e)}
        assert {x for s, e in a for x in range(s, e)} == inside and length(a) == len(inside)
        assert {x for s, e in subtract(a, b) for x in range(s, e)} == inside - taken
        assert all(s < e for s, e in subtract(a, b))
        assert {x for s, e in clip(a, (2, 5)) for x in range(s, e)} == inside & {2, 3, 4}
        assert all(contains(a, x) for x in inside) and not contains(a, 6.5)
    assert union([(3, 4), (0, 1), (1, 2)]) == [(0, 2), (3, 4)]
