"""The study wikitext2 on the real files, end to end, at a size that a CPU finishes."""

import json
from pathlib import Path

import pytest
from sandbox import ROOT

FILES = ROOT.parent / "shared" / "data" / "wikitext2"
SMALL = (
    "layers=1",
    "heads=1",
    "width=16",
    "context=32",
    "steps=3",
    "batch_size=8",
    "warmup_steps=1",
    "eval_batch_size=32",
    "eval_tokens=2000",
    "eval_stride=0",
    "activation_norm_layers=[0]",
    "checkpoint_interval=2",
    "seeds=[1]",
    "~runs.post_norm",
)


@pytest.mark.slow
@pytest.mark.skipif(not FILES.is_dir(), reason="the WikiText-2 files are not beside this checkout")
def test_the_real_files_give_standard_word_level_perplexity(sandbox):
    sandbox.experiment("study=wikitext2", f"data_dir={FILES}", *SMALL)
    results: Path = sandbox.path / "results/wikitext2"
    found = json.loads((results / "test/pre_norm-1.json").read_text())
    assert found["tokens"] == 245_569 - 1  # every token of the test file but the first
    # Hardly trained: near the uniform distribution over the 33,278 words, and no better than chance allows.
    assert 20_000 < found["test_perplexity"] < 40_000
    meta = json.loads((sandbox.path / "tokens/wikitext2/meta.json").read_text())
    assert meta["vocabulary_size"] == 33_278
    assert [meta["splits"][s]["tokens"] for s in ("train", "validation", "test")] == [2_088_628, 217_646, 245_569]
    ledger = json.loads((results / "pre_norm-1/ledger.json").read_text())["entries"]
    assert all(line["agrees"] for line in ledger), ledger
