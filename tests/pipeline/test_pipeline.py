"""What DVC reruns, and what it leaves alone: the observations of the design, in the order a user would make them.

The tests of this file share one repository and follow one another.
"""

import contextlib
import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from sandbox import ran

from plots import browser

pytestmark = pytest.mark.slow

BOTH = {"train@1-base", "train@1-own_lr"}


@pytest.fixture(scope="module")
def first(sandbox):
    """The output of the first run of the study, and the commit of its results."""
    output = sandbox.experiment("study=tiny")
    sandbox.run("git", "add", "-A")
    sandbox.run("git", "commit", "-qm", "tiny")
    return output


def test_the_first_run_trains_everything_and_ends_with_the_table(sandbox, first):
    assert ran(first) == {"plan", "tokenize", *BOTH, "eval@1-base", "eval@1-own_lr", "summarize"}
    assert re.search(r"own_lr .* no verdict", first), first
    assert "Report: reports/tiny/report.html" in first
    assert [row["step"] for row in sandbox.steps("base-1")] == ["0", "1", "2", "3"]
    assert sandbox.steps("base-1")[0]["lr"] == "0.01"
    assert sandbox.steps("own_lr-1")[0]["lr"] == "0.02"


def test_the_first_run_is_begun_without_a_warning(first):
    """DVC has one for each output that was never made."""
    assert "WARNING" not in first


def test_without_a_terminal_progress_is_one_json_line_an_interval(sandbox, first):
    is_step = '{"event": "step"'
    lines = [line for line in first.splitlines() if line.startswith(is_step)]
    kept = (sandbox.path / f"results/tiny/{run}-1/output.log" for run in ("base", "own_lr"))
    assert [x for log in kept for x in log.read_text().splitlines() if x.startswith(is_step)] == lines
    steps = [json.loads(line) for line in lines]
    assert [(s["run"], s["step"]) for s in steps] == [("base", 2), ("base", 4), ("own_lr", 2), ("own_lr", 4)]


def test_a_repro_of_nothing_runs_nothing(sandbox, first):
    output = sandbox.run("dvc", "repro")
    assert not ran(output) and "Data and pipelines are up to date." in output


def test_metrics_show_reads_as_one_row_a_run(sandbox, first):
    table = sandbox.run("dvc", "metrics", "show", "--md")
    rows = [line for line in table.splitlines() if line.startswith("| reports")]
    assert len(rows) == 2 and "base.json" in rows[0] and "own_lr.json" in rows[1], table


def test_a_second_study_leaves_the_first_alone_and_coming_back_reruns_nothing(sandbox, first):
    before = (sandbox.path / "results/tiny/base-1/steps.csv").read_bytes()
    output = sandbox.experiment("study=other")
    assert ran(output) == {"plan", "tokenize", "train@1-base", "eval@1-base", "summarize"}
    assert (sandbox.path / "results/tiny/base-1/steps.csv").read_bytes() == before
    back = sandbox.experiment("study=tiny")
    assert not ran(back) & (BOTH | {"tokenize", "eval@1-base", "eval@1-own_lr"}), back
    assert (sandbox.path / "results/tiny/base-1/steps.csv").read_bytes() == before


def test_a_changed_lr_reruns_only_the_runs_that_inherit_it(sandbox, first):
    output = sandbox.experiment("study=tiny", "lr=2.5e-4")
    assert ran(output) & BOTH == {"train@1-base"}, output
    assert "lr = 0.00025" in (sandbox.path / "results/tiny/configs/base-1.toml").read_text()
    assert sandbox.steps("base-1")[0]["lr"] == "0.00025"  # from -S to the optimizer
    diff = sandbox.run("dvc", "metrics", "diff", "--md")
    changed = {line.split("|")[1].strip() for line in diff.splitlines() if "test_loss" in line}
    assert changed == {"reports/tiny/metrics/base.json"}, diff
    told = sandbox.run("python", "-m", "stages.history", "tiny")
    experiment = re.search(r"(\S+), \S+: experiment from \w{7}\n", told)
    assert experiment and re.search(rf"{experiment[1]} .* base ", told), told
    assert not re.search(rf"{experiment[1]} .* own_lr ", told), told


@pytest.fixture(scope="module")
def wild(sandbox, first):
    """The output of the study with a new run, which diverges."""
    return sandbox.experiment("study=tiny", "+runs.wild={optimizer: sgd, lr: 1.0e+30, clip_norm: 0.0}")


def test_a_new_run_runs_alone(wild):
    assert ran(wild) == {"plan", "train@1-wild", "eval@1-wild", "summarize"}, wild


def test_a_run_that_diverges_is_a_result_and_the_others_go_on(sandbox, wild):
    step = json.loads((sandbox.path / "results/tiny/wild-1/metrics.json").read_text())["step"]
    assert re.search(rf"\* wild: seed 1: diverged: at step {step}: the training loss or .* not finite", wild)
    assert re.search(r"^ wild +0 .* diverged", wild, re.M), wild
    assert re.search(r"^ own_lr +1 .* no verdict", wild, re.M), wild


