"""Forks training runs from one process that has imported torch and never touched a GPU: a start takes no seconds.

    fork_server.py      a run a line on stdin, and an answer a line on stdout: for ForkServer, below

What torch reads when it is imported (engine/runtime.py, and the environment) is the same for all forks: a run that
needs it otherwise is refused here, and must be a process of its own.
"""

import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import traceback
from pathlib import Path

# No compile workers before a fork, which would be lost in it; and a look for GPUs that touches none.
SETTINGS = {"TORCH_WARM_POOL": "0", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "KINETO_LOG_LEVEL": "6"}
OF_A_TEST = ("PLUMBLINE_CHECKPOINTS", "PYTEST_CURRENT_TEST")  # torch reads none of them
BY_TORCH = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # which sets them when it compiles
OUTPUT = ("stdout.txt", "stderr.txt")  # of a run, in its directory
STARTS, RUNS = 120, 240  # seconds that an answer may take


class ForkServer:
    """The process, and a count of what it was asked for; a context, after which it has ended.

    problem: why it cannot fork runs, or ''. forked, refused: runs that it trained, and that it would not.
    """

    def __init__(self, environment: dict[str, str]):
        """environment: what all its runs have, apart from OF_A_TEST."""
        self.forked = self.refused = 0
        self._shared = _shared(environment)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment | SETTINGS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.problem = self._answer(STARTS)["problem"]

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()  # it reads to the end
        self._process.stdout.close()
        self._process.wait(STARTS)

    def train(self, config, file: str, directory: Path, environment: dict[str, str]):
        """`python -m engine.train FILE` in `directory`, as subprocess.run returns it; None if it is refused."""
        r = config.runtime
        before_torch = r.allocator != "default" or r.deterministic or r.cpu_threads or r.cpu_affinity
        if self.problem or before_torch or _shared(environment) != self._shared:
            self.refused += 1
            return None
        own = {name: environment[name] for name in OF_A_TEST if name in environment}
        asked = {"file": file, "directory": str(directory), "own": own}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        status = self._answer(RUNS).get("status")
        assert status is not None, self.problem
        self.forked += 1
        said = [(directory / name).read_text(encoding="utf-8") for name in OUTPUT]
        return subprocess.CompletedProcess(["engine.train", file], status, *said)

    def _answer(self, seconds: float) -> dict:
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if ready.select(seconds) else ""
        if line:
            return json.loads(line)
        os.killpg(self._process.pid, signal.SIGKILL)  # and the run that it waits for
        self.problem = f"the fork server ended, or gave no answer for {seconds} s"
        return {"problem": self.problem}


def _shared(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in OF_A_TEST + BY_TORCH}


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints
    # What a run imports late, so that no child has to.
    import safetensors.torch  # noqa: F401
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401

    import engine.models.gpt
    import engine.optimizers.adamw
    import engine.trainer  # noqa: F401

    gc.freeze()  # what is imported is nobody's garbage, and a child that looks through it copies it
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        import torch._inductor.compile_fx  # noqa: F401
    fails = on_gpu and _in_a_fork(lambda: int(torch.ones(4, device="cuda").sum().item() != 4))  # noqa: PLR2004
    print(json.dumps({"problem": "a fork cannot use the GPU" if fails else ""}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"status": _in_a_fork(lambda asked=asked: _train(**asked))}), file=answers)


def _in_a_fork(call) -> int:
    """What `call` returns as its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        status = call()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _train(file: str, directory: str, own: dict[str, str]) -> int:
    os.chdir(directory)
    os.environ.update(own)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(OUTPUT, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    from engine import runtime, train

    runtime.before_torch = lambda _: None  # it would do nothing, and cannot be called any more
    sys.argv = ["engine.train", file]
    try:
        train.main()
    except SystemExit as end:
        return end.code or 0
    return 0


if __name__ == "__main__":
    serve()
