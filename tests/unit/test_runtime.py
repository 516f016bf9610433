"""Threads, cores, allocator, TF32 and garbage: applied in time, refused where they would do nothing, and observed."""

import gc
import json
import os
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from engine_runs import REPOSITORY, ledger

from engine import parallel, runtime
from engine.config import Runtime
from engine.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EXPANDABLE = "expandable_segments:True"
needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores"
)


def in_process(code: str, **environment: str) -> dict:
    """What `code` leaves in `result`, run in a fresh process."""
    program = f"import json, os\nfrom engine import runtime\nfrom engine.config import Runtime\n{code}\n"
    clean = {k: v for k, v in os.environ.items() if k not in runtime.ALLOCATOR_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", program + "print(json.dumps(result))"],
        cwd=REPOSITORY,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def line(what: str, settings: Runtime, collector=None, device=CPU):
    """One line of the ledger."""
    (found,) = (
        x for x in runtime.lines(settings, device, collector or runtime.Collector(0)) if x.what == what
    )
    return found


@pytest.fixture
def environment(monkeypatch):
    """No allocator settings, whatever is around the tests."""
    for name in runtime.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


# --- before torch


@needs_two_cores
def test_threads_and_the_allocator_are_set_before_torch_is_imported():
    result = in_process(
        """
import sys
settings = Runtime(cpu_threads=2, allocator="expandable_segments", deterministic=True)
runtime.before_torch(settings)
early = "torch" in sys.modules
import torch
threads = torch.get_num_threads()
runtime.after_torch(settings, torch.device("cpu"))
lines = runtime.lines(settings, torch.device("cpu"), runtime.Collector(0))
variables = [os.environ[name] for name in ("PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")]
result = [early, threads, variables, {x.what: [x.in_effect, x.agrees] for x in lines}]
""",
        OMP_NUM_THREADS="1",
    )
    early, threads, variables, lines = result
    assert not early and threads == 2 and variables == [EXPANDABLE, ":4096:8"]
    assert lines["deterministic"] == ["True", True]
    assert lines["cpu_threads"] == ["2", True]
    assert lines["allocator"] == ["cpu", False]  # it would have done nothing; `check` refuses it before


def test_what_comes_too_late_is_an_error():
    with pytest.raises(RuntimeError, match="before_torch was called after torch was imported"):
        runtime.before_torch(Runtime(cpu_threads=2))


@pytest.mark.parametrize("name", runtime.ALLOCATOR_VARIABLES)
def test_a_users_own_allocator_is_never_overwritten(environment, name):
    environment.delitem(sys.modules, "torch")  # as early as engine/train.py calls it
    environment.setenv("KINETO_LOG_LEVEL", "6")
    environment.setenv("PYTORCH_ALLOC_CONF", "")  # so that what is written is undone
    environment.setenv(name, "max_split_size_mb:128")
    with pytest.raises(
        ConfigError,
        match=f"allocator = 'expandable_segments', but {name} = 'max_split_size_mb:128' in the env",
    ):
        runtime.before_torch(Runtime(allocator="expandable_segments"))
    assert os.environ[name] == "max_split_size_mb:128"
    environment.setenv(name, EXPANDABLE)  # the same is no conflict
    runtime.before_torch(Runtime(allocator="expandable_segments"))
    assert os.environ["PYTORCH_ALLOC_CONF"] == EXPANDABLE


def test_cores_are_divided_without_rest():
    assert [runtime.share([0, 1, 2, 3, 4, 7, 8], r, 3) for r in range(3)] == [[0, 1], [2, 3], [4, 7, 8]]
    assert runtime.share([5, 6], 0, 1) == [5, 6]
    for cores in range(1, 20):
        for processes in range(1, cores + 1):
            parts = [runtime.share(list(range(cores)), r, processes) for r in range(processes)]
            assert sum(parts, []) == list(range(cores)) and {len(p) for p in parts} <= {
                cores // processes,
                cores // processes + 1,
            }


@needs_two_cores
def test_each_process_is_bound_to_its_own_cores():
    code = "runtime.before_torch(Runtime(cpu_affinity=True)); result = sorted(os.sched_getaffinity(0))"
    own = [in_process(code, LOCAL_WORLD_SIZE="2", LOCAL_RANK=rank) for rank in "01"]
    assert own[0] + own[1] == sorted(os.sched_getaffinity(0)) and own[0] and own[1]


def test_fewer_cores_than_processes_are_an_error():
    result = in_process(
        """
try:
    runtime.before_torch(Runtime(cpu_affinity=True))
except Exception as error:
    result = [type(error).__name__, str(error)]
""",
        LOCAL_WORLD_SIZE="5000",
        LOCAL_RANK="4999",
    )
    assert result[0] == "ConfigError" and "5000 processes on this machine, but only" in result[1]


# --- settings that would do nothing


def test_a_cpu_run_refuses_what_only_a_gpu_has():
    assert runtime.check(Runtime(), "cpu") == []
    assert runtime.check(Runtime(tf32=True, allocator="expandable_segments"), "cpu") == [
        "tf32 = True: would do nothing on a CPU; it needs a GPU",
        "allocator = 'expandable_segments': would do nothing on a CPU; it needs a GPU",
    ]


def test_a_core_binding_without_a_second_process_is_refused(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (problem,) = runtime.check(Runtime(cpu_affinity=True), "cpu")
    assert "would do nothing with one process" in problem
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert runtime.check(Runtime(cpu_affinity=True), "cpu") == []


def test_a_gpu_run_refuses_what_the_environment_or_the_gpu_overrules(environment):
    environment.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    environment.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    environment.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert runtime.check(Runtime(tf32=True), "cuda") == [
        "tf32 = True: NVIDIA T4 has no TF32; it came with Ampere",
        "tf32 = True, but NVIDIA_TF32_OVERRIDE = 0 in the environment forbids it: unset it",
    ]
    assert runtime.check(Runtime(), "cuda") == []
    environment.setenv("PYTORCH_ALLOC_CONF", EXPANDABLE)  # the default was asked for
    (problem,) = runtime.check(Runtime(), "cuda")
    assert problem.startswith(f"allocator = 'default', but PYTORCH_ALLOC_CONF = '{EXPANDABLE}'")
    assert runtime.check(Runtime(), "cpu") == []  # where it does nothing
    assert runtime.check(Runtime(allocator="expandable_segments"), "cuda") == []


# --- after torch


def test_tf32_on_and_off_agree_in_both_of_torchs_switches(precision):
    torch.set_float32_matmul_precision("medium")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wanted, word, switch in [(True, "high", "tf32"), (False, "highest", "ieee")]:
            runtime.after_torch(Runtime(tf32=wanted), CPU)
            assert (
                torch.get_float32_matmul_precision() == word
            )  # the compiler's look: raises when they differ
            assert torch.backends.cuda.matmul.fp32_precision == switch
            assert torch.backends.cuda.matmul.allow_tf32 == wanted
            found = line("tf32", Runtime(tf32=wanted))
            assert found.agrees and found.in_effect == str(wanted) and word in found.how


def test_the_ledger_sees_tf32_switched_behind_its_back(precision):
    runtime.after_torch(Runtime(), CPU)
    torch.set_float32_matmul_precision("high")
    assert not line("tf32", Runtime()).agrees


def test_the_order_of_sums_is_set_and_observed(precision):
    try:
        runtime.after_torch(Runtime(deterministic=True), CPU)
        assert line("deterministic", Runtime(deterministic=True)).agrees
        assert not line("deterministic", Runtime()).agrees
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.zeros(2).put_(torch.zeros(1, dtype=torch.long), torch.ones(1))
    finally:
        runtime.after_torch(Runtime(), CPU)
    assert line("deterministic", Runtime()).agrees and runtime.sums_in_one_order(CPU)


@pytest.mark.parametrize("same", [True, False])
def test_a_gpu_that_sums_in_any_order_is_told(monkeypatch, precision, same):
    runtime.after_torch(Runtime(deterministic=True), CPU)
    monkeypatch.setattr(runtime, "sums_in_one_order", lambda _: same)
    try:
        found = runtime._deterministic(Runtime(deterministic=True), GPU)
    finally:
        runtime.after_torch(Runtime(), CPU)
    assert found.agrees == same and ("was always the same" if same else "differed") in found.how


def test_what_uses_a_finished_model_need_not_be_deterministic(precision):
    runtime.after_torch(Runtime(deterministic=True), CPU, trains=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_product_on_the_cpu_rounds_nothing():
    assert not runtime.rounds_products(CPU)


def test_threads_are_set_and_observed():
    before = torch.get_num_threads()
    try:
        runtime.after_torch(Runtime(cpu_threads=before + 1), CPU)
        assert line("cpu_threads", Runtime(cpu_threads=before + 1)).agrees
        torch.set_num_threads(before)
        assert not line("cpu_threads", Runtime(cpu_threads=before + 1)).agrees
        assert line("cpu_threads", Runtime()).agrees
    finally:
        torch.set_num_threads(before)


def test_the_allocator_in_effect_is_read_from_its_segments(monkeypatch):
    def segments(*expandable):
        monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [{"is_expandable": e} for e in expandable])

    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    segments(True, True)
    found = runtime._allocator(Runtime(allocator="expandable_segments"), GPU)
    assert found.agrees and found.how == "2 of 2 segments are expandable; backend native"
    assert not runtime._allocator(Runtime(), GPU).agrees
    segments(False)  # asked for when CUDA was running already
    assert not runtime._allocator(Runtime(allocator="expandable_segments"), GPU).agrees
    assert runtime._allocator(Runtime(), GPU).agrees


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs core binding")
def test_cores_are_compared_between_the_processes_of_a_machine(monkeypatch):
    settings = Runtime(cpu_affinity=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(parallel, "gathered", lambda mask: torch.cat([mask, mask.roll(1000)]))
    assert line("cpu_affinity", settings).agrees
    monkeypatch.setattr(parallel, "gathered", lambda mask: torch.cat([mask, mask]))  # bound to the same
    cores = len(os.sched_getaffinity(0))
    found = line("cpu_affinity", settings)
    assert not found.agrees and f"{cores} cores belong to more than one" in found.how
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # two machines: the same numbers are other cores
    assert line("cpu_affinity", settings).agrees


def test_cores_are_written_as_ranges():
    assert runtime._ranges([0, 1, 2, 3, 8, 10, 11]) == "0-3,8,10-11"


# --- garbage


class Cycle:
    """Python's reference counts cannot free it."""

    def __init__(self):
        self.self = self


@pytest.fixture
def collecting():
    """Python's own collections at their smallest threshold, and all as before afterwards."""
    thresholds = gc.get_threshold()
    gc.set_threshold(50, 2, 2)
    assert gc.isenabled()
    yield
    gc.set_threshold(*thresholds)
    assert gc.isenabled() and gc.get_freeze_count() == 0


def steps(collector: runtime.Collector, count: int) -> list[list[weakref.ref]]:
    """Take steps that make garbage; references to it, by step."""
    made = []
    with collector:
        for step in range(count):
            garbage = [Cycle() for _ in range(200)]
            made.append([weakref.ref(c) for c in garbage])
            del garbage
            collector.between_steps(step)
            if step == 2 and collector.interval:
                assert any(r() for r in made[2])  # still there: nothing collected it inside the step
    return made


def test_garbage_is_collected_every_so_many_steps_and_never_inside_one(collecting):
    collector = runtime.Collector(3)
    made = steps(collector, 8)  # after steps 3 and 6
    assert (collector.steps, collector.own, collector.automatic, collector.others) == (7, 2, 0, 0)
    assert not any(r() for step in made[:7] for r in step)
    found = line("gc_interval", Runtime(gc_interval=3), collector)
    assert found.agrees and found.in_effect == "2 between steps, 0 inside"


def test_interval_0_leaves_python_alone(collecting):
    collector = runtime.Collector(0)
    steps(collector, 8)
    assert collector.own == 0 and collector.automatic > 5
    assert line("gc_interval", Runtime(gc_interval=0), collector).agrees


def test_the_ledger_sees_collections_that_someone_switched_on_again(collecting):
    collector = runtime.Collector(3)
    with collector:
        for step in range(4):
            if step == 2:
                gc.enable()
            for _ in range(200):
                Cycle()
            collector.between_steps(step)
    assert collector.automatic > 0
    assert not line("gc_interval", Runtime(gc_interval=3), collector).agrees


def test_collections_that_a_library_asks_for_are_counted_apart(collecting):
    collector = runtime.Collector(100)
    with collector:
        for step in range(3):
            if step == 1:
                gc.collect()
            collector.between_steps(step)
    assert (collector.automatic, collector.others) == (0, 1)
    assert line("gc_interval", Runtime(), collector).agrees


def test_everything_is_as_before_when_a_step_fails(collecting):
    with pytest.raises(InterruptedError, match="^$"), runtime.Collector(1) as collector:
        collector.between_steps(0)
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        raise InterruptedError
    assert gc.isenabled() and gc.get_freeze_count() == 0 and collector._count not in gc.callbacks


def test_what_was_off_before_stays_off():
    gc.disable()
    try:
        with runtime.Collector(1) as collector:
            collector.between_steps(0)
        assert not gc.isenabled()
    finally:
        gc.enable()


# --- the engine


@pytest.mark.slow
@needs_two_cores
def test_a_run_of_two_processes_has_it_all_in_its_ledger(lab):
    settings = {"cpu_affinity": True, "cpu_threads": 1, "gc_interval": 2, "steps": 6}
    entries = ledger(lab.launch(processes=2, **settings))
    for what in ("tf32", "allocator", "cpu_threads", "cpu_affinity", "gc_interval"):
        assert entries[what]["agrees"], entries[what]
    assert entries["cpu_affinity"]["in_effect"] == f"cores {sorted(os.sched_getaffinity(0))[0]}"
    assert entries["gc_interval"]["in_effect"] == "2 between steps, 0 inside"


def test_a_run_refuses_settings_that_would_do_nothing_on_its_device(lab):
    with pytest.raises(ConfigError, match="tf32 = true: would do nothing with device = 'cpu'"):
        lab.train(tf32=True)
