"""The study gpt2 end to end, on made-up documents, at a size that a CPU finishes: checklist, selection, tables."""

import csv
import json

import pyarrow as pa
import pytest
from pyarrow import parquet
from sandbox import prose, ran

SMALL = (
    "study=gpt2",
    "preset=none",
    "only=[adamw,spam,mla,bitter3_longer]",
    "tokenizer=bpe",
    "vocab_size=300",
    "max_train_bytes=0",
    "layers=1",
    "heads=2",
    "width=16",
    "context=16",
    "residual_precision=fp32",
    "loss_kernel=full",
    "gradient_sums=autograd",
    "eval_precision=fp32",
    "steps=8",
    "batch_size=8",
    "micro_batch_size=4",
    "warmup_steps=2",
    "pruning_start=2",
    "pruning_interval=1",
    "eval_interval=2",
    "eval_batch_size=8",
    "eval_tokens=600",
    "runs.bitter3_longer.steps=10",
    "runs.bitter3_longer.pruning_hold=4",
    "budget=1024",
    "perplexity_at=[4,8]",
    "latency_lengths=[4,8]",
    "targets=[5.6]",
    "monitor_interval=0",  # of a GPU
    "criteria=[]",
    "runs.spam.spam_reset_steps=3",
    "runs.spam.spam_warmup_steps=1",
    "+runs.spam.spam_grace_steps=1",
    "runs.mla.latent_width=8",
    "seeds=[1]",
    "expects.steps=8",
    "+expects.accumulation=2",
    "+expects.train_tokens_at_least=1000",
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Documents in a parquet file, as FineWeb-Edu has them."""
    directory = tmp_path_factory.mktemp("pages")
    texts = [prose(i, 60) for i in range(200)]
    parquet.write_table(
        pa.table(dict.fromkeys(("text", "id", "dump", "url"), texts)), directory / "000.parquet"
    )
    return directory


def rows(path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_four_runs_of_the_study_and_its_checklist(sandbox, pages):
    chosen = [x for value in (*SMALL, f"data_dir={pages}") for x in ("-S", value)]
    looked = sandbox.run("dvc", "exp", "run", *chosen, "plan")
    assert ran(looked) == {"plan"} and "study gpt2, 4 runs × 1 seed" in looked
    assert "0 of 4 done; to train: adamw-1, spam-1, mla-1, bitter3_longer-1" in looked
    assert "only 4 of 22 runs" in looked and "the hypothesis is about runs left out" in looked
    assert not (sandbox.path / "tokens/gpt2").exists()

    output = sandbox.run("dvc", "exp", "run", *chosen)
    names = ("adamw", "spam", "mla", "bitter3_longer")
    assert {f"{stage}@1-{name}" for stage in ("train", "eval") for name in names} <= ran(output)
    assert "checklist adamw-1: pass  accumulation" in output and "train_tokens" in output
    assert "bitter3_longer, seed 1; 3 of 4 done, about" in output
    results, reports = sandbox.path / "results/gpt2", sandbox.path / "reports/gpt2"
    kept = json.loads((results / "adamw-1/checklist.json").read_text())
    assert {one["what"] for one in kept} == {"steps", "accumulation", "train_tokens"}
    assert all(one["passed"] for one in kept)
    assert json.loads((sandbox.path / "tokens/gpt2/meta.json").read_text())["kind"] == "documents"

    metrics = json.loads((reports / "metrics/bitter3_longer.json").read_text())
    assert metrics["verdict"] == "own budget"
    assert [row["run"] for row in rows(reports / "course.csv")] == list(names)
    assert float(rows(reports / "course.csv")[0]["perplexity_at_8"]) > 1
    assert [row["run"] for row in rows(reports / "equal_seconds.csv")] == list(names[:3])
    timed = [(row["run"], row["target"], row["not_ranked"]) for row in rows(reports / "targets.csv")]
    assert timed == [*((name, "5.6", "") for name in names[:3]), ("bitter3_longer", "5.6", "own budget")]
    for name in names:
        ledger = json.loads((results / f"{name}-1/ledger.json").read_text())["entries"]
        assert [line["what"] for line in ledger if not line["agrees"]] == []
