"""Out of memory: told apart from other errors, limited on a CPU, and answered by a ladder that leaves its marks."""

import gc
import weakref

import pytest
import torch
from engine_runs import column, events, ledger, read_json

from engine import ladder
from engine.config import resolve
from engine.errors import ConfigError


def config(**values):
    return resolve({"device": "cpu", **values}, "test")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
    ],
    ids=str,
)
def test_every_device_and_library_is_understood(error):
    assert ladder.is_out_of_memory(error)
    outer = RuntimeError("backend='inductor' raised")
    outer.__cause__ = error
    assert ladder.is_out_of_memory(outer)


def test_a_real_allocation_that_cannot_be_had():
    with pytest.raises(RuntimeError, match="allocate") as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ladder.is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),  # not an allocator's
        ConfigError("batch_size = 3: must be even"),
    ],
    ids=str,
)
def test_other_errors_are_other_errors(error):
    assert not ladder.is_out_of_memory(error)


def test_an_error_after_a_handled_one_is_not_out_of_memory():
    """`raise` inside `except` sets the context, not the cause."""
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError:
            raise KeyError("a bug in what handled it")  # noqa: B904
    except KeyError as error:
        assert not ladder.is_out_of_memory(error)


def test_the_limit_on_a_cpu_is_checked_against_the_measured_peak():
    limited = config(memory_limit_gib=0.5).memory
    ladder.check_limit(2**29, limited)
    ladder.check_limit(None, limited)  # the GPU's allocator keeps it
    ladder.check_limit(2**40, config().memory)  # no limit
    with pytest.raises(torch.OutOfMemoryError, match=r"one step took 0\.6 GiB; memory_limit_gib = 0\.5"):
        ladder.check_limit(int(0.6 * 2**30), limited)
    ladder.limit_memory(limited, torch.device("cpu"))


def test_what_cannot_be_done_is_refused_by_name():
    asked = config(on_out_of_memory="ladder")
    assert ladder.check(asked, 1, "cpu") == []
    (problem,) = ladder.check(asked, 4, "cuda")
    assert problem.startswith("on_out_of_memory = 'ladder': one process cannot change what the other 3 do")
    limited = config(memory_limit_gib=1.0, compile="blocks")
    assert ladder.check(limited, 1, "cuda") == []
    (problem,) = ladder.check(limited, 1, "cpu")
    assert "cannot be measured on a CPU" in problem


def test_the_rungs_in_order():
    found = ladder.rungs(config(batch_size=12, compile="blocks"))
    assert found == [
        ("chunked loss", {"loss_kernel": "chunked"}),
        ("full activation checkpointing", {"activation_checkpointing": "full"}),
        ("micro-batch 6", {"micro_batch_size": 6}),
        ("micro-batch 3", {"micro_batch_size": 3}),
        ("micro-batch 1", {"micro_batch_size": 1}),
        ("no compile", {"compile": "none"}),
    ]


def test_a_rung_that_changes_nothing_is_left_out():
    found = ladder.rungs(
        config(batch_size=8, micro_batch_size=2, loss_kernel="chunked", activation_checkpointing="full")
    )
    assert found == [("micro-batch 1", {"micro_batch_size": 1})]


def test_a_step_that_is_one_graph_has_no_rung_that_it_cannot_hold():
    found = ladder.rungs(config(batch_size=2, step_graph=True, device="auto"))
    assert [name for name, _ in found] == ["chunked loss", "micro-batch 1"]


@pytest.mark.parametrize(
    ("values", "changes", "default_again"),
    [
        (
            {"activation_checkpointing": "every_n", "checkpoint_every": 4},
            {"activation_checkpointing": "full"},
            {"checkpoint_every": 2},
        ),
        (
            {"activation_checkpointing": "budget", "memory_budget": 0.3, "compile": "blocks"},
            {"activation_checkpointing": "full"},
            {"memory_budget": 0.5},
        ),
        ({"compile": "model", "compile_dynamic": True}, {"compile": "none"}, {"compile_dynamic": False}),
    ],
)
def test_settings_that_lose_their_effect_are_dropped(values, changes, default_again):
    asked = {"batch_size": 6, "lr": 2e-3}
    assert ladder.changed(config(**asked, **values), changes) == config(
        **asked, **{k: v for k, v in (values | changes).items() if k not in default_again}
    )


class Fake:
    """A `train` that needs memory by its settings, and has `memory` of it."""

    def __init__(self, memory: int):
        self.memory, self.tried, self.died = memory, [], []

    def __call__(self, config, events):
        micro = config.training.micro_batch_size or config.training.batch_size
        chunked = config.training.loss_kernel == "chunked"
        full = config.memory.activation_checkpointing == "full"
        needed = micro * (10 if full else 20) + (0 if chunked else 50)
        self.tried.append(needed)
        assert config.training.batch_size == 16 and config.optimizer.lr == 1e-3
        tensor = torch.zeros(3)  # belongs to this attempt
        weakref.finalize(tensor, self.died.append, len(self.tried))
        self.events = events
        if needed > self.memory:
            raise torch.OutOfMemoryError(f"needed {needed}\nmore lines")


