"""The experiments of WikiText-2 through DVC, in a reduced form: another text, a model of one layer, a few steps."""

import json

import pytest
from sandbox import ran

REDUCED = (
    "dataset=text",
    "layers=1",
    "heads=1",
    "width=16",
    "context=16",
    "steps=4",
    "batch_size=4",
    "warmup_steps=1",
    "budget=256",
    "precision=fp32",
    "step_graph=false",
    "eval_interval=4",
    "eval_batch_size=4",
    "seeds=[1]",
)


def experiment(box, study: str, *more: str, stage: tuple[str, ...] = ()) -> str:
    overrides = [f"study={study}", f"data_dir={box.path / '.text'}", *REDUCED, *more]
    return box.run("dvc", "exp", "run", *[x for o in overrides for x in ("-S", o)], *stage)


@pytest.mark.slow
def test_the_comparison_of_optimizers_ends_in_a_conclusion(sandbox):
    layers = ("gradient_norm_layers=[0]", "activation_norm_layers=[0]")
    two = ("~runs.sgd", "~runs.adam", "falsified_by.when=[{run: muon, verdict: [worse, identical]}]")
    output = experiment(sandbox, "wikitext2_optimizers", *layers, *two)
    assert {f"train@1-{name}" for name in ("adamw", "muon")} <= ran(output)
    said = " ".join(output.split())
    assert "Hypothesis: Muon ends lower than AdamW" in said and "Falsified by: Muon is worse" in said
    assert "256 tokens a run; 2 runs × 1 seed" in said
    assert "runs chosen by wikitext2_optimizer_grid on seed 101, by val_loss" in said
    # One seed is no verdict, and what has no verdict decides nothing.
    assert "The hypothesis is undecided: muon against adamw: no verdict" in said
    results, report = (sandbox.path / place / "wikitext2_optimizers" for place in ("results", "reports"))
    ledger = json.loads((results / "muon-1/ledger.json").read_text())["entries"]
    assert all(line["agrees"] for line in ledger)
    assert "matrices of the blocks, in bfloat16" in next(
        x["in_effect"] for x in ledger if x["what"] == "muon"
    )
    assert "Gradient norm" in (report / "report.html").read_text()


@pytest.mark.slow
def test_a_grid_is_written_out_as_runs_of_the_pipeline(sandbox):
    """Up to the plan: DVC itself makes its stages of the runs; composing twice refuses nothing."""
    sizes = {"b16": "{batch_size: 2, steps: 8}", "b64": "{batch_size: 4, steps: 4}"}
    grid = ("grid.adamw.over.lr=[0.01,0.1]", "~grid.adamw.over.batch.b256")
    for name, size in sizes.items():
        grid += (f"grid.adamw.over.batch.{name}={size}", f"grid.adamw.over.batch.{name}.warmup_steps=1")
    names = [f"adamw_lr_{lr}_{b}" for lr in ("0p01", "0p1") for b in sizes]
    grid += (f"baseline={names[0]}", "~falsified_by", "~hypothesis", "axis=tokens", "frozen=[]")
    grid += ("gradient_norm_layers=[0]", "activation_norm_layers=[0]")
    for _ in range(2):
        experiment(sandbox, "wikitext2_lr_batch", *grid, stage=("plan",))
    planned = sandbox.path / "results/wikitext2_lr_batch/configs"
    assert {path.stem for path in planned.glob("adamw*.toml")} == {f"{name}-1" for name in names}
    stages = sandbox.run("dvc", "stage", "list", "--name-only").split()
    assert {f"train@1-{name}" for name in names} <= set(stages)
    assert set(json.loads((planned / "study.json").read_text())["runs"]) == set(names)
