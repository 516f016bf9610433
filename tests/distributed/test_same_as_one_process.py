"""Several processes train what one does: how work is divided over them changes no number.

Over gloo on the CPU. All runs are trained by one start of forked.py.
"""

import json
import subprocess
from pathlib import Path

import pytest
from engine_runs import (
    TALKING,
    Lab,
    assert_same_weights,
    column,
    events,
    ledger,
    read_json,
    rows,
    untimed,
    weights,
    write_dialogues,
)

from engine.data.batches import eval_windows
from engine.data.prepare import open_tokens

pytestmark = pytest.mark.slow

FORKED = Path(__file__).with_name("forked.py")
# Clipping acts now and then; a rank has at least two micro-batches; dropout is off, because its random numbers
# belong to a rank. Adam divides by the root of the second moment: with a small epsilon it blows the rounding of
# gradients that are nearly 0 up to the size of a step, and the runs drift apart.
RUN = {
    "steps": 24,
    "batch_size": 8,
    "micro_batch_size": 2,
    "clip_norm": 0.5,
    "epsilon": 1e-4,
    "warmup_steps": 2,
    "eval_interval": 12,
    "eval_batch_size": 4,
    "activation_norm_layers": [0, 1],
    "gradient_norm_layers": [1, 0],
    "pad_vocabulary_to": 4,
}
SHARDED = {"data_parallel": "fsdp"}
HYBRID = {"data_parallel": "hsdp"}
SPLIT = {"tensor_parallel": 2}
WAYS = {  # name: (processes, settings, the ledger's words)
    "ddp": (2, {"activation_checkpointing": "full"}, "ddp over 2 ranks"),
    "fsdp": (2, {**SHARDED, "processes": 2}, "fsdp over 2 ranks"),
    "fsdp_kept": (2, {**SHARDED, "reshard_after_forward": False}, "fsdp over 2 ranks"),
    "fsdp_model": (2, {**SHARDED, "shard_unit": "model"}, "fsdp over 2 ranks"),
    "hsdp": (4, {**HYBRID, "micro_batch_size": 1}, "hsdp, 2 replicas of 2 shards"),
    "tensor": (2, {**SPLIT, "micro_batch_size": 4}, "tensor parallel over 2 ranks"),
    "fsdp_tensor": (
        4,
        {**SHARDED, **SPLIT},
        "fsdp over 2 ranks × tensor parallel over 2 ranks",
    ),
}
# Another model, in which nothing of the first is left, and a loss that never has all logits.
OTHER = {
    "steps": 10,
    "width": 48,
    "tie_embeddings": False,
    "bias": False,
    "norm_placement": "post",
    "positions": "rotary",
    "activation": "swiglu",
    "loss_kernel": "chunked",
    "loss_chunk_tokens": 24,
}
OTHER_WAYS = {"other_tensor": (2, {**SPLIT, "micro_batch_size": 4})}
# Gradients that do not go through autograd are exchanged by hand.
FUSED = {"steps": 10, "precision": "bf16", "loss_kernel": "fused", "gradient_sums": "fused"}
SGD = {"steps": 10, "optimizer": "sgd", "lr": 0.1, "epsilon": 1e-8}  # momentum, and no Adam's epsilon
# Rows with labels, scored in evaluation batches that do not come out even.
CLASSIFIER = {
    "study": "labelled",
    "steps": 10,
    "model": "classifier",
    "dataset": "synthetic",
    "data_dir": "",
    "tokenizer": "frequent_words",
    "vocab_size": 500,
    "validation_rows": 45,
    "norm_placement": "post",
    "pad_vocabulary_to": 1,
}
# Two sums with counts of their own, of which ranks and micro-batches have different numbers of tokens.
DIALOGUES = {**TALKING, "steps": 6, "batch_size": 8, "micro_batch_size": 2, "pad_vocabulary_to": 1}
REDRAWN = {**DIALOGUES, "study": "redrawn", "batch_size": 60, "redraw_candidates": True}  # two steps an epoch
# Interrupted before the last step, and resumed from the checkpoint before.
RESUMED = {
    "resumed_fsdp": (2, SHARDED),
    "resumed_fsdp_tensor": (4, {**SHARDED, **SPLIT}),
}
SHORT = {"steps": 4, "eval_interval": 2, "eval_tokens": 100, "checkpoint_interval": 2}


