"""Results that are not what their place says, made on purpose and refused by name when they are read."""

import hashlib
import json
import shutil

import pytest
from fake_results import write_json, write_study

from metrics import rows, summary

SETTINGS = '[run]\nstudy = "quickstart"\nrun = "{}"\nseed = {}\n'
AGAIN = "Remove it and run `dvc repro`"


@pytest.fixture
def results(tmp_path):
    """A study in which every file says whose it is, as the engine writes it."""
    directory = write_study(tmp_path)
    for home in directory.glob("*-?"):
        run, seed = home.name.rsplit("-", 1)
        text = SETTINGS.format(run, seed)
        (home / "config.toml").write_text(text, encoding="utf-8")
        (directory / "configs" / f"{home.name}.toml").write_text(text, encoding="utf-8")
        identity = {"study": "quickstart", "run": run, "seed": int(seed)}
        identity["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        for path in (home / "metrics.json", directory / "test" / f"{home.name}.json"):
            write_json(path, json.loads(path.read_text()) | identity)
    return directory


def refused(results, message: str) -> None:
    with pytest.raises(rows.ResultsError, match=message):
        rows.read(results)


def lines(path, change) -> None:
    """Replace the lines of a file by what `change` makes of them."""
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n", encoding="utf-8")


def test_what_says_whose_it_is_is_read(results):
    assert {one.state for one in rows.read(results).runs} == {"complete"}


def test_a_directory_copied_under_another_name_is_refused(results):
    shutil.rmtree(results / "sgd-2")
    shutil.copytree(results / "sgd-1", results / "sgd-2")
    refused(results, f"sgd-2/metrics.json is of seed 1, not 2: copied from elsewhere. {AGAIN}")
    shutil.rmtree(results / "sgd-2")
    shutil.copytree(results / "adamw-2", results / "sgd-2")
    refused(results, "sgd-2/metrics.json is of run 'adamw', not 'sgd'")


def test_so_is_one_of_another_study_and_one_that_diverged(results):
    path = results / "sgd-2/metrics.json"
    write_json(path, json.loads(path.read_text()) | {"study": "other", "status": "diverged"})
    refused(results, "sgd-2/metrics.json is of study 'other', not 'quickstart'")


def test_older_results_are_known_by_their_settings(results):
    for path in results.glob("*-?/metrics.json"):
        found = json.loads(path.read_text())
        write_json(
            path, {k: v for k, v in found.items() if k not in ("study", "run", "seed", "config_sha256")}
        )
    assert {one.state for one in rows.read(results).runs} == {"complete"}
    shutil.copyfile(results / "adamw-2/config.toml", results / "sgd-2/config.toml")
    refused(results, "sgd-2/config.toml is of run 'adamw', not 'sgd'")


def test_another_runs_score_is_refused(results):
    shutil.copyfile(results / "test/adamw-2.json", results / "test/sgd-2.json")
    refused(results, "test/sgd-2.json is of run 'adamw', not 'sgd'; config_sha256 .*: copied from elsewhere")


def test_results_of_earlier_settings_are_not_shown(results):
    """The plan was made anew with another lr, and the run was not."""
    (results / "configs/sgd-2.toml").write_text(SETTINGS.format("sgd", 2) + "lr = 1\n", encoding="utf-8")
    one = rows.read(results).of("sgd")[1]
    assert (one.state, one.metrics) == ("incomplete", {})
    assert one.reason.startswith("its results are of other settings than") and "sgd-2.toml has" in one.reason


def test_a_diverged_run_is_shown_with_its_step_and_no_figures(results):
    path = results / "sgd-2/metrics.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k in ("study", "run", "seed")}
    write_json(path, kept | {"status": "diverged", "reason": "the loss rose", "step": 17})
    read = rows.read(results)
    one = read.of("sgd")[1]
    assert (one.state, one.reason, one.metrics) == ("diverged", "at step 17: the loss rose", {})
    assert "sgd" in {run.run for run in summary.summarize(read).runs}
    assert read.steps.filter(run="sgd", seed=2).is_empty()


def test_two_runs_interleaved_in_one_file_are_refused_with_file_and_line(results):
    """Epochs 6, 1, 7, 2, 8, 3 in one file: two jobs wrote it."""

    def interleave(found):
        return [found[0], *(line for pair in zip(found[6:], found[1:], strict=False) for line in pair)]

    lines(results / "sgd-2/steps.csv", interleave)
    refused(results, f"sgd-2/steps.csv, line 3: step 1 after step 6. Two runs wrote it, .*{AGAIN}")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("steps.csv", lambda f: [*f[:4], f[3], *f[4:]], "steps.csv, line 5: step 3 after step 3"),
        ("steps.csv", lambda f: f[:7] + f[8:], "steps.csv, line 8: step 8 after step 6"),
        ("steps.csv", lambda f: f[:-1], "steps.csv has 299 rows, and metrics.json says 300 steps"),
        ("evals.csv", lambda f: [*f, f[2]], "evals.csv, line 8: step 100 after step 300"),
        ("evals.csv", lambda f: [*f, f[-1]], "evals.csv, line 8: step 300 after step 300"),
    ],
)
def test_steps_twice_lost_or_going_back_are_refused(results, name, change, message):
    lines(results / "sgd-2" / name, change)
    refused(results, f"sgd-2/{message}")
