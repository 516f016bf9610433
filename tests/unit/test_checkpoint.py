"""Resuming: an interrupted run ends bit for bit like one that was not, or it starts anew."""

import shutil
from pathlib import Path

import pytest
import torch
from engine_runs import assert_same_weights, events, ledger, read_json, untimed

from engine import checkpoint
from engine.checkpoint import Checkpoints, fingerprint
from engine.config import resolve
from engine.parallel import Ranks
from engine.side_table import SideTable

CPU = torch.device("cpu")
ONE = Ranks(0, 1, CPU)
PLAN = {
    "steps": 10,
    "checkpoint_interval": 3,
    "log_interval": 2,
    "eval_interval": 4,
    "warmup_steps": 2,
    "activation_norm_layers": [1],
}
VARIANTS = [
    {"dropout": 0.2},
    {
        "dropout": 0.2,
        "optimizer": "sgd",
        "lr": 0.05,
        "attention": "manual",
        "activation_checkpointing": "full",
    },
    {"optimizer": "adam", "norm_placement": "post", "micro_batch_size": 2, "tie_embeddings": False},
]


def outcome(run: Path) -> tuple:
    """Everything a run computed: its rows without timings, its evaluations, its weights."""
    return untimed(run / "steps.csv"), untimed(run / "evals.csv"), (run / "model.safetensors").read_bytes()


