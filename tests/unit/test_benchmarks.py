"""The benchmarks: their arithmetic by hand, peers that fail, and the engine's own peers through real processes."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import process
from benchmarks.data import make_tokens
from benchmarks.factorial import EXPERIMENTS, Experiment
from benchmarks.peers import PEERS, engine, nanogpt
from benchmarks.recipes import engine_settings
from benchmarks.record import main as record
from benchmarks.rows import complete
from benchmarks.sizes import SIZES
from benchmarks.speed import chosen_size, experiment_jobs, main, parse
from benchmarks.table import read, tables
from benchmarks.task import Task
from engine.data.prepare import open_tokens
from engine.errors import ConfigError

SMOKE = SIZES["smoke"]
MACHINE = {
    "device_name": "NVIDIA H200",
    "cpu_count": 8,
    "platform": "Linux x86_64",
    "torch": "2.11",
    "python": "3.12",
}


def row(peer="engine", repeat=0, tokens=100.0, gib=10.0, **changes) -> dict:
    """A row as the GPU size gives it."""
    return {
        "run": "now",
        "command": "python -m benchmarks.speed --size gpu",
        "size": "gpu",
        "device": "cuda",
        "hardware": "NVIDIA H200",
        "torch": "2.11",
        "git_commit": "0123456789abcdef",
        "git_engine_changed": False,
        "machine": MACHINE,
        "step_tokens": 131072,
        "steps": 15,
        "experiment": None,
        "peer": peer,
        "repeat": repeat,
        "status": "ok",
        "problems": [],
        "tokens_per_second": tokens,
        "tokens_per_second_mean": tokens * (0.99 if peer == "engine" else 1),
        "peak_gib": gib,
        "mfu": 0.5,
        "step_ms": 200.0,
        "step_ms_fastest": 199.0,
        "first_step_seconds": 60.0,
        "loss_first": 10.9,
        "loss_last": 9.0,
        **changes,
    }


def failed(peer: str, status: str, line: str, **changes) -> dict:
    kept = {
        k: v for k, v in row(peer, **changes).items() if not k.startswith(("tokens", "peak", "loss", "mfu"))
    }
    return kept | {"status": status, "last_lines": ["before", line]}


def cells(text: str, name: str) -> list[str]:
    """The cells of the table line that begins with `name`."""
    line = next(line for line in text.splitlines() if line.startswith(name))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_ratio_is_the_median_of_the_ratios_within_each_turn():
    """The machine halves its speed in the third turn: the ratio of the medians would be 1.10."""
    rows = [
        *(row("engine", i, tokens, 7.0) for i, tokens in enumerate([120, 110, 65])),
        *(row("nanogpt", i, tokens, 10.0) for i, tokens in enumerate([100, 100, 50])),
        *(row("bare", i, tokens, 7.0) for i, tokens in enumerate([120, 112, 65])),
    ]
    text = tables(rows)
    assert cells(text, "engine ")[:6] == [
        "engine",
        "110",
        "1.20 (1.10–1.30)",
        "200.00",
        "7",
        "0.70 (0.70–0.70)",
    ]
    assert cells(text, "nanogpt")[2] == "1.00 (1.00–1.00)"
    assert (
        "engine / bare loop: 1.000 (0.982–1.000) by the median step, 0.990 (0.972–0.990) by the mean" in text
    )
    assert (
        "131,072 tokens a step, median of 15 steps, 3 turns; NVIDIA H200, torch 2.11, 0123456789ab\n" in text
    )


def test_a_peer_without_a_figure_is_shown_with_the_reason_and_counts_in_no_ratio():
    rows = [
        row("engine", 0, 120),
        row(
            "engine", 1, 900, status="invalid", problems=["ledger: compile: requested model, in effect none"]
        ),
        row("nanogpt", 0, 100),
        row("nanogpt", 1, 100),
        failed("hf", "missing", "No module named 'transformers'"),
        failed("torchtitan", "timeout", "ended after 400 s"),
    ]
    text = tables(rows)
    engine_row = cells(text, "engine")
    assert engine_row[1:3] == ["120", "1.20"] and engine_row[-1] == "1 × ok, 1 × invalid"
    assert cells(text, "hf")[1:3] == ["–", "–"] and cells(text, "hf")[-1] == "missing"
    assert "* engine: invalid: ledger: compile: requested model, in effect none" in text
    assert "* hf: missing: No module named 'transformers'\n* torchtitan: timeout: ended after 400 s" in text


def test_rows_of_different_machines_are_in_different_tables():
    text = tables([row("engine", tokens=200), row("nanogpt", tokens=100, hardware="NVIDIA H100")])
    assert text.count("ratio to nanogpt") == 2
    assert cells(text, "engine")[2] == "–"


def test_an_effect_combined_is_against_everything_on_without_it():
    """Two techniques that save the same thing: each gives 1.5 alone, 1.2 with the other, 1.8 together."""
    on = {"a": "on", "b": "x"}
    made = {
        "experiment": "two",
        "question": "What do two techniques give?",
        "all_on": on,
    }
    figures = [({}, 100, 10), ({"a": "on"}, 150, 8), ({"b": "x"}, 150, 5), ({"b": "y"}, 90, 4), (on, 180, 4)]
    rows = [row(tokens=t, gib=g, levels=levels, **made) for levels, t, g in figures]
    rows.append(row(tokens=160, gib=3, levels={"a": "on", "b": "y"}, **made))
    text = tables(rows)
    assert cells(text, "base")[1:3] == ["100", "1.00"]
    assert cells(text, "a: on, b: x")[1:3] == ["180", "1.80"]
    effects = text[text.index("technique ") :]
    assert cells(effects, "a: on") == ["a: on", "1.50", "0.80", "1.20", "0.80"]
    assert cells(effects, "b: x") == ["b: x", "1.50", "0.50", "1.20", "0.50"]
    assert cells(effects, "b: y") == ["b: y", "0.90", "0.40", "1.07", "0.38"]  # 160 / 150 and 3 / 8
    assert cells(effects, "all together") == ["all together", "1.80", "0.40"]


def test_what_only_some_steps_do_shows_in_the_ratio_of_means():
    """A pruned run whose rankings halve the mean speed and leave the median as it is."""
    made = {"experiment": "pruning", "question": "?", "all_on": {}, "means": True, "step_ms_fastest": 1.0}
    made |= {"compile_seconds": 1.0, "activation_mib": 1.0}
    rows = [
        row("engine", tokens=100, levels={}, tokens_per_second_mean=100, **made),
        row("engine", tokens=99, levels={"pruning": "x"}, tokens_per_second_mean=50, **made),
    ]
    text = tables(rows)
    assert "ratio to base  ratio of means" in text
    assert cells(text, "pruning: x")[1:4] == ["99", "0.99", "0.50"]
    assert "ratio of means" not in tables([{**one, "means": False} for one in rows])


def test_costs_of_pruning_are_also_compared_by_means():
    [pruning] = [e for e in EXPERIMENTS["cuda"] if e.name == "pruning"]
    jobs = experiment_jobs([pruning], engine_settings(SIZES["gpu"], {"dataset": "text", "data_dir": "t"}))
    assert all(job.identity["means"] for job in jobs)
    # Of the timed steps, as large a share ranks as of all.
    intervals = {job.settings.get("pruning_interval", 1) for job in jobs}
    assert intervals == {1, 5} and SIZES["gpu"].steps % 5 == 0


def test_no_optimizer_of_an_experiment_still_warms_up_at_its_end():
    """Its loss would not fall, and its row be invalid."""
    for experiment in EXPERIMENTS["cuda"]:
        for levels in experiment.combinations():
            found = experiment.settings(levels)
            if found.get("optimizer") == "spam":
                assert found["spam_warmup_steps"] == 0


def test_a_combination_is_measured_once():
    e = Experiment(
        "e",
        "?",
        {"tf32": True},
        {"a": {"1": {"x": 1}, "2": {"x": 2}}, "b": {"1": {"y": 1}}},
        {"a": "1", "b": "1"},
    )
    assert e.combinations() == [
        {},
        {"a": "1"},
        {"a": "2"},
        {"b": "1"},
        {"a": "1", "b": "1"},
        {"a": "2", "b": "1"},
    ]
    assert e.settings({"a": "2", "b": "1"}) == {"tf32": True, "x": 2, "y": 1}
    assert len(replace(e, all_on={}).combinations()) == 4
    assert replace(e, crossed=True).combinations()[:3] == [{}, {"b": "1"}, {"a": "1"}]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_experiment_has_valid_settings(name):
    """A combination that the engine would refuse raises ConfigError."""
    size = SIZES[name]
    settings = engine_settings(
        size, {"dataset": "text", "data_dir": "text", "study": "bench", "tokenizer": "words"}
    )
    jobs = experiment_jobs(EXPERIMENTS[size.device], settings)
    assert len(jobs) == sum(len(e.combinations()) for e in EXPERIMENTS[size.device])
    with pytest.raises(ConfigError, match="(?s)experiment wrong, .*'b'.*nonsense"):
        experiment_jobs([Experiment("wrong", "?", {}, {"a": {"b": {"compile": "nonsense"}}})], settings)


def test_figures_of_a_row():
    """GPT-2 124M: 854.65 million operations a token (FACTS of the project), 989e12 a second on an H200."""
    measured = {"status": "ok", "step_seconds": [0.3, 0.2, 0.2], "loss_first": 10.9, "loss_last": 9.0}
    found = complete(measured, SIZES["gpu"], 50257, "NVIDIA H200")
    assert found["status"] == "ok"
    assert found["tokens_per_second"] == pytest.approx(131072 / 0.2)
    assert found["tokens_per_second_mean"] == pytest.approx(131072 / 0.7 * 3)
    assert found["mfu"] == pytest.approx(655360 * 854.654976e6 / 989e12)
    assert (found["step_ms"], found["step_ms_slowest"]) == pytest.approx((200, 300))


@pytest.mark.parametrize(
    ("first", "last", "problem"),
    [
        (5.0, 4.0, "first loss 5.000, where chance is 10.825"),
        (math.nan, 4.0, "first loss nan"),
        (10.9, 11.0, "loss did not fall: 10.900 → 11.000"),
        (10.9, math.nan, "loss did not fall"),
    ],
)
def test_a_model_that_does_not_learn_from_chance_is_invalid(first, last, problem):
    measured = {"status": "ok", "step_seconds": [0.2], "loss_first": first, "loss_last": last}
    found = complete(measured, SIZES["gpu"], 50257, "unknown")
    assert found["status"] == "invalid" and found["mfu"] is None
    assert found["problems"][0].startswith(problem)


@pytest.mark.parametrize("name", [name for name, size in SIZES.items() if not (size.classes or size.choices)])
def test_the_synthetic_text_has_the_declared_vocabulary(name, tmp_path):
    size = replace(SIZES[name], train_tokens=2000)
    data, meta = make_tokens(size, tmp_path, None)
    assert meta["vocabulary_size"] == size.vocabulary
    assert all(split["unknown_tokens"] == 0 for split in meta["splits"].values())
    tokens = open_tokens(tmp_path / "tokens" / data["study"], verify=True)
    assert len(tokens.train) > 2000 and len(tokens.validation) > 8 * size.context


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Run a peer made of this source; its row."""

    def run(source: str, limit_seconds: float = 60) -> dict:
        (tmp_path / "fake_peer.py").write_text(source, encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        task = Task(SMOKE, {}, tmp_path, "uint16", 301, None)
        return process.run("fake_peer", task, tmp_path, limit_seconds)

    return run


def test_a_peer_gets_its_task_and_its_result_comes_back(fake):
    found = fake("def measure(task): print('noise'); return {'seen': [task.vocabulary, task.size.name]}")
    assert found["status"] == "ok" and found["seen"] == [301, "smoke"]
    assert 0.001 < found["host_peak_gib"] < 4


def test_a_peer_that_fails_is_an_error_with_its_last_lines(fake):
    found = fake("def measure(task): print('so far'); raise RuntimeError('out of luck')")
    assert found["status"] == "error"
    assert found["last_lines"][-1] == "RuntimeError: out of luck"


def test_a_peer_that_runs_out_of_memory_is_told_apart(fake):
    found = fake("def measure(task): raise RuntimeError('CUDA out of memory. Tried to allocate')")
    assert found["status"] == "out of memory"


def test_a_peer_whose_library_is_not_there_is_missing(fake):
    found = fake("import no_such_library")
    assert found == {"status": "missing", "last_lines": ["No module named 'no_such_library'"]}


def test_a_peer_beyond_its_limit_is_ended_with_its_children(fake, tmp_path):
    """The child would write a file a second later."""
    found = fake(
        "import subprocess, time\n"
        "def measure(task):\n"
        "    subprocess.Popen(['sh', '-c', 'sleep 2; touch survived'])\n"
        "    print('still here', flush=True)\n"
        "    time.sleep(60)\n",
        limit_seconds=1,
    )
    assert found["status"] == "timeout"
    assert found["last_lines"][-1] == "ended after 1 s"
    process.subprocess.run(["sleep", "1.5"], check=True)
    assert not (tmp_path / "survived").exists()


NANOGPT = """
from dataclasses import dataclass
import torch
import torch.nn.functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.zeros(config.vocab_size, config.vocab_size))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)

    def forward(self, tokens, targets):
        logits = self.rows[tokens]
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_a_checkout_of_nanogpt_is_trained_on_the_same_tokens(tmp_path):
    """A bigram table in its place: chance at first, less after some steps on tokens that repeat."""
    (tmp_path / "model.py").write_text(NANOGPT, encoding="utf-8")
    np.arange(2000, dtype=np.uint16).__mod__(7).tofile(tmp_path / "train.bin")
    found = nanogpt.measure(Task(SMOKE, {}, tmp_path, "uint16", 301, tmp_path))
    assert found["loss_first"] == pytest.approx(math.log(320))  # 301 padded to 64s
    assert found["loss_last"] < found["loss_first"] - 0.1
    assert len(found["step_seconds"]) == SMOKE.steps and min(found["step_seconds"]) > 0
    assert found["parameters"] == 320**2


def test_nanogpt_without_a_checkout_is_missing(tmp_path):
    found = process.run(PEERS["nanogpt"], Task(SMOKE, {}, tmp_path, "uint16", 301, tmp_path), tmp_path, 60)
    assert found == {"status": "missing", "last_lines": ["no model.py in the checkout of nanoGPT"]}


def test_a_run_whose_ledger_disagrees_is_a_problem(tmp_path):
    (tmp_path / "steps.csv").write_text(
        "step_seconds,train_loss,peak_memory_gib,data_wait_seconds\n9,5,3,0\n1,4,2,0\n2,3,1,0\n",
        encoding="utf-8",
    )
    metrics = dict.fromkeys(("compile_seconds", "parameters", "tokens_per_second", "peak_memory_gib"), 1)
    lines = [
        {"what": "compile", "requested": "model", "in_effect": "none", "how": "counters", "agrees": False},
        {"what": "seed", "requested": "1", "in_effect": "1", "how": "", "agrees": True},
    ]
    more = {"checkpoint_seconds": 1, "activation_mib": 1}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | more), encoding="utf-8")
    (tmp_path / "ledger.json").write_text(json.dumps({"entries": lines}), encoding="utf-8")
    found = engine.read(SimpleNamespace(directory=tmp_path), warmup=1)
    assert found["problems"] == ["ledger: compile: requested model, in effect none (counters)"]
    assert (found["step_seconds"], found["first_step_seconds"], found["peak_gib"]) == ([1.0, 2.0], 9.0, 2.0)
    assert (found["loss_first"], found["loss_last"]) == (5.0, 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "cpu", "--only", "engine,jax"], "--only jax: must be of engine, bare, nanogpt"),
        (["--size", "cpu", "--factorial", "--only", "bare"], "must be of techniques, checkpointing"),
        (["--size", "gpu", "--data-dir", "x"], "is for --size cpu"),
        (
            ["--size", "gpu", "--tokenizer-dir", "x"],
            "--tokenizer-dir: GPT-2's is for --size persona, not for gpu",
        ),
        (["--size", "persona", "--factorial"], "its experiments are of a text, not of --size persona"),
        (["--size", "persona", "--only", "hashed"], "must be of engine, padded"),
        (["--size", "gpu", "--micro-batch", "24"], "must divide the 128 sequences"),
        (["--size", "gpu", "--steps", "0"], "--steps: must be ≥ 1"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        chosen_size(parse(arguments))


def test_another_micro_batch_keeps_the_tokens_of_a_step():
    size = chosen_size(parse(["--size", "gpu", "--micro-batch", "64"]))
    assert (size.micro_batch, size.accumulation, size.step_tokens) == (64, 2, 131072)


def test_a_record_is_made_from_its_rows(tmp_path):
    rows = [row("engine", tokens=120), row("nanogpt", tokens=100)]
    (tmp_path / "speed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (tmp_path / "notes.md").write_text("## What did not pay\n", encoding="utf-8")
    record([str(tmp_path)])
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert tables(rows) in text and "    python -m benchmarks.speed --size gpu\n" in text
    assert "NVIDIA H200, 8 CPU cores" in text and text.endswith("## What did not pay\n")


def test_a_record_without_rows_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        record([str(tmp_path)])
    assert "no rows" in capsys.readouterr().err


@pytest.mark.slow
def test_the_engine_and_the_bare_loop_are_measured_through_real_processes(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert main(["--size", "smoke", "--only", "engine,bare", "--out", str(out)]) == 0
    rows = {r["peer"]: r for r in read([out])}
    for r in rows.values():
        assert r["status"] == "ok", r
        assert len(r["step_seconds"]) == SMOKE.steps and r["tokens_per_second"] > 0
        assert r["loss_first"] == pytest.approx(math.log(301), abs=0.2)
        assert r["machine"]["torch"] == r["torch"] and len(r["git_commit"]) == 40
        assert r["settings"]["width"] == SMOKE.width
    assert rows["engine"]["parameters"] == rows["bare"]["parameters"]
    # The same weights and the same learning rates, other batches: only nearly the same losses.
    assert rows["engine"]["loss_last"] == pytest.approx(rows["bare"]["loss_last"], abs=0.3)
    assert "engine / bare loop: " in capsys.readouterr().out
