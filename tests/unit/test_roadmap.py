"""The roadmap: a catalogue of what the engine really has, and a table whose every figure is worked out from rows."""

import csv
import json
import re

import pytest
from engine_runs import REPOSITORY
from test_benchmarks import cells, row
from test_studies import composed

from benchmarks import roadmap
from benchmarks.catalogue import ANY, CATALOGUE, Technique
from benchmarks.recipes import engine_settings
from benchmarks.rows import complete, paging_problems
from benchmarks.sizes import SIZES
from benchmarks.speed import experiment_jobs, experiments_of
from benchmarks.techniques import ALL_ON, ROADMAP, SLOTS
from engine.config import SETTINGS, resolve
from engine.errors import ConfigError
from stages.plan import resolve_study

BUILT = [technique for technique in CATALOGUE if technique.on]
MEASURED = [technique for technique in BUILT if technique.slot]


@pytest.mark.parametrize("technique", BUILT, ids=lambda t: t.name)
def test_a_technique_is_the_engines_own(technique):
    """Its settings are declared, take these values, and have an effect together."""
    values = {"layers": 2} | {
        name: {"micro_batch_size": 4, "first_length": 64}.get(name, 8) if value == ANY else value
        for name, value in technique.on.items()
    }
    config = resolve(values, technique.name)
    assert all(config.flat[name] == SETTINGS[name].typed(value) for name, value in values.items())


@pytest.mark.parametrize("technique", BUILT, ids=lambda t: t.name)
def test_its_tests_exist(technique):
    assert technique.tests
    for test in technique.tests:
        path, _, name = test.partition("::")
        assert re.search(rf"^def {name}\(", (REPOSITORY / path).read_text(encoding="utf-8"), re.M), test


@pytest.mark.parametrize("technique", MEASURED, ids=lambda t: t.name)
def test_its_experiment_switches_on_what_the_catalogue_says(technique):
    e = roadmap.experiment_of(technique)
    without, with_it = (e.settings(levels) for levels in e.alone(technique.slot, technique.level))
    changed = {name: value for name, value in with_it.items() if without.get(name) != value}
    assert changed and changed.keys() <= technique.on.keys() | {"micro_batch_size", "loss_chunk_tokens"}
    wanted = {k: v for k, v in technique.on.items() if v != ANY and k in changed and k != "compile"}
    assert wanted == {k: changed[k] for k in wanted}


def test_every_level_that_is_measured_is_in_the_catalogue_once():
    measured = [(slot, level) for e in ROADMAP for slot in e.varies for level in e.slots[slot]]
    assert sorted(measured) == sorted((t.slot, t.level) for t in MEASURED)
    assert set(ALL_ON) <= set(SLOTS)


def test_each_technique_without_more_processes_has_a_run_in_the_study(tmp_path):
    """And no run is there for nothing."""
    study, _ = resolve_study(composed(tmp_path / "params.yaml", "study=chargpt_techniques"))
    runs = [(own, roadmap.Loss("seen", "seen")) for own in study["runs"].values() if own]
    unfound = [t.name for t in BUILT if not t.same_loss and roadmap.loss_of(t, runs).words != "seen"]
    assert unfound == []
    assert len(runs) == sum(not t.same_loss for t in BUILT)


def test_what_is_not_built_says_why():
    assert [t.name for t in CATALOGUE if not t.on] == ["dynamic sparse attention", "buffer swapping"]
    assert all(t.why and not t.tests for t in CATALOGUE if not t.on)


def test_every_experiment_of_the_roadmap_has_valid_settings():
    size = SIZES["roadmap"]
    data = {"dataset": "text", "data_dir": "text", "study": "bench", "tokenizer": "words"}
    jobs = experiment_jobs(list(experiments_of(size)), engine_settings(size, data))
    assert len(jobs) == sum(len(e.combinations()) for e in ROADMAP)
    assert size.total_steps == SLOTS["sequence length"]["half at first"]["lengthening_steps"]


# --- the table

TF32 = next(t for t in CATALOGUE if t.name == "TF32")
FLASH = next(t for t in CATALOGUE if t.name == "attention, FlashAttention-2")
WITHOUT_TF32 = {slot: level for slot, level in ALL_ON.items() if slot != "tf32"}


def measured(technique: Technique, figures: list[tuple[dict, float, float]], **changes) -> list[dict]:
    name = roadmap.experiment_of(technique).name
    return [
        row(tokens=t, gib=g, levels=levels, experiment=name, size="roadmap", **changes)
        for levels, t, g in figures
    ]