def saved() -> list[Path]:
    """The checkpoints on disk, oldest first, of every run."""
    return sorted(path for path in checkpoint.root().glob("*/*") if path.is_dir())


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- an interrupted run


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
@pytest.mark.parametrize("at", [5, 7])
def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(lab, interrupt, variant, at):
    whole = lab.train(**PLAN, **variant)
    expected, drawn = outcome(whole), read_json(whole / "metrics.json")["data_order_sha256"]
    run = interrupt(at, **PLAN, **variant)
    assert not (run / "metrics.json").exists() and not (run / "model.safetensors").exists()
    again = lab.train(**PLAN, **variant)
    assert outcome(again) == expected
    assert events(again) == [{"event": "resumed", "step": 3 * (at // 3)}]
    metrics = read_json(again / "metrics.json")
    assert (metrics["steps"], metrics["data_order_sha256"]) == (10, drawn)
    assert all(line["agrees"] for line in ledger(again).values())


def test_every_table_beside_the_steps_is_there_again_after_a_restart():
    beside = {table.FILE for table in SideTable.__subclasses__()}
    assert beside == {"noise_scale.csv", "sparsity.csv", "attention.csv"} and beside <= set(checkpoint.ROWS)


def test_a_run_may_be_interrupted_twice(lab, interrupt):
    settings = {**PLAN, "dropout": 0.1}
    expected = outcome(lab.train(**settings))
    interrupt(4, **settings)
    interrupt(8, **settings)
    again = lab.train(**settings)
    assert outcome(again) == expected
    assert [event["step"] for event in events(again)] == [3, 6]


def test_before_the_first_checkpoint_a_run_starts_anew(lab, interrupt):
    expected = outcome(lab.train(**PLAN))
    interrupt(2, **PLAN)
    again = lab.train(**PLAN)
    assert outcome(again) == expected and events(again) == []


def test_a_run_without_checkpoints_starts_anew(lab, interrupt):
    settings = {**PLAN, "checkpoint_interval": 0}
    expected = outcome(lab.train(**settings))
    interrupt(8, **settings)
    assert saved() == []
    assert outcome(lab.train(**settings)) == expected


def test_a_run_stopped_after_its_last_step_still_ends_complete(lab, monkeypatch):
    settings = {**PLAN, "steps": 9}  # the last checkpoint would fall on the last step
    expected = outcome(lab.train(**settings))
    with monkeypatch.context() as patched:
        patched.setattr("engine.parallel.full_weights", lambda _: {}["stopped"])
        with pytest.raises(KeyError, match="stopped"):
            lab.train(**settings)
    again = lab.train(**settings)
    assert outcome(again) == expected
    assert ledger(again)["batch_size"]["agrees"] and read_json(again / "metrics.json")["activation_mib"] > 0


# --- what is kept


def test_the_newest_two_are_kept_and_none_when_the_run_is_complete(lab, interrupt):
    settings = {**PLAN, "checkpoint_interval": 2}
    interrupt(7, **settings)
    assert [path.name for path in saved()] == ["step-00000004", "step-00000006"]
    lab.train(**settings)
    assert saved() == []


def test_checkpoints_are_outside_the_results(lab, interrupt):
    interrupt(7, **PLAN)
    assert all(lab.directory / "checkpoints" in path.parents for path in saved())
    assert not list(lab.directory.glob("results/**/*step-*"))


def test_checkpoints_go_to_the_users_cache_unless_told(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PLUMBLINE_CHECKPOINTS", raising=False)
    assert checkpoint.root() == tmp_path / "plumbline" / "checkpoints"
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", "elsewhere")
    assert checkpoint.root() == Path("elsewhere")


# --- damage


@pytest.mark.parametrize("pattern", ["*.distcp", "rank-0.pt", "steps.csv", ".metadata"])
def test_a_flipped_byte_is_found_and_named_and_the_older_checkpoint_is_used(lab, interrupt, pattern):
    settings = {**PLAN, "dropout": 0.1}
    expected = outcome(lab.train(**settings))
    interrupt(8, **settings)
    (damaged,) = saved()[-1].glob(pattern)
    flip_a_byte(damaged)
    again = lab.train(**settings)
    assert outcome(again) == expected
    found, resumed = events(again)
    assert (found["event"], found["checkpoint"]) == ("damaged_checkpoint", "step-00000006")
    assert found["problem"] == f"{damaged.name} is not what was written (sha256 differs)"
    assert resumed == {"event": "resumed", "step": 3}


def test_missing_files_are_damage_too(lab, interrupt):
    expected = outcome(lab.train(**PLAN))
    interrupt(8, **PLAN)
    older, newer = saved()
    (newer / "manifest.json").unlink()
    (older / "evals.csv").unlink()
    again = lab.train(**PLAN)
    assert outcome(again) == expected
    first, second = events(again)
    assert first["checkpoint"] == "step-00000006" and first["problem"].startswith("manifest.json: ")
    assert second["checkpoint"] == "step-00000003" and second["problem"] == "evals.csv is missing"


def test_a_checkpoint_that_was_never_finished_is_not_one(lab, interrupt):
    expected = outcome(lab.train(**PLAN))
    interrupt(7, **PLAN)
    newest = saved()[-1]
    shutil.copytree(newest, newest.with_name("step-00000009.partial"))
    again = lab.train(**PLAN)
    assert outcome(again) == expected and events(again) == [{"event": "resumed", "step": 6}]


# --- which run a checkpoint belongs to


@pytest.mark.parametrize(
    "changes", [{"lr": 2e-3}, {"seed": 2}, {"steps": 11}, {"dropout": 0.1}, {"eval_tokens": 99}]
)
def test_a_changed_setting_starts_anew(lab, interrupt, changes):
    expected = outcome(lab.train(**{**PLAN, **changes}))
    interrupt(7, **PLAN)
    again = lab.train(**{**PLAN, **changes})
    assert events(again) == [] and outcome(again) == expected
    assert len(saved()) == 2  # the other run's are left alone


def test_how_often_progress_is_shown_may_change(lab, interrupt):
    expected = outcome(lab.train(**PLAN))
    interrupt(7, **PLAN)
    again = lab.train(**{**PLAN, "log_interval": 5})
    assert events(again) == [{"event": "resumed", "step": 6}] and outcome(again) == expected


def test_the_fingerprint_knows_all_that_decides_the_numbers(monkeypatch, tmp_path):
    base = resolve({}, "test")
    data = {"train": "a", "validation": "b", "test": "c"}
    found = {
        "base": fingerprint(base, data, ONE),
        "lr": fingerprint(resolve({"lr": 2e-3}, "test"), data, ONE),
        "data": fingerprint(base, {**data, "test": "d"}, ONE),
        "processes": fingerprint(base, data, Ranks(0, 2, CPU)),
        "device": fingerprint(base, data, Ranks(0, 1, torch.device("cuda"))),
    }
    monkeypatch.setattr(torch, "__version__", "0.0")
    found["torch"] = fingerprint(base, data, ONE)
    monkeypatch.undo()
    engine = tmp_path / "engine"
    shutil.copytree(Path(checkpoint.__file__).parent, engine, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(checkpoint, "__file__", str(engine / "checkpoint.py"))
    assert fingerprint(base, data, ONE) == found["base"]
    with (engine / "models" / "gpt.py").open("a") as file:
        file.write("# changed\n")
    found["code"] = fingerprint(base, data, ONE)
    assert len(set(found.values())) == len(found)
    assert fingerprint(resolve({"log_interval": 3, "beta1": 0.9}, "test"), data, ONE) == (
        fingerprint(base, data, ONE)
    )


# --- save and load by themselves


@pytest.mark.parametrize(
    "build",
    [lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)],
)
def test_weights_optimizer_and_random_state_come_back_exactly(tmp_path, monkeypatch, build):
    monkeypatch.setenv("PLUMBLINE_CHECKPOINTS", str(tmp_path / "checkpoints"))
    checkpoints = Checkpoints("name", Ranks(0, 1, torch.device("cpu")))

    def fresh(seed):
        torch.manual_seed(seed)
        model = torch.nn.Linear(5, 3)
        return model, build(
            [
                {"params": [model.weight], "weight_decay": 0.1, "name": "decay"},
                {"params": [model.bias], "weight_decay": 0.0, "name": "no_decay"},
            ]
        )

    def advance(model, optimizer):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = fresh(1)
    for _ in range(3):
        advance(model, optimizer)
    checkpoints.save(3, model, optimizer, tmp_path, {})
    advance(model, optimizer)
    other, other_optimizer = fresh(2)
    assert checkpoints.restore(other, other_optimizer, tmp_path, {}) == 3
    advance(other, other_optimizer)
    assert_same_weights(model.state_dict(), other.state_dict())
    assert [g["weight_decay"] for g in other_optimizer.param_groups] == [0.1, 0.0]
    assert checkpoints.restore(*fresh(2), tmp_path, {}) == 3
    checkpoints.discard()
    assert checkpoints.restore(*fresh(2), tmp_path, {}) == 0
