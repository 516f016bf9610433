"""Mistakes of earlier labs, made on purpose where no other test makes them; docs/mistakes.md lists them all."""

import ast
import csv
import math
import re

import pytest
import torch
import torch.nn.functional as F
from engine_runs import REPOSITORY, column, ledger, read_json
from fake_results import RUNS, write_study
from test_model import gpt, tokens
from test_model_parts import latent, normal, slow_latent

from engine import plan, probes
from engine.checkpoint import Checkpoints
from engine.config import SETTINGS, load, resolve
from engine.data.batches import Prefetcher
from engine.errors import ConfigError
from engine.models.latent import Latent
from engine.step import Step
from engine.tasks import next_token
from stages import summarize

PAGE = REPOSITORY / "docs" / "mistakes.md"
MISTAKES = 12

# --- the page


def functions_of(path) -> set[str]:
    """The test functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_page_names_all_twelve_and_tests_that_exist():
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    assert [section.split(".")[0] for section in sections] == [str(i + 1) for i in range(MISTAKES)]
    for section in sections:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", section)
        assert named, section
        assert named == re.findall(r"`(tests/[^`:]*)::([^`]*)`", section)  # nothing that only looks like one
        for path, name in named:
            assert name in functions_of(REPOSITORY / path), f"{path}::{name}"


# --- 3 and 12: settings that nobody reads


def test_keys_that_nobody_reads_are_refused_by_name(tmp_path):
    """The YAML of one lab, of which its trainer read nothing, and the environment's names of another."""
    (tmp_path / "run.toml").write_text(
        "[optimizer]\ntype = 'AdamW'\nbetas = [0.9, 0.999]\nweight_decay = 0.01\n"
        "[training]\ngradient_clip = 1.0\nsave_checkpoint = true\nGPT2_MAX_ITERS = 50000\n"
        "[schedule]\nwarmup_steps = 10\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match="5 problems") as error:
        load(tmp_path / "run.toml")
    for name in ("type", "betas", "gradient_clip", "save_checkpoint", "GPT2_MAX_ITERS"):
        assert f"\n  - {name}: unknown setting" in str(error.value)


def test_every_setting_is_read_by_the_engine():
    """By its name, as an attribute of its section, outside the declarations and the rules about them."""
    read = set()
    for path in (REPOSITORY / "engine").rglob("*.py"):
        rules = path.name == "rules.py" or path.parent.name == "rules"
        if path.name not in ("config.py", "declare.py") and path.parent.name != "settings" and not rules:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert set(SETTINGS) - read == set()


def test_a_run_that_takes_fewer_steps_than_asked_for_is_told(lab, monkeypatch):
    """Asked for 12, trained 5: a default of 5 that the setting did not reach."""
    honest = ledger(lab.train(run="honest", steps=12))["steps"]
    assert honest["agrees"] and honest["in_effect"] == "12"
    start = Prefetcher.__init__

    def short(self, order, **how):
        start(self, order, **{**how, "last_step": 5})

    monkeypatch.setattr(Prefetcher, "__init__", short)
    run = lab.train(run="short", steps=12, eval_interval=5, log_interval=5)
    line = ledger(run)["steps"]
    assert (line["requested"], line["in_effect"], line["agrees"]) == ("12", "5", False)
    assert read_json(run / "metrics.json")["steps"] == 5


# --- 4: reports with names and numbers of their own


def test_a_run_added_to_a_study_is_in_every_table_and_chart(tmp_path, capsys):
    added = {**RUNS, "a_new_one": {"lr": 0.5}}
    reports = tmp_path / "reports"
    assert summarize.main([str(write_study(tmp_path, runs=added)), str(reports)]) == 0
    for name in ("table.csv", "curves.csv", "bars.csv"):
        with (reports / name).open(newline="", encoding="utf-8") as file:
            assert {row["run"] for row in csv.DictReader(file)} == set(added), name
    assert {path.stem for path in (reports / "metrics").iterdir()} == set(added)
    assert "a_new_one" in (reports / "report.html").read_text(encoding="utf-8")
    assert "a_new_one" in capsys.readouterr().out


def test_no_run_of_a_shipped_study_is_named_in_code():
    runs = {"adamw_full_ac", "pre_norm", "post_norm", "no_warmup"}
    studies = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "conf" / "study").glob("*.yaml")]
    assert all(any(f"\n  {run}:" in text for text in studies) for run in runs)
    for room in ("metrics", "plots", "stages", "engine"):
        for path in (REPOSITORY / room).rglob("*.py"):
            assert not runs & set(re.findall(r"\w+", path.read_text(encoding="utf-8"))), path


