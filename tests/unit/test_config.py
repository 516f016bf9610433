"""Settings: every mistake is named, with what is allowed, all at once; and no value is changed."""

import subprocess
import sys

import pytest
from engine_runs import REPOSITORY, toml
from test_studies import composed

from engine.config import (
    SECTIONS,
    SETTINGS,
    effect_problems,
    is_effective,
    load,
    resolve,
    tables,
    value_problems,
)
from engine.errors import ConfigError
from engine.optimizers import OPTIMIZERS
from engine.rundir import toml as resolved_toml
from stages.plan import resolve_study

OF_DIALOGUES = {"model": "double_heads", "dataset": "personachat", "tokenizer": "gpt2"}


def problems(**values) -> list[str]:
    with pytest.raises(ConfigError, match="problem") as caught:
        resolve(values, "here")
    return caught.value.problems


def problem(**values) -> str:
    (found,) = problems(**values)
    return found


def written(tmp_path, text: str):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def file_problems(tmp_path, text: str) -> list[str]:
    with pytest.raises(ConfigError, match=r"run\.toml") as caught:
        load(written(tmp_path, text))
    return caught.value.problems


# --- the declarations


@pytest.mark.parametrize("name", SETTINGS)
def test_every_declaration_says_what_it_means_and_has_a_valid_default(name):
    s = SETTINGS[name]
    assert len(s.meaning) >= 5 and s.allowed
    assert value_problems({name: s.default}) == []
    for other, wanted in s.only_if.items():
        choices = (True, False) if SETTINGS[other].type is bool else SETTINGS[other].rule["choices"]
        accepted = all(SETTINGS[other].accepts(value) for value in wanted)
        assert set(wanted) <= set(choices) if choices else accepted and SETTINGS[other].default in wanted
    if s.rule["choices"]:
        assert s.default in s.rule["choices"]


def test_nothing_given_is_a_complete_valid_run():
    config = resolve({}, "here")
    assert (config.optimizer.lr, config.model.layers, config.training.precision) == (1e-3, 4, "fp32")
    assert config.flat == {name: s.default for name, s in SETTINGS.items()}


def test_a_run_knows_where_it_writes():
    config = resolve({"study": "s1", "run": "sgd", "seed": 7}, "here")
    assert config.directory.as_posix() == "results/s1/sgd-7"
    assert config.tokens_directory.as_posix() == "tokens/s1"


