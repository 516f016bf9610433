"""What holds for the whole process: threads, cores, the allocator, TF32, Python's garbage; and what is in effect.

Torch reads some of it when it is imported, so nothing here imports torch before `after_torch`. It must not decide
anything from the hardware: a setting that would do nothing here is a problem that `check` names.
"""

import gc
import os
import sys

from engine.config import Runtime
from engine.errors import ConfigError
from engine.ledger import Line

# torch 2.11 and 2.13 read both; the old name wins. So both must say what was asked for.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"
# Without it cuBLAS may split a product as it likes from call to call; torch refuses to be deterministic then.
WORKSPACE_VARIABLE, WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SUMS = 8
MOST_CORES = 4096  # of one machine, for comparing the cores of several processes


def before_torch(settings: Runtime) -> None:
    """Apply what torch reads when it is imported: the allocator, and the threads and cores of CPU operations.

    A thread count in the environment gives way to `cpu_threads`: torchrun sets one by itself. An allocator there is
    the user's own: raises ConfigError if it differs, and if there are fewer cores than processes.
    """
    if "torch" in sys.modules:
        raise RuntimeError("before_torch was called after torch was imported: its settings would do nothing")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler tells stderr when it starts and stops
    if settings.allocator == "expandable_segments":
        if problems := _allocator_problems(settings):
            raise ConfigError(problems)
        os.environ["PYTORCH_ALLOC_CONF"] = EXPANDABLE
    if settings.deterministic:
        os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACE)  # a user's own is torch's to judge
    if settings.cpu_threads:
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(settings.cpu_threads)))
    if settings.cpu_affinity:
        _bind(int(os.environ.get("LOCAL_RANK", "0")), _local_processes())


def after_torch(settings: Runtime, device, *, trains: bool = True) -> None:
    """Apply what torch has functions for. `device` is the run's torch.device.

    trains: False for what uses a finished model. It need not be the same bit for bit, and called no before_torch.

    set_float32_matmul_precision is the one call that keeps torch's old and new TF32 switches in agreement; setting
    either by itself makes the compiler's look at the other an error (torch 2.11 and 2.13).
    """
    import torch

    torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    torch.use_deterministic_algorithms(settings.deterministic and trains)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any
    if settings.cpu_threads:
        torch.set_num_threads(settings.cpu_threads)


def check(settings: Runtime, device_type: str) -> list[str]:
    """Problems that show once the device is known: settings that would do nothing on it, or be overruled."""
    problems = []
    if device_type == "cuda":
        problems += _tf32_problems(settings)
        problems += _allocator_problems(settings)
    else:
        if settings.tf32:
            problems.append("tf32 = True: would do nothing on a CPU; it needs a GPU")
        if settings.allocator != "default":
            problems.append(f"allocator = {settings.allocator!r}: would do nothing on a CPU; it needs a GPU")
    if settings.cpu_affinity and _local_processes() == 1:
        problems.append(
            "cpu_affinity = True: would do nothing with one process on a machine, which may use every core"
        )
    return problems


def _tf32_problems(settings: Runtime) -> list[str]:
    import torch

    if not settings.tf32:
        return []
    problems = []
    if torch.cuda.get_device_capability() < (8, 0):
        problems.append(f"tf32 = True: {torch.cuda.get_device_name()} has no TF32; it came with Ampere")
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        problems.append("tf32 = True, but NVIDIA_TF32_OVERRIDE = 0 in the environment forbids it: unset it")
    return problems


def _allocator_problems(settings: Runtime) -> list[str]:
    """Allocator settings in the environment that are not what was asked for."""
    wanted = EXPANDABLE if settings.allocator == "expandable_segments" else ""
    return [
        f"allocator = {settings.allocator!r}, but {name} = {os.environ[name]!r} in the environment: unset it"
        for name in ALLOCATOR_VARIABLES
        if os.environ.get(name, "").strip() not in ("", wanted)
    ]


def _local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _bind(local_rank: int, processes: int) -> None:
    """Keep this process to its own contiguous share of the cores that it may use now."""
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("cpu_affinity = True: this system cannot bind processes to cores; Linux can")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < processes:
        raise ConfigError(
            f"cpu_affinity = True: {processes} processes on this machine, but only {len(cores)} cores for them"
        )
    os.sched_setaffinity(0, share(cores, local_rank, processes))