# --- 5: a formula that is not what it is called


def test_an_einsum_that_sums_its_indices_apart_is_not_the_formula(monkeypatch):
    """(Σ_d q_i,d)(Σ_l k_j,l) / √L in place of the reciprocal term, as it was once typed."""
    attention, x = latent(reciprocal_alpha=0.6, reciprocal_window=64), normal(1, 9, 8)

    def typo(self, q, k, queries):
        k = k.expand_as(q)
        plain = q @ k.transpose(-2, -1) / math.sqrt(self.latent_width)
        return plain + self.alpha * torch.einsum("bhid,bhjl->bhij", q, k) / math.sqrt(self.latent_width)

    with torch.no_grad():
        expected = slow_latent(attention, x[0])
        torch.testing.assert_close(attention(x)[0].double(), expected, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(Latent, "scores", typo)
        assert (attention(x)[0].double() - expected).abs().max() > 0.1


# --- 6 and 11: what a step's time is


def test_a_steps_time_holds_all_its_micro_batches_and_no_evaluation_or_checkpoint(lab, monkeypatch):
    """By a clock that a micro-batch moves by 1 second, and an evaluation or a checkpoint by 100."""
    clock = [0.0]

    def taking(seconds, whole):
        def call(*args, **kwargs):
            clock[0] += seconds
            return whole(*args, **kwargs)

        return call

    monkeypatch.setattr(probes.StepClock, "now", lambda _: clock[0])
    monkeypatch.setattr(Step, "_forward_backward", taking(1, Step._forward_backward))
    monkeypatch.setattr(next_token, "evaluate", taking(100, next_token.evaluate))
    monkeypatch.setattr(Checkpoints, "save", taking(100, Checkpoints.save))
    run = lab.train(batch_size=6, micro_batch_size=2, steps=8, eval_interval=3, checkpoint_interval=4)
    assert column(run, "step_seconds") == [3.0] * 8
    metrics = read_json(run / "metrics.json")
    assert (metrics["train_seconds"], metrics["step_seconds_median"]) == (24.0, 3.0)
    assert metrics["tokens_per_second"] == 6 * 16 / 3


# --- 8: where the memory goes


@pytest.mark.slow
def test_the_logits_are_named_as_what_takes_the_memory():
    """32 × 1024 tokens × 50,304 words in bf16 are 3.07 GiB, of which chunks of 4,096 tokens need an eighth."""
    sizes = {"layers": 1, "heads": 12, "width": 768, "context": 1024, "pad_vocabulary_to": 64}
    held = {}
    for kernel in ("fused", "chunked"):
        config = resolve({**sizes, "batch_size": 32, "precision": "bf16", "loss_kernel": kernel}, "test")
        held[kernel] = plan.estimate(config, 50257, "cuda", 1).logits
    whole = 32 * 1024 * 50304 * 2
    assert whole / 2**30 == pytest.approx(3.07, abs=0.005)
    assert held["fused"] - held["chunked"] == pytest.approx(whole * 7 / 8, rel=0.01)


# --- 9: a model that sees the future


def test_a_model_without_a_causal_mask_is_caught(monkeypatch):
    """By the difference that test_model.py asks to be none: a changed token 7 changes the logits before it."""
    before = tokens()
    after = before.clone()
    after[:, 7] = (after[:, 7] + 1) % 61
    model = gpt(attention="sdpa")

    def difference() -> float:
        with torch.no_grad():
            return (model(before)[0] - model(after)[0])[:, :7].abs().max().item()

    assert difference() < 1e-6
    whole = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, **how: whole(q, k, v, **{**how, "is_causal": False}),
    )
    assert difference() > 1e-4


# --- 10: perplexities of different tokens


def test_bits_per_byte_do_not_depend_on_what_a_token_is():
    """The same text and the same nats in all: 1,000 words, or those and as many spaces as tokens of their own."""
    text_bytes, nats = 6000, 5000.0
    words, with_spaces = (
        next_token.figures({"loss": nats / n}, {"bytes_per_token": text_bytes / n}, "test")
        for n in (1000, 2000)
    )
    assert words["test_perplexity"] == pytest.approx(math.exp(5.0))
    assert with_spaces["test_perplexity"] == pytest.approx(math.exp(2.5))
    assert words["test_bits_per_byte"] == pytest.approx(5000 / math.log(2) / 6000)
    assert with_spaces["test_bits_per_byte"] == pytest.approx(words["test_bits_per_byte"])