def test_the_ladder_goes_down_until_it_fits():
    fake, asked = Fake(memory=50), config(batch_size=16, on_out_of_memory="ladder")
    ladder.run_with_ladder(asked, fake)
    assert fake.tried == [370, 320, 160, 80, 40]
    assert fake.events == [
        {
            "event": "out_of_memory",
            "rung": "chunked loss",
            "changed": {"loss_kernel": ["full", "chunked"]},
            "message": "needed 370",
        },
        {
            "event": "out_of_memory",
            "rung": "full activation checkpointing",
            "changed": {"activation_checkpointing": ["none", "full"]},
            "message": "needed 320",
        },
        {
            "event": "out_of_memory",
            "rung": "micro-batch 8",
            "changed": {"micro_batch_size": [0, 8]},
            "message": "needed 160",
        },
        {
            "event": "out_of_memory",
            "rung": "micro-batch 4",
            "changed": {"micro_batch_size": [8, 4]},
            "message": "needed 80",
        },
    ]


def test_a_failed_attempt_is_freed_before_the_next():
    fake = Fake(memory=50)
    gc.collect()
    gc.disable()
    try:
        ladder.run_with_ladder(config(batch_size=16, on_out_of_memory="ladder"), fake)
    finally:
        gc.enable()
    assert fake.died[:4] == [1, 2, 3, 4]


def test_what_fits_at_once_leaves_no_event():
    fake = Fake(memory=1000)
    ladder.run_with_ladder(config(batch_size=16, on_out_of_memory="ladder"), fake)
    assert fake.tried == [370] and fake.events == [] == ladder.lines(fake.events)


def test_when_nothing_is_left_all_that_was_tried_is_named():
    fake = Fake(memory=5)
    tried = "chunked loss, full activation checkpointing, micro-batch 8, micro-batch 4, micro-batch 2, micro-batch 1"
    with pytest.raises(torch.OutOfMemoryError, match=f"^nothing is left to try after: {tried}; needed 10$"):
        ladder.run_with_ladder(config(batch_size=16, on_out_of_memory="ladder"), fake)
    assert fake.tried == [370, 320, 160, 80, 40, 20, 10]


def test_without_the_ladder_the_first_error_is_the_last():
    fake = Fake(memory=50)
    with pytest.raises(torch.OutOfMemoryError, match="needed 370"):
        ladder.run_with_ladder(config(batch_size=16), fake)
    assert fake.tried == [370]


def test_other_errors_pass_through_the_ladder():
    def train(config, events):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        ladder.run_with_ladder(config(on_out_of_memory="ladder"), train)


def test_the_ledger_shows_each_changed_setting_once():
    fake = Fake(memory=50)
    ladder.run_with_ladder(config(batch_size=16, on_out_of_memory="ladder"), fake)
    found = {line.what: line for line in ladder.lines(fake.events)}
    assert list(found) == [
        "loss_kernel, as first asked",
        "activation_checkpointing, as first asked",
        "micro_batch_size, as first asked",
    ]
    micro = found["micro_batch_size, as first asked"]
    assert (micro.requested, micro.in_effect, micro.agrees) == ("0", "4", False)
    assert micro.how == "out of memory at 0: needed 160; then out of memory at 8: needed 80"


def test_a_real_run_takes_two_rungs(lab):
    """On a CPU, with a limit between what full checkpointing and what half the micro-batch take."""
    settings = {"layers": 4, "width": 64, "context": 64, "batch_size": 8, "steps": 4}
    chunked = {"loss_kernel": "chunked", "loss_chunk_tokens": 64}
    peaks = [
        read_json(lab.train(**settings, **changes) / "metrics.json")["peak_memory_gib"]
        for changes in ({}, chunked | {"activation_checkpointing": "full"})
    ]
    plain = column(lab.train(**settings, **chunked), "train_loss")
    limit = (peaks[0] + 3 * peaks[1]) / 4
    run = lab.train(**settings, memory_limit_gib=limit, on_out_of_memory="ladder")
    assert [event["rung"] for event in events(run)] == ["chunked loss", "full activation checkpointing"]
    assert all(event["event"] == "out_of_memory" and event["message"] for event in events(run))
    differing = {what: line["in_effect"] for what, line in ledger(run).items() if not line["agrees"]}
    assert differing == {
        "loss_kernel, as first asked": "chunked",
        "activation_checkpointing, as first asked": "full",
    }
    assert read_json(run / "metrics.json")["peak_memory_gib"] <= limit
    assert column(run, "train_loss") == pytest.approx(plain, rel=1e-5)


def test_a_real_run_stops_without_the_ladder(lab):
    with pytest.raises(torch.OutOfMemoryError, match=r"memory_limit_gib = 1e-05"):
        lab.train(memory_limit_gib=1e-5)


@pytest.mark.slow
def test_the_command_says_so_in_one_line_and_by_its_exit_status(lab):
    done = lab.start("-m", "engine.train", lab.file(memory_limit_gib=1e-5))
    assert done.returncode == 3
    assert done.stderr.strip().splitlines()[-1].startswith("out of memory: one step took ")
    assert "Traceback" not in done.stderr


def test_the_ladder_leaves_fused_attention_compiled():
    """Uncompiled, the reciprocal term has its scores written out: more memory, not less; and flex is then refused."""
    settings = {"attention_form": "latent", "attention": "flex", "reciprocal_alpha": 0.5, "precision": "bf16"}
    config = resolve(settings | {"compile": "model", "batch_size": 2}, "test")
    assert [name for name, _ in ladder.rungs(config)] == [
        "chunked loss",
        "full activation checkpointing",
        "micro-batch 1",
    ]