# --- one mistake


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("learning_rate", "lr"),
        ("optimiser", "optimizer"),
        ("warmup", "warmup_steps"),
        ("n_layers", "layers"),
        ("num_heads", "heads"),
        ("batchsize", "batch_size"),
        ("activation_checkpoint", "activation_checkpointing"),
        ("LR", "lr"),
        ("eval_intervall", "eval_interval"),
        ("grad_clip_norm", "clip_norm"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(name, nearest):
    assert problem(**{name: 1}) == f"{name}: unknown setting (nearest: {nearest})"


def test_a_name_like_no_other_gets_no_hint():
    assert problem(zzqx=1) == "zzqx: unknown setting"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": True}, "layers = True: must be a whole number ≥ 1"),
        ({"layers": 2.0}, "layers = 2.0: must be a whole number ≥ 1"),
        ({"layers": "2"}, "layers = '2': must be a whole number ≥ 1"),
        ({"lr": "6e-4"}, "lr = '6e-4': must be a number > 0"),
        ({"lr": True}, "lr = True: must be a number > 0"),
        ({"lr": float("nan")}, "lr = nan: must be a number > 0"),
        ({"lr": float("inf")}, "lr = inf: must be a number > 0"),
        ({"bias": 1}, "bias = 1: must be true or false"),
        ({"bias": "true"}, "bias = 'true': must be true or false"),
        ({"study": 3}, "study = 3: must be text"),
        ({"activation_norm_layers": 1}, "activation_norm_layers = 1: must be a list of whole numbers"),
        (
            {"activation_norm_layers": [0, True]},
            "activation_norm_layers = [0, True]: must be a list of whole numbers",
        ),
        ({"precision": 16}, "precision = 16: must be one of fp32, bf16, fp16"),
        ({"dropout": None}, "dropout = None: must be a number ≥ 0 and < 1"),
    ],
)
def test_a_wrong_type_is_told_with_what_is_allowed(values, message):
    assert problem(**values) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0}, "lr = 0: must be a number > 0"),
        ({"lr": -1e-3}, "lr = -0.001: must be a number > 0"),
        ({"dropout": 1.0}, "dropout = 1.0: must be a number ≥ 0 and < 1"),
        ({"min_lr_fraction": 1.5}, "min_lr_fraction = 1.5: must be a number ≥ 0 and ≤ 1"),
        ({"steps": 0}, "steps = 0: must be a whole number ≥ 1"),
        ({"seed": -1}, "seed = -1: must be a whole number ≥ 0 and ≤ 4294967295"),
        ({"seed": 2**32}, "seed = 4294967296: must be a whole number ≥ 0 and ≤ 4294967295"),
        ({"precision": "fp8"}, "precision = 'fp8': must be one of fp32, bf16, fp16"),
        ({"optimizer": "sdg"}, f"optimizer = 'sdg': must be one of {', '.join(OPTIMIZERS)}"),
    ],
)
def test_a_value_out_of_range_is_told_and_never_clamped(values, message):
    assert problem(**values) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"momentum": 0.5},
            "momentum = 0.5: would do nothing with optimizer = adamw; it needs optimizer = sgd",
        ),
        (
            {"optimizer": "sgd", "beta1": 0.8},
            "beta1 = 0.8: would do nothing with optimizer = sgd; it needs optimizer = adamw or adam or adamw8bit or "
            "muon or spam or adamwspam_legacy or adamwprune",
        ),
        (
            {"schedule": "constant", "min_lr_fraction": 0.5},
            "min_lr_fraction = 0.5: would do nothing with schedule = constant; "
            "it needs schedule = cosine or linear",
        ),
        (
            {"checkpoint_every": 3},
            "checkpoint_every = 3: would do nothing with activation_checkpointing = none; "
            "it needs activation_checkpointing = every_n",
        ),
        (
            {"vocab_size": 512},
            "vocab_size = 512: would do nothing with tokenizer = bytes; it needs tokenizer = bpe or "
            "hashed_words or frequent_words",
        ),
        (
            {"data_dir": "x"},
            "data_dir = 'x': would do nothing with dataset = stdlib; it needs dataset = wikitext2 or "
            "tinyshakespeare or text or fineweb_edu or imdb_text or ag_news or imdb or table or personachat or "
            "imdb_turns or dialogues",
        ),
    ],
)
def test_a_setting_that_would_do_nothing_is_an_error(values, message):
    assert problem(**values) == message


def test_a_setting_at_its_default_may_stand_anywhere():
    assert resolve({"momentum": 0.9, "optimizer": "adamw", "checkpoint_every": 2}, "here") == resolve(
        {}, "here"
    )
    assert effect_problems({"optimizer": "sgd", "momentum": 0.5}) == {}
    assert is_effective("momentum", {"optimizer": "sgd"}) and not is_effective("momentum", {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 30, "heads": 4}, "width = 30: must be a multiple of heads = 4"),
        ({"batch_size": 9, "processes": 2}, "batch_size = 9: must be a multiple of processes = 2"),
        (
            {"batch_size": 8, "micro_batch_size": 3},
            "batch_size = 8: must be a multiple of micro_batch_size × processes = 3 × 1",
        ),
        (
            {"batch_size": 8, "micro_batch_size": 4, "processes": 4},
            "batch_size = 8: must be a multiple of micro_batch_size × processes = 4 × 4",
        ),
        ({"warmup_steps": 101}, "warmup_steps = 101: must be ≤ steps = 100"),
        (
            {**OF_DIALOGUES, "eval_train_rows": 101, "max_train_rows": 100},
            "eval_train_rows = 101: must be ≤ max_train_rows = 100",
        ),
        ({"eval_stride": 129}, "eval_stride = 129: must be ≤ context = 128"),
        (
            {"activation_checkpointing": "every_n", "checkpoint_every": 5},
            "checkpoint_every = 5: must be ≤ layers = 4",
        ),
        ({"activation_norm_layers": [0, 4]}, "activation_norm_layers = [0, 4]: blocks are numbered 0 to 3"),
        ({"activation_norm_layers": [-1]}, "activation_norm_layers = [-1]: blocks are numbered 0 to 3"),
        ({"gradient_norm_layers": [0, 4]}, "gradient_norm_layers = [0, 4]: blocks are numbered 0 to 3"),
        ({"gradient_norm_layers": [1, 1]}, "gradient_norm_layers = [1, 1]: names a block twice"),
        (
            {"shard_samples": False},
            "shard_samples = false: all processes would read the same samples, which is work that counts once; set "
            "shard_samples = true, or on_shared_samples = 'report' to train all the same and have its figures say "
            "so",
        ),
        (
            {"shard_samples": False, "on_shared_samples": "report", "processes": 1},
            "shard_samples = false: would do nothing where one process reads the samples",
        ),
        (
            {"lr_rule": "linear"},
            "lr_rule = 'linear': needs lr_batch_size, the batch size for which lr = 0.001 is meant",
        ),
        ({"run": "a/b"}, "run = 'a/b': letters, digits and _ only, because it names files and stages"),
        ({"study": ""}, "study = '': letters, digits and _ only, because it names files and stages"),
    ],
)
def test_rules_between_settings(values, message):
    assert problem(**values) == message