def share(cores: list[int], rank: int, processes: int) -> list[int]:
    """The cores of `rank`: contiguous, none shared, none left over, and their numbers differ by one at most."""
    return cores[rank * len(cores) // processes : (rank + 1) * len(cores) // processes]


class Collector:
    """Collects Python's garbage between steps, every `interval` of them, and at no other time.

    A context around the training loop. What is alive after the first step stays for the whole run, so it is set
    aside (gc.freeze) and a collection looks at the rest only. interval 0 leaves Python its own times, and counts.
    """

    def __init__(self, interval: int):
        self.interval = interval
        self.steps = 0  # since the first step's end
        self.own = self.automatic = self.others = 0  # collections since then: here, by Python, by a library
        self._first_step: int | None = None
        self._collecting = self._was_enabled = False

    def __enter__(self):
        self._was_enabled = gc.isenabled()
        gc.callbacks.append(self._count)
        return self

    def __exit__(self, *_) -> None:
        gc.callbacks.remove(self._count)
        if self.interval and self._first_step is not None:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()

    def between_steps(self, step: int) -> None:
        """Call it after every step."""
        if self._first_step is None:
            self._start(step)
            return
        self.steps = step - self._first_step
        if self.interval and self.steps % self.interval == 0:
            self._collecting = True
            gc.collect()
            self._collecting = False
            self.own += 1

    def _start(self, step: int) -> None:
        if self.interval:
            gc.disable()
            gc.collect()
            gc.freeze()
        self._first_step = step

    def _count(self, phase: str, _info: dict) -> None:
        if phase == "start" and self._first_step is not None and not self._collecting:
            if gc.isenabled():
                self.automatic += 1
            else:
                self.others += 1


def lines(settings: Runtime, device, collector: Collector) -> list[Line]:
    """What is in effect, from torch's getters, the allocator's segments and the system.

    Every rank must call it: with `cpu_affinity` the ranks compare their cores.
    """
    return [
        _tf32(settings, device),
        _deterministic(settings, device),
        _allocator(settings, device),
        _threads(settings),
        _affinity(settings, device),
        _garbage(collector),
    ]


def _tf32(settings: Runtime, device) -> Line:
    import torch

    precision = torch.get_float32_matmul_precision()
    allowed = precision != "highest"
    how, agrees = f"float32_matmul_precision is {precision}", allowed == settings.tf32
    if device.type == "cuda":
        rounded = rounds_products(device)
        how += f"; a product's inputs were {'rounded' if rounded else 'not rounded'} on the GPU"
        agrees = agrees and rounded == settings.tf32
        allowed = rounded
    return Line("tf32", str(settings.tf32), str(allowed), how, agrees)


def rounds_products(device) -> bool:
    """Whether an fp32 matrix product on `device` rounds its inputs to TF32's 10 bits of mantissa."""
    import torch

    x = torch.full((1024, 1024), 1 + 2.0**-12, device=device)  # fp32 holds it exactly, TF32 makes it 1
    return bool((x @ torch.eye(1024, device=device) != x).any())


def _deterministic(settings: Runtime, device) -> Line:
    import torch

    on = torch.are_deterministic_algorithms_enabled()
    how, agrees = "torch.are_deterministic_algorithms_enabled()", on == settings.deterministic
    if settings.deterministic and device.type == "cuda":
        same = sums_in_one_order(device)
        how += f"; a sum of many numbers, taken {SUMS} times, {'was always the same' if same else 'differed'}"
        agrees = agrees and same
    return Line("deterministic", str(settings.deterministic), str(on), how, agrees)


def sums_in_one_order(device) -> bool:
    """Whether fp32 numbers that are added at the same place have the same sum each time."""
    import torch

    x = torch.linspace(0, 1, 2**20, device=device).sin()
    places = torch.zeros(len(x), dtype=torch.long, device=device)
    sums = [torch.zeros(1, device=device).index_add_(0, places, x) for _ in range(SUMS)]
    return all(torch.equal(one, sums[0]) for one in sums)


def _allocator(settings: Runtime, device) -> Line:
    wanted = settings.allocator
    if device.type != "cuda":
        return Line("allocator", wanted, "cpu", "this run uses no CUDA allocator", wanted == "default")
    import torch

    segments = torch.cuda.memory_snapshot()
    expandable = sum(segment["is_expandable"] for segment in segments)
    in_effect = "expandable_segments" if expandable else "default"
    how = f"{expandable} of {len(segments)} segments are expandable; backend {torch.cuda.get_allocator_backend()}"
    return Line("allocator", wanted, in_effect, how, wanted == in_effect)


def _threads(settings: Runtime) -> Line:
    import torch

    wanted, found = settings.cpu_threads, torch.get_num_threads()
    return Line(
        "cpu_threads",
        str(wanted or "torch's choice"),
        str(found),
        "torch.get_num_threads()",
        wanted in (0, found),
    )


def _affinity(settings: Runtime, device) -> Line:
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    found = f"cores {_ranges(sorted(own))}"
    if not settings.cpu_affinity:
        return Line("cpu_affinity", "False", found, "os.sched_getaffinity", True)
    import torch

    from engine import parallel

    mask = torch.zeros(MOST_CORES, dtype=torch.int32, device=device)
    mask[sorted(own)] = 1
    of_all = parallel.gathered(mask).view(-1, MOST_CORES)  # (processes, cores)
    machines = of_all.split(_local_processes())  # ranks of one machine are consecutive
    shared = sum(int((machine.sum(0) > 1).sum()) for machine in machines)
    how = f"os.sched_getaffinity of every process: {shared} cores belong to more than one of a machine's processes"
    return Line("cpu_affinity", "True", found, how, shared == 0 and len(of_all) > 1)


def _ranges(cores: list[int]) -> str:
    """'0-3,8' for 0, 1, 2, 3, 8."""
    starts = [c for c in cores if c - 1 not in cores]
    ends = [c for c in cores if c + 1 not in cores]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _garbage(collector: Collector) -> Line:
    interval = collector.interval
    return Line(
        "gc_interval",
        f"every {interval} steps" if interval else "Python's own times",
        f"{collector.own} between steps, {collector.automatic} inside" if interval else "Python's own times",
        f"gc.callbacks over {collector.steps} steps after the first: {collector.automatic} automatic collections, "
        f"{collector.others} asked for by libraries",
        not interval or (collector.automatic == 0 and collector.own == collector.steps // interval),
    )