def plan(lab: Lab) -> list[dict]:
    """The runs for forked.py, each with its TOML file."""

    def run(name: str, processes: int, settings: dict, **how) -> dict:
        lab.file(run=name, **{**RUN, **settings})
        file = (lab.directory / "run.toml").rename(lab.directory / f"{name}.toml")
        return {"name": name, "processes": processes, "file": file.name, **how}

    runs = [run(name, n, settings) for name, (n, settings, _) in WAYS.items()]
    runs += [run("other", 1, OTHER)]
    runs += [run(name, n, {**OTHER, **settings}) for name, (n, settings) in OTHER_WAYS.items()]
    runs += [run("fused", 1, FUSED), run("ddp_fused", 2, FUSED)]
    runs += [run("sgd", 1, SGD), run("sgd_fsdp", 2, {**SGD, **SHARDED})]
    runs += [run("classifier", 1, CLASSIFIER), run("classifier_ddp", 2, CLASSIFIER)]
    runs += [run("classifier_fsdp", 2, {**CLASSIFIER, **SHARDED})]
    write_dialogues(lab.directory / "dialogues")
    runs += [run("dialogues", 1, {**DIALOGUES, "micro_batch_size": 8}), run("dialogues_ddp", 2, DIALOGUES)]
    runs += [run("dialogues_fsdp", 2, {**DIALOGUES, **SHARDED, "shared_context": True})]
    runs += [run("redrawn", 1, REDRAWN), run("redrawn_ddp", 2, REDRAWN)]
    runs += [run("unspread", 2, {"steps": 3}, unspread=True)]
    for name, (n, settings) in RESUMED.items():
        stopped = run(name, n, {**SHORT, **settings}, stop_at=3)
        runs += [run(f"{name}_whole", n, {**SHORT, **settings}), stopped]
        runs += [{"name": f"{name}_again", "processes": n, "file": stopped["file"]}]
    return [run("one", 1, {}), *runs, run("refused", 2, {"batch_size": 6, "processes": 3})]