def test_processes_that_all_read_the_whole_step_need_not_divide_it():
    settings = {"batch_size": 9, "processes": 2, "on_shared_samples": "report"}
    config = resolve({**settings, "shard_samples": False}, "here")
    assert config.rank_sequences(2) == 9
    assert resolve({"batch_size": 8}, "here").rank_sequences(2) == 4
    message = "batch_size = 9: must be a multiple of micro_batch_size × processes = 2 × 1"
    assert problem(**settings, shard_samples=False, micro_batch_size=2) == message


@pytest.mark.parametrize(
    ("settings", "peak"),
    [
        ({"lr": 0.0003, "batch_size": 96}, 0.0003),
        ({"lr": 0.0003, "batch_size": 96, "lr_rule": "linear", "lr_batch_size": 32}, 0.0009),
        ({"lr": 0.001, "batch_size": 8, "lr_rule": "linear", "lr_batch_size": 24}, 0.001 / 3),
        ({"lr": 0.0003, "batch_size": 32, "lr_rule": "linear", "lr_batch_size": 32}, 0.0003),
        ({"lr": 0.0003, "batch_size": 128, "lr_rule": "sqrt", "lr_batch_size": 32}, 0.0006),
        ({"lr": 0.5, "batch_size": 64, "lr_rule": "sqrt", "lr_batch_size": 32}, 0.5 * 2**0.5),
    ],
)
def test_lr_follows_the_batch_size_exactly(settings, peak):
    """Exactly: 0.0003 × 96 / 32 is 0.0009, and not the nearest number below it that floats come to."""
    config = resolve(settings, "here")
    assert config.peak_lr == peak and config.optimizer.lr == settings["lr"]


# --- several mistakes


def test_all_problems_are_told_at_once():
    found = problems(
        learning_rate=1e-3,
        layers="six",
        dropout=1.5,
        momentum=0.5,
        width=30,
        heads=4,
        batch_size=7,
        micro_batch_size=2,
        warmup_steps=200,
    )
    assert [p.split(":")[0].split(" ")[0] for p in found] == [
        "learning_rate",
        "layers",
        "dropout",
        "momentum",
        "width",
        "batch_size",
        "warmup_steps",
    ]


def test_a_wrong_value_causes_no_second_message():
    """What hangs on a value that is wrong cannot be judged: it would only distract from the mistake."""
    assert problem(optimizer="sdg", momentum=0.5).startswith("optimizer = 'sdg'")
    assert problem(layers=0, activation_norm_layers=[7]).startswith("layers = 0")
    assert problem(steps=-1, warmup_steps=500).startswith("steps = -1")


def test_the_message_names_the_file_and_counts():
    with pytest.raises(ConfigError, match="here") as caught:
        resolve({"lr": 0, "steps": 0}, "here")
    assert str(caught.value) == (
        "2 problems in here:\n  - lr = 0: must be a number > 0\n  - steps = 0: must be a whole number ≥ 1"
    )


# --- files


def test_a_file_is_read_as_written(tmp_path):
    config = load(
        written(
            tmp_path,
            "[optimizer]\nlr = 2.5e-4\n[model]\nlayers = 3\n[logging]\nactivation_norm_layers = [0, 2]\n",
        )
    )
    assert (config.optimizer.lr, config.model.layers, config.logging.activation_norm_layers) == (
        2.5e-4,
        3,
        (0, 2),
    )


def test_a_whole_number_does_for_a_number(tmp_path):
    lr = load(written(tmp_path, "[optimizer]\nlr = 1\n")).optimizer.lr
    assert lr == 1.0 and isinstance(lr, float)


def test_settings_in_the_wrong_place(tmp_path):
    found = file_problems(
        tmp_path,
        "steps = 5\nwarmup = 3\nzzqx = 1\n[training]\nlr = -1.0\n[modell]\nlayers = 2\n"
        "[model]\ndepth = 2\n[model.deep]\nx = 1\n",
    )
    assert found == [
        "steps: belongs under [training]",
        "warmup: unknown setting (nearest: warmup_steps)",
        "zzqx: unknown setting",
        "lr: belongs under [optimizer], not [training]",
        f"[modell]: unknown table; the tables are {', '.join(SECTIONS)}",
        "lr = -1.0: must be a number > 0",
        *value_problems({"depth": 2, "deep": {"x": 1}}),
    ]