def test_a_hand_edit_of_params_is_refused_not_lost(sandbox, first):
    sandbox.experiment("study=tiny")
    params = sandbox.path / "params.yaml"
    edited = re.sub(r"^lr: .*$", "lr: 0.003", params.read_text(), flags=re.M)
    params.write_text(edited)
    refused = sandbox.experiment("study=tiny", status=255)
    assert "params.yaml was edited by hand" in refused and "dvc repro" in refused
    assert params.read_text() == edited
    assert "lr = 0.003" not in (sandbox.path / "results/tiny/configs/base-1.toml").read_text()
    output = sandbox.run("dvc", "repro", "train@1-base")  # runs exactly the edited file
    assert "train@1-base" in ran(output)
    assert "lr = 0.003" in (sandbox.path / "results/tiny/configs/base-1.toml").read_text()
    sandbox.run("git", "checkout", "params.yaml")


@pytest.mark.parametrize(
    "mistakes",
    [
        {
            "+learning_rate=1": "learning_rate: unknown setting (nearest: lr)",
            "lr=fast": "lr = 'fast': must be a number > 0",
            "dropout=1.5": "dropout = 1.5: must be a number ≥ 0 and < 1",
        },
        {"momentum=0.5": "momentum = 0.5: would do nothing with optimizer = adamw; it needs optimizer = sgd"},
        {"data_dir=/nowhere": "data_dir = '/nowhere': no such directory"},
    ],
    ids=["values", "effect", "data"],
)
def test_mistakes_are_named_before_anything_runs_and_nothing_is_lost(sandbox, first, mistakes):
    results = sandbox.path / "results/tiny/base-1/steps.csv"
    before = results.read_bytes()
    output = sandbox.experiment("study=tiny", *mistakes, status=255)
    assert all(message in output for message in mistakes.values()), output
    assert not {stage for stage in ran(output) if stage.startswith("train")}
    assert "Traceback" not in output
    assert results.read_bytes() == before
    sandbox.run("git", "checkout", "params.yaml")
    sandbox.run("dvc", "checkout", "--force")


def test_a_misspelt_override_is_refused_by_name(sandbox, first):
    output = sandbox.experiment("study=tiny", "learning_rte=1", status=255)
    assert "learning_rte: unknown setting (nearest: lr)" in output and "Traceback" not in output
    output = sandbox.experiment("study=tinny", status=255)
    assert output.startswith("ERROR: study=tinny: no such study (nearest: tiny). Nothing was run"), output
    assert len(output.splitlines()) == 1


def test_a_stage_exits_2_with_one_message(sandbox, first):
    sandbox.write("bad.toml", "[optimizer]\nlearning_rate = 1\n[model]\nlayers = 'four'\n")
    output = sandbox.run("python", "-m", "stages.train", "bad.toml", status=2)
    assert "2 problems in bad.toml" in output and "Traceback" not in output


def test_a_queued_grid_becomes_one_experiment_a_cell(sandbox, first):
    sandbox.run("git", "add", "-A")
    sandbox.run("git", "commit", "-qm", "before the grid")
    sandbox.run(
        "dvc", "exp", "run", "--queue", "-S", "study=tiny", "-S", "lr=0.001,0.002", "-S", "batch_size=4,8"
    )
    assert sandbox.run("dvc", "queue", "status").count("Queued") >= 4
    sandbox.run("dvc", "queue", "remove", "--queued")


def test_plots_are_drawn_without_a_network(sandbox, first):
    sandbox.run("python", "-m", "plots.offline", ".dvc/tmp/plots.html")
    sandbox.run("dvc", "plots", "show", "--out", "drawn")
    page = (sandbox.path / "drawn/index.html").read_text()
    assert "vegaEmbed" in page and not re.search(r"<(script|link)[^>]+(src|href)=.https?:", page)
    assert page.count("vegaEmbed('#") == 6
    if browser.find():  # else the unit tests have drawn the templates without one
        heights = "[...page.querySelectorAll('.vega-embed svg.marks')].map((one) => one.clientHeight)"
        assert [height > 200 for height in browser.ask(page, heights, milliseconds=500)] == [True] * 6


def trainers(sandbox) -> list[int]:
    """The process ids of the engine's processes that work in the sandbox."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            command = (process / "cmdline").read_bytes()
            if b"engine.train" in command and (process / "cwd").resolve() == sandbox.path:
                found.append(int(process.name))
    return found


def wait_until(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux")
def test_killing_dvc_ends_the_trainer_and_leaves_no_finished_looking_run(sandbox, first):
    command = ["dvc", "exp", "run", "-S", "study=tiny", "-S", "steps=10000000"]
    with subprocess.Popen(
        command,
        cwd=sandbox.path,
        env=sandbox.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as dvc:
        rows = sandbox.path / "results/tiny/base-1/steps.csv"
        started = wait_until(lambda: trainers(sandbox) and rows.exists() and rows.stat().st_size > 1000)
        dvc.kill()
    assert started
    assert wait_until(lambda: not trainers(sandbox), 20)
    assert not (sandbox.path / "results/tiny/base-1/metrics.json").exists()
    sandbox.run("git", "checkout", "params.yaml")
    assert "train@1-base" not in ran(sandbox.experiment("study=tiny"))  # the finished one is in the cache
