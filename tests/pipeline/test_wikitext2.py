"""The study wikitext2 on the real files, end to end, at a size that a CPU finishes."""

import json

import pytest
from sandbox import ROOT, ran

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
def test_the_real_files_are_tokenized_by_the_standard_protocol_and_trained_on(sandbox):
    """Up to train: scoring the whole test file over 33,278 words is a GPU's work (see records/)."""
    overrides = [x for o in (f"data_dir={FILES}", *SMALL) for x in ("-S", o)]
    output = sandbox.run("dvc", "exp", "run", "-S", "study=wikitext2", *overrides, "train")
    assert {"train@1-pre_norm", "train@1-no_warmup"} <= ran(output)
    meta = json.loads((sandbox.path / "tokens/wikitext2/meta.json").read_text())
    assert meta["vocabulary_size"] == 33_278
    assert [meta["splits"][s]["tokens"] for s in ("train", "validation", "test")] == [
        2_088_628,
        217_646,
        245_569,
    ]
    run = sandbox.path / "results/wikitext2/pre_norm-1"
    # Hardly trained: near the uniform distribution over the 33,278 words.
    assert 20_000 < json.loads((run / "metrics.json").read_text())["val_perplexity"] < 40_000
    assert all(line["agrees"] for line in json.loads((run / "ledger.json").read_text())["entries"])