def forked(lab: Lab, runs: list[dict]) -> subprocess.CompletedProcess:
    (lab.directory / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    return lab.start(str(FORKED), "runs.json")


class Trained:
    """What the runs left."""

    def __init__(self, lab: Lab):
        self.lab, self.done = lab, forked(lab, plan(lab))
        assert self.done.returncode == 0, self.done.stderr
        self.exits = read_json(lab.directory / "exits.json")

    def run(self, name: str, study: str = "by_hand") -> Path:
        """The directory of a run that is complete."""
        assert set(self.exits[name]) == {0}, self.done.stderr
        return self.lab.directory / f"results/{study}/{name}-1"

    def writes(self, name: str, rank: int) -> list[str]:
        return read_json(self.lab.directory / f"writes-{name}-{rank}.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(Lab(tmp_path_factory.mktemp("lab")))


def assert_same_numbers(one: Path, other: Path, rel: float = 1e-5) -> None:
    norms = [f"{what}_norm_{block}" for what in ("activation", "gradient") for block in (0, 1)]
    for name in ("train_loss", "grad_norm", "lr", *norms):
        assert column(other, name) == pytest.approx(column(one, name), rel=rel), name
    assert column(other, "tokens_seen") == column(one, "tokens_seen")
    expected, found = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (found[name] - tensor).norm() / tensor.norm()
        assert difference < rel, (name, difference)


@pytest.mark.parametrize("way", WAYS)
def test_losses_gradient_norms_and_weights_are_those_of_one_process(trained, way):
    one = trained.run("one")
    assert_same_numbers(one, trained.run(way))
    keys = ("data_order_sha256", "evaluation_sha256", "evaluation_precision", "flops")
    expected, found = (read_json(run / "metrics.json") for run in (one, trained.run(way)))
    assert [found[key] for key in keys] == [expected[key] for key in keys]
    norms = column(one, "grad_norm")
    assert max(norms) > 2 * RUN["clip_norm"] and len(norms) == RUN["steps"]
    assert column(one, "train_loss")[-1] < column(one, "train_loss")[0] - 0.5


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_another_model_and_loss_are_split_right_too(trained, way):
    assert_same_numbers(trained.run("other"), trained.run(way))


def test_gradients_summed_in_place_are_exchanged_too(trained):
    """The first step multiplies the same bits; later a weight's 16-bit copy may be rounded the other way."""
    assert_same_numbers(trained.run("fused"), trained.run("ddp_fused"), rel=1e-3)
    lines = ledger(trained.run("ddp_fused"))
    assert [what for what, line in lines.items() if not line["agrees"]] == []
    assert lines["sharding"]["in_effect"] == "ddp over 2 ranks"
    assert lines["gradient_sums"]["in_effect"] == "fused"


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_classifier_is_trained_and_scored_as_by_one_process(trained, way):
    one, run = (trained.run(name, "labelled") for name in ("classifier", f"classifier_{way}"))
    assert_same_numbers(one, run)
    assert [what for what, line in ledger(run).items() if not line["agrees"]] == []
    expected, found = ([list(map(float, row.values())) for row in rows(r / "evals.csv")] for r in (one, run))
    assert found == [pytest.approx(row, rel=1e-5) for row in expected]
    metrics = [read_json(r / "metrics.json") for r in (one, run)]
    assert metrics[0]["data_order_sha256"] == metrics[1]["data_order_sha256"]
    accuracy = metrics[0]["val_accuracy"]
    assert accuracy == metrics[1]["val_accuracy"] and (45 * accuracy) % 1 == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_both_losses_of_dialogues_are_those_of_one_process(trained, way):
    """Their means are over all tokens, and all rows, of a step: not means of the ranks' or micro-batches' own."""
    one, run = (trained.run(name, "talking") for name in ("dialogues", f"dialogues_{way}"))
    names = ("train_loss", "grad_norm", "train_lm_loss", "train_mc_loss", "train_accuracy")
    for name in names:
        assert column(run, name) == pytest.approx(column(one, name), rel=1e-5), name
    assert [what for what, line in ledger(run).items() if not line["agrees"]] == []
    expected, found = (rows(r / "evals.csv") for r in (one, run))
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("val_loss", "val_accuracy", "val_lm_loss", "val_mc_loss"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-5), name
    accuracy = float(found[-1]["val_accuracy"])
    assert (21 * accuracy) % 1 == pytest.approx(0, abs=1e-9)  # every one of the 7 × 3 replies, once


def test_wrong_replies_that_are_drawn_anew_are_those_of_one_process(trained):
    one, run = (trained.run(name, "redrawn") for name in ("redrawn", "redrawn_ddp"))
    for name in ("train_lm_loss", "train_mc_loss", "train_accuracy"):
        assert column(run, name) == pytest.approx(column(one, name), rel=1e-5), name
    lines = [ledger(r)["redraw_candidates"] for r in (one, run)]
    # 6 steps, of which a process compares 8 rows each.
    assert [line["in_effect"] for line in lines] == [
        f"other candidates in {n} of {n} rows" for n in (6 * 8, 2 * 6 * 8)
    ]
    counts = [line["how"].split("; ")[1] for line in lines]
    assert counts[0] == counts[1] and "different wrong replies trained on, of" in counts[0]


def test_sgd_is_one_fused_kernel_over_shards_too(trained):
    assert_same_numbers(trained.run("sgd"), trained.run("sgd_fsdp"))
    line = ledger(trained.run("sgd_fsdp"))["optimizer_kernel"]
    assert (line["in_effect"], line["agrees"]) == ("fused", True)


@pytest.mark.parametrize("way", WAYS)
def test_an_uneven_tail_is_evaluated_once(trained, way):
    windows = len(eval_windows(len(open_tokens(trained.lab.directory / "tokens/by_hand").validation), 16, 16))
    assert 0 < windows % (2 * 4) < 4  # in the last batches one rank has few windows and the other none
    assert 0 < windows % (4 * 4) < 12
    found = [
        [float(row["val_loss"]) for row in rows(trained.run(name) / "evals.csv")] for name in ("one", way)
    ]
    assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_ledger_agrees_and_tells_how_the_model_lies(trained, way):
    processes, settings, words = WAYS[way]
    lines = ledger(trained.run(way))
    assert [what for what, line in lines.items() if not line["agrees"]] == []
    assert lines["sharding"]["in_effect"] == words
    assert lines["processes"]["in_effect"] == str(processes)
    replicas = processes // settings.get("tensor_parallel", 1)
    micro = settings.get("micro_batch_size", RUN["micro_batch_size"])
    batch = f"micro-batch {micro} × accumulation {8 // replicas // micro} × replicas {replicas}, 128 tokens a step"
    assert batch in lines["batch_size"]["how"]
    assert lines["samples"]["in_effect"] == "8 distinct"
    if way == "fsdp_model":
        assert lines["shard_unit"]["in_effect"] == "model" and "reshard_after_forward" not in lines
    elif way.startswith(("fsdp", "hsdp")):
        freed = 0 if way == "fsdp_kept" else 2
        assert lines["reshard_after_forward"]["in_effect"] == f"{freed} of 2 blocks freed"
    assert read_json(trained.run(way) / "env.json")["processes"] == processes
    counts = [read_json(trained.run(name) / "metrics.json")["parameters"] for name in ("one", way)]
    assert counts[0] == counts[1]


def test_a_run_that_was_not_spread_is_told_by_its_ledger(trained):
    line = ledger(trained.run("unspread"))["sharding"]
    assert line["in_effect"] == "not spread: 2 ranks hold it whole" and not line["agrees"]


def test_memory_is_one_ranks_own(trained):
    kept = {
        way: read_json(trained.run(way) / "metrics.json")["activation_mib"]
        for way in ("one", "ddp", "fsdp", "fsdp_kept")
    }
    assert kept["ddp"] < 0.7 * kept["one"]  # full activation checkpointing; gradient buckets do not count
    # FSDP2 frees the blocks after the forward pass, and keeps the root whole: embeddings and the last norm.
    root = ((256 + 16) * 32 + 2 * 32) * 4 / 2**20
    block = (12 * 32**2 + 13 * 32) * 4 / 2**20
    # gloo's own thread lets go of the buffer in which the last block arrived a little after the block is there: on
    # a busy machine it is still held when the forward pass ends. It is never anything else.
    for found, expected in (("fsdp", kept["one"] + root), ("fsdp_kept", kept["one"] + root + 2 * block)):
        late = kept[found] - expected
        assert late == pytest.approx(0, abs=1e-3) or late == pytest.approx(block, abs=1e-3), (found, late)


@pytest.mark.parametrize("way", WAYS)
def test_only_the_first_process_writes_results(trained, way):
    first, *others = [trained.writes(way, rank) for rank in range(WAYS[way][0])]
    assert not any(others)
    opened = {entry.split("/")[-1].removesuffix(".partial") for entry in first if entry.startswith("open ")}
    # safetensors writes past Python's own open
    assert opened >= {path.name for path in trained.run(way).iterdir()} - {"model.safetensors"}


@pytest.mark.parametrize("way", RESUMED)
def test_an_interrupted_sharded_run_ends_bit_for_bit_like_one_that_was_not(trained, way):
    whole, run = trained.run(f"{way}_whole"), trained.run(f"{way}_again").with_name(f"{way}-1")
    assert set(trained.exits[way]) == {1}, trained.done.stderr
    assert events(run) == [{"event": "resumed", "step": 2}]
    for name in ("steps.csv", "evals.csv"):
        assert untimed(run / name) == untimed(whole / name)
    assert_same_weights(weights(run), weights(whole))
    assert list((trained.lab.directory / "checkpoints").iterdir()) == []


def test_another_number_of_processes_than_asked_for_is_refused(trained):
    assert trained.exits["refused"] == [2, 2]
    assert (
        "processes = 3, but 2 were launched: use torchrun --nproc-per-node 3, or set processes = 0"
        in trained.done.stderr
    )
    assert not (trained.lab.directory / "results/by_hand/refused-1").exists()