def test_files_that_cannot_be_read(tmp_path):
    assert "not valid TOML" in file_problems(tmp_path, "[model\n")[0]
    assert "not valid TOML" in file_problems(tmp_path, "[model]\nlayers = 2\nlayers = 3\n")[0]
    (tmp_path / "run.toml").write_bytes(b"[run]\nrun = '\xff'\n")
    with pytest.raises(ConfigError, match=r"run\.toml:\n  - not valid TOML: 'utf-8'"):
        load(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match=r"absent\.toml:\n  - no such file"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"optimizer": "sgd", "momentum": 0.5, "nesterov": True, "lr": 1e-5},
        {"schedule": "constant", "activation_checkpointing": "every_n", "checkpoint_every": 3},
        {
            "activation_norm_layers": [0, 3],
            "tokenizer": "bpe",
            "vocab_size": 300,
            "dataset": "text",
            "data_dir": "é x",
        },
    ],
)
def test_what_a_run_leaves_reads_back_the_same(tmp_path, values):
    config = resolve(values, "here")
    again = load(written(tmp_path, resolved_toml(config)))
    assert again == config and tables(again) == tables(config)
    assert load(written(tmp_path, toml(**values))) == config


def test_what_has_no_effect_is_not_written():
    written_out = tables(resolve({"optimizer": "sgd"}, "here"))
    assert "beta1" not in written_out["optimizer"] and written_out["optimizer"]["momentum"] == 0.9
    assert written_out["memory"] == {
        "activation_checkpointing": "none",
        "on_out_of_memory": "stop",
        "memory_limit_gib": 0.0,
    }


# --- the command


def engine_train(directory, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-X", "importtime", "-m", "engine.train", *arguments]
    return subprocess.run(
        command,
        cwd=directory,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_bad_file_ends_with_one_message_before_torch_is_imported(tmp_path):
    directory = tmp_path / "work"
    directory.mkdir()
    written(tmp_path, "[optimizer]\nlearning_rate = 1e-3\nlr = -1.0\n[model]\nwidth = 30\n")
    done = engine_train(directory, "../run.toml")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "engine.config" in imported and not {"torch", "numpy", "torchtitan"} & imported
    assert [line for line in lines if not line.startswith("import time:")] == [
        "error: 3 problems in ../run.toml:",
        "  - learning_rate: unknown setting (nearest: lr)",
        "  - lr = -1.0: must be a number > 0",
        "  - width = 30: must be a multiple of heads = 4",
    ]
    assert done.stdout == "" and list(directory.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("a.toml", "b.toml")])
def test_a_wrong_command_line_shows_the_right_one(tmp_path, arguments):
    done = engine_train(tmp_path, *arguments)
    assert done.returncode == 2 and "usage: python -m engine.train FILE.toml" in done.stderr
    assert "Traceback" not in done.stderr


def test_rows_that_are_scored_may_be_all_that_are_used():
    """With max_train_rows = 0 only the files can tell how many there are."""
    for most in (100, 0):
        found = resolve({**OF_DIALOGUES, "eval_train_rows": 100, "max_train_rows": most}, "here")
        assert found.evaluation.eval_train_rows == 100


def test_what_a_cpu_cannot_is_told_at_once_where_the_settings_say_cpu():
    asked = {"tf32": True, "allocator": "expandable_segments", "float8": True, "precision": "bf16"}
    assert problems(device="cpu", **asked) == [
        f"{name}: would do nothing with device = 'cpu'; it needs a GPU"
        for name in ("tf32 = true", "allocator = 'expandable_segments'", "float8 = true")
    ]
    assert resolve({"device": "auto", **asked}, "here").runtime.tf32  # only the machine can tell
    assert resolve({"device": "cpu"}, "here").run.device == "cpu"


def test_the_plan_tells_them_of_all_runs_before_anything_is_tokenized(tmp_path):
    wrong = ("study=persona_best", "device=cpu", "max_train_rows=2399")
    with pytest.raises(ConfigError) as caught:
        resolve_study(composed(tmp_path / "params.yaml", *wrong))
    assert caught.value.problems == [
        "all runs: tf32 = true: would do nothing with device = 'cpu'; it needs a GPU",
        "all runs: eval_train_rows = 2400: must be ≤ max_train_rows = 2399",
    ]
