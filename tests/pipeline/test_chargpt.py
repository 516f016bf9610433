"""The study chargpt through all stages, at a size that a CPU finishes in seconds, on a text of its own."""

import json

import pytest
from sandbox import prose, ran

SMALL = (
    "dataset=text_file",
    "layers=2",
    "heads=2",
    "width=16",
    "context=16",
    "steps=6",
    "batch_size=8",
    "warmup_steps=1",
    "eval_interval=3",
    "eval_batch_size=8",
    "sample_tokens=12",
    "sample_prompt='7'",
    "precision=fp32",
    "compile=none",
    "step_graph=false",
    "tf32=false",
    "seeds=[1]",
    "~runs.rotary",
    "~runs.muon",
    "~runs.dropout",
    "falsified_by.when=[{run: recipe, measure: val_loss, at_least: 9.0}]",
    "+runs.easy_first={first_length: 4, lengthening_steps: 4, "
    "curriculum: rarity, curriculum_steps: 3, curriculum_start: 0.2}",
)
RUNS = ("nanogpt", "recipe", "easy_first")


@pytest.fixture(scope="module")
def done(sandbox):
    """What the study prints."""
    sandbox.write(".text/play.txt", prose(5))
    overrides = [x for o in (*SMALL, f"data_file={sandbox.path / '.text/play.txt'}") for x in ("-S", o)]
    return sandbox.run("dvc", "exp", "run", "-S", "study=chargpt", *overrides)


@pytest.mark.slow
def test_a_text_is_split_by_position_trained_on_and_judged_by_its_validation(sandbox, done):
    assert {f"{stage}@1-{run}" for stage in ("train", "eval") for run in RUNS} <= ran(done)
    splits = json.loads((sandbox.path / "tokens/chargpt/meta.json").read_text())["splits"]
    size = len(prose(5))
    assert [splits[s]["tokens"] for s in ("train", "validation", "test")] == [
        size * 9 // 10,
        size - size * 9 // 10,
        0,
    ]
    assert "validation loss" in done and "test loss" not in done
    criteria = done[done.index("criteria") if "criteria" in done else 0 :]
    assert "recipe" in criteria and "1.45" in criteria
    for run in RUNS:
        home = sandbox.path / f"results/chargpt/{run}-1"
        metrics = json.loads((home / "metrics.json").read_text())
        assert metrics["tokens"] == 6 * 8 * 16 and metrics["status"] == "complete"
        lines = {line["what"]: line for line in json.loads((home / "ledger.json").read_text())["entries"]}
        assert all(line["agrees"] for line in lines.values()), lines
        assert [what in lines for what in ("first_length", "curriculum")] == [run == "easy_first"] * 2
    assert "data order not paired, because of curriculum, curriculum_steps, curriculum_start" in " ".join(
        done.split()
    )
    assert "not comparable" not in done


@pytest.mark.slow
def test_each_evaluation_leaves_a_sample_and_the_run_goes_on_from_a_prompt(sandbox, done):
    home = sandbox.path / "results/chargpt/recipe-1"
    samples = [json.loads(line) for line in (home / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["prompt"], len(s["text"])) for s in samples] == [(2, "7", 12), (5, "7", 12)]
    command = [
        "python",
        "-m",
        "engine.generate",
        str(home),
        "--prompt",
        "12",
        "--tokens",
        "9",
        "--device",
        "cpu",
    ]
    more = [
        "--temperature",
        "0.8",
        "--top-k",
        "5",
        "--top-p",
        "0.9",
        "--repetition-penalty",
        "1.1",
        "--seed",
        "3",
    ]
    text = sandbox.run(*command, *more)
    assert text.startswith("12") and len(text.removesuffix("\n")) == 11
    assert sandbox.run(*command, *more) == text
    assert "not in the run's vocabulary" in sandbox.run(*command[:5], "é", status=2)


@pytest.mark.slow
def test_a_study_that_would_be_judged_by_no_test_is_refused(sandbox, done):
    overrides = [x for o in (*SMALL, "data_file=x", "metric=test_loss") for x in ("-S", o)]
    output = sandbox.run("dvc", "exp", "run", "-S", "study=chargpt", *overrides, status=255)
    assert "there is no test with test_percent = 0; set metric = 'val_loss'" in output
    assert not {stage for stage in ran(output) if stage.startswith("train")}