def test_effects_alone_and_combined_by_hand():
    rows = measured(TF32, [({}, 100, 8), ({"tf32": "on"}, 150, 8), (WITHOUT_TF32, 500, 4), (ALL_ON, 505, 3)])
    assert roadmap.line(TF32, rows, []) == [
        "TF32",
        "tf32 = true",
        "tested, measured",
        *("1.50", "1.00", "1.01", "0.75"),
        "not measured",
        "smaller",
    ]


def test_what_needs_another_is_measured_alone_against_the_other():
    bf16 = {"mixed precision": "bf16"}
    others = {k: v for k, v in ALL_ON.items() if k != "attention"}
    rows = measured(
        FLASH,
        [({}, 10, 9), (bf16, 100, 8), (bf16 | {"attention": "flash"}, 130, 4), (others, 200, 4)]
        + [(others | {"attention": "flash"}, 150, 2)],
    )
    found = roadmap.line(FLASH, rows, [])
    assert found[3:7] == ["1.30", "0.50", "0.75", "0.50"] and found[-1] == "smaller but slower"


def test_what_has_no_row_is_not_measured():
    for technique in MEASURED:
        found = roadmap.line(technique, [], [])
        assert found[2] == "tested" and found[3:7] == ["not measured"] * 4 and found[-1] == "not measured"
    text = roadmap.table([], None)
    assert len(text.splitlines()) == len(CATALOGUE) + 4
    assert "TBD" not in text and cells(text, "buffer swapping")[2] == "not built"


def test_a_baseline_that_pages_is_invalid_and_so_is_each_ratio_to_it():
    """120 GiB were held on a device of 80: the driver lent the host's memory."""
    given = {
        "status": "ok",
        "step_seconds": [9.0],
        "loss_first": 10.8,
        "loss_last": 9.0,
        "peak_reserved_gib": 120.0,
    }
    paged = complete(dict(given), SIZES["roadmap"], 50258, "NVIDIA H200", 80.0)
    assert paged["status"] == "invalid"
    assert paged["problems"] == [
        "120 GiB were held at most, and the device has 80: memory was paged to the host, so neither this row nor a "
        "ratio to it means anything"
    ]
    assert complete(dict(given), SIZES["roadmap"], 50258, "NVIDIA H200", 141.0)["status"] == "ok"
    assert paging_problems({"peak_reserved_gib": None}, 80.0) == paging_problems({}, None) == []
    base = measured(TF32, [({}, 10, 120)], status="invalid", problems=paged["problems"])
    rows = base + measured(TF32, [({"tf32": "on"}, 1000, 8)])
    assert roadmap.line(TF32, rows, [])[3:7] == [
        "baseline invalid",
        "baseline invalid",
        *["not measured"] * 2,
    ]
    assert "* roadmap_precision, base: invalid: 120 GiB were held at most" in roadmap.table(rows, None)


def test_a_technique_that_failed_says_how():
    rows = measured(TF32, [({}, 100, 8)]) + measured(TF32, [({"tf32": "on"}, 1, 1)], status="out of memory")
    assert roadmap.line(TF32, rows, [])[3:5] == ["out of memory"] * 2


def test_no_technique_of_the_record_is_left_without_its_figures():
    text = roadmap.table(*roadmap.sources([REPOSITORY / "records" / "chargpt-techniques-h200"]))
    assert [one for one in text.splitlines() if roadmap.NOT_MEASURED in one] == []
    assert all(cells(text, technique.name)[2] == "tested, measured" for technique in BUILT)


def test_memory_inside_a_cuda_graph_is_what_the_allocator_held():
    graphs = next(t for t in CATALOGUE if t.name == "CUDA graphs (reduce-overhead)")
    compiled, more = {"compile": "blocks"}, {"compile mode": "reduce-overhead"}
    rows = measured(graphs, [(compiled, 100, 8), (ALL_ON, 200, 4)], peak_reserved_gib=10)
    rows += measured(
        graphs, [(compiled | more, 110, None), (ALL_ON | more, 210, None)], peak_reserved_gib=12.5
    )
    assert roadmap.line(graphs, rows, [])[3:7] == ["1.10", "1.25 held", "1.05", "1.25 held"]
    assert roadmap.line(graphs, rows, [])[-1] == "faster but larger"
    assert "* held: of the memory that the allocator held" in roadmap.table(rows, None)
    assert "* held" not in roadmap.table(measured(TF32, [({}, 1, 1), ({"tf32": "on"}, 1, 1)]), None)


