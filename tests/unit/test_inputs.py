"""What a plan refuses because this machine lacks it: data that settings name, and weights to start from."""

import importlib
import json
from types import SimpleNamespace

import finished_run
import pytest
from test_studies import CONF, composed

from engine import pretrained
from engine.config import Data
from engine.data import BY_NAME, DIALOGUES, LABELLED, TEXTS, places, prepare
from engine.errors import ConfigError
from stages import plan
from stages.inputs import input_problems


def planned(tmp_path, monkeypatch, *overrides: str):
    """`python -m stages.plan` in an empty directory, on a composed study."""
    composed(tmp_path / "params.yaml", *overrides)
    (tmp_path / "conf").symlink_to(CONF)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["plan"])
    plan.main.__wrapped__()


TURNS = "results/persona_turns/turns-1"
FIRST = "train it first: dvc exp run -S study=persona_turns"


def test_a_start_that_was_not_trained_is_refused_before_the_other_runs_train(tmp_path, monkeypatch, capsys):
    """As a whole: the command, its exit status, and nothing written."""
    composed(tmp_path / "params.yaml", "study=persona_best")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["plan"])
    with pytest.raises(SystemExit, match="2"):
        plan.main()
    said = capsys.readouterr().err
    assert f"runs.started: init_from = '{TURNS}': no such directory; {FIRST}\n" in said
    assert "1 problem in" in said  # for all three seeds
    assert not (tmp_path / "results").exists()


def test_a_start_of_all_runs_names_all_that_want_it(tmp_path, monkeypatch):
    """And data that are not there are told with it."""
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, monkeypatch, "study=quickstart", "init_from=/nowhere", "dataset=imdb_text",
                "tokenizer=bpe", "data_dir=/nowhere")  # fmt: skip
    assert caught.value.problems == [
        "data_dir = '/nowhere': no such directory; or leave it empty to fetch imdb_text by name",
        "runs.adamw, adamw_full_ac, no_decay, sgd: init_from = '/nowhere': no such directory",
    ]


def test_a_study_whose_start_is_left_out_can_be_planned(tmp_path, monkeypatch):
    planned(tmp_path, monkeypatch, "study=persona_best", "only=[redrawn,same]")
    assert (tmp_path / "results/persona_best/configs/same-3.toml").is_file()


def test_what_is_there_is_taken(tmp_path, monkeypatch):
    """A finished run, and a GPT-2 with a relative name."""
    monkeypatch.chdir(tmp_path)
    finished_run.write(tmp_path / TURNS, 261)
    finished_run.write(tmp_path / "gpt2", 261)
    (tmp_path / "gpt2/config.toml").unlink()
    (tmp_path / "gpt2/config.json").write_text('{"model_type": "gpt2"}')
    assert input_problems({"a-1": finished_run.config(init_from=TURNS)}) == []
    assert input_problems({"a-1": finished_run.config(init_from="gpt2")}) == []


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda run: (run / "metrics.json").unlink(), f"no metrics.json: the run is not complete; {FIRST}"),
        (
            lambda run: (run / "metrics.json").write_text(json.dumps({"status": "diverged", "step": 7})),
            "the run has diverged at step 7, so there is no final model",
        ),
        (lambda run: (run / "model.safetensors").unlink(), f"no model.safetensors; {FIRST}"),
        (
            lambda run: (run / "config.toml").unlink(),
            "neither a run's directory (config.toml) nor a Hugging Face model's (config.json); " + FIRST,
        ),
    ],
)
def test_a_start_without_a_final_model_is_refused_by_plan_and_engine_alike(
    tmp_path, monkeypatch, spoil, problem
):
    monkeypatch.chdir(tmp_path)
    model = finished_run.write(tmp_path / TURNS, 261)
    spoil(tmp_path / TURNS)
    config = finished_run.config(init_from=TURNS)
    assert input_problems({"run-1": config}) == [f"runs.run: init_from = '{TURNS}': {problem}"]
    with pytest.raises(ConfigError) as caught:
        pretrained.load_into(model, config.model)
    assert caught.value.problems == [problem]


def test_only_a_study_can_be_trained_first(tmp_path, monkeypatch):
    """A run made by hand has none, nor has a directory of another name."""
    monkeypatch.chdir(tmp_path)
    for name in ("results/by_hand/run-1", "weights/persona_turns/turns-1", "gpt2"):
        config = finished_run.config(init_from=name)
        assert input_problems({"run-1": config}) == [f"runs.run: init_from = '{name}': no such directory"]


def settings(**values) -> SimpleNamespace:
    return SimpleNamespace(**(vars(Data()) | values))


def test_what_can_be_fetched_by_name_is_what_fetches():
    """Of every data set, those that do without data_dir by asking the hub, or by another's help."""
    modules = {
        name: importlib.import_module(module) for name, module in (TEXTS | LABELLED | DIALOGUES).items()
    }
    fetching = {name for name, module in modules.items() if hasattr(module, "_fetch")}
    assert set(BY_NAME) == fetching | {"imdb_turns"}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"dataset": "text"}, "data_dir = '/nowhere': no such directory"),
        ({"dataset": "personachat"}, "data_dir = '/nowhere': no such directory; or leave it empty to fetch "
         "personachat by name"),
        ({"dataset": "imdb"}, "data_dir = '/nowhere': no such directory; or leave it empty to fetch imdb by name"),
        ({"dataset": "text", "data_dir": __file__}, f"data_dir = {__file__!r}: is a file, not a directory"),
        ({"tokenizer_dir": "/nowhere", "data_dir": ""}, "tokenizer_dir = '/nowhere': no such directory; or leave it "
         "empty to fetch GPT-2's vocabulary by name"),
    ],
)  # fmt: skip
def test_a_directory_that_is_not_there_is_told_as_that(tmp_path, values, problem):
    asked = settings(**{"data_dir": "/nowhere"} | values)
    with pytest.raises(ConfigError) as caught:
        prepare.prepare(asked, tmp_path / "tokens")
    assert caught.value.problems == [problem]


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "imdb_turns"])
def test_a_directory_without_the_files_says_what_else_would_do(tmp_path, name):
    module = importlib.import_module((TEXTS | LABELLED | DIALOGUES)[name])
    with pytest.raises(ConfigError, match=r"; or leave data_dir empty to fetch it by name"):
        module.load(settings(dataset=name, data_dir=str(tmp_path)))


def test_a_packed_file_is_there(tmp_path):
    (tmp_path / "a.txt.xz").write_bytes(b"")
    for name in ("a.txt", "a.txt.xz"):
        assert places.problems(settings(dataset="text_file", data_file=str(tmp_path / name))) == []