@pytest.mark.parametrize(
    ("speed", "memory", "loss", "words"),
    [
        (1.5, 0.5, "identical", "faster and smaller"),
        (0.8, 0.5, "inconclusive", "smaller but slower"),
        (1.5, 1.2, "", "faster but larger"),
        (1.01, 0.99, "identical", "no gain"),
        (0.9, 1.2, "identical", "slower and larger"),
        (2.0, 0.5, "worse", "costs loss"),
        (1.1, None, "better", "faster, lowers the loss"),
        (1.01, 1.0, "better", "lowers the loss"),
    ],
)
def test_the_verdict_follows_from_the_figures(speed, memory, loss, words):
    effects = roadmap.Effect(9.0, 9.0), roadmap.Effect(speed, memory)
    assert roadmap.verdict(effects, roadmap.Loss("", loss)) == words


def study_of(root, table: bool = True):
    """Results of a study with three of the techniques, and its table."""
    runs = {
        "base": {},
        "a": {"tf32": True},
        "b": {"first_length": 64, "lengthening_steps": 9},
        "c": {"schedule": "linear"},
        "d": {"schedule": "constant"},
        "e": {"attention": "sdpa"},
    }
    results = root / "results" / "techniques"
    (results / "configs").mkdir(parents=True)
    study = {"baseline": "base", "runs": runs}
    (results / "configs" / "study.json").write_text(json.dumps(study), encoding="utf-8")
    if table:
        (root / "reports" / "techniques").mkdir(parents=True)
        head = ["run", "verdict", "difference", "difference_half_width"]
        lines = [
            ["base", "baseline", "", ""],
            ["a", "identical", "0.0", "0.0"],
            ["b", "worse", "0.02", "0.005"],
        ]
        with (root / "reports" / "techniques" / "table.csv").open("w", newline="", encoding="utf-8") as file:
            lines += [["c", "not comparable", "", ""], ["d", "missing", "", ""]]
            lines += [["e", "inconclusive", "0.0000171", "0.0000864"]]
            csv.writer(file).writerows([head, *lines])
    return results


def test_the_effect_on_the_loss_is_that_of_the_run_with_the_techniques_settings(tmp_path):
    found = roadmap.losses(study_of(tmp_path))
    by_name = {t.name: roadmap.line(t, [], found)[-2:] for t in CATALOGUE}
    assert by_name["TF32"] == ["+0.0000 ± 0.0000, identical", "not measured"]
    assert by_name["progressive sequence length"] == ["+0.0200 ± 0.0050, worse", "costs loss"]
    assert by_name["learning rate, linear decay"] == ["not comparable", "not measured"]
    assert by_name["learning rate, constant"] == ["not measured", "not measured"]  # its run has not run
    assert by_name["activation, ReLU"] == ["not measured", "not measured"]
    assert by_name["attention, SDPA"] == ["+0.000017 ± 0.000086, inconclusive", "not measured"]
    constant = next(t for t in CATALOGUE if t.name == "learning rate, constant")
    assert roadmap.line(constant, [], found)[2] == "tested"
    assert by_name["two processes, DDP"] == ["none, by its tests", "not measured"]


def test_the_command_reads_rows_and_results_and_says_what_is_missing(tmp_path, capsys):
    results = study_of(tmp_path, table=False)
    rows = tmp_path / "rows.jsonl"
    lines = measured(TF32, [({}, 100, 8), ({"tf32": "on"}, 150, 8)]) + [row("engine")]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(ConfigError, match="its study has no table.csv"):
        roadmap.table(*roadmap.sources([rows, results]))
    with pytest.raises(ConfigError, match="no such file or directory"):
        roadmap.sources([tmp_path / "nowhere"])
    (tmp_path / "results" / "techniques").rename(tmp_path / "record_results")
    record = tmp_path / "record"
    record.mkdir()
    (tmp_path / "record_results").rename(record / "results")
    rows.rename(record / "rows.jsonl")
    (record / "report").mkdir()
    (record / "report" / "table.csv").write_text(
        "run,verdict,difference,difference_half_width\na,better,-0.1,0.01\nb,x,,\nc,x,,\nd,x,,\ne,x,,\n"
    )
    roadmap.main([str(record)])
    text = capsys.readouterr().out
    assert cells(text, "TF32")[3:5] == ["1.50", "1.00"] and "-0.1000 ± 0.0100, better" in text
    assert "NVIDIA H200, torch 2.11, 0123456789ab" in text
