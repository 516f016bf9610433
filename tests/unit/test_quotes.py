"""Figures in documents are those of their rows: a page that says something else, or not whence, is refused."""

import json
import shutil
from pathlib import Path

import pytest
from engine_runs import REPOSITORY
from fake_classifier import classifier_study, probe
from fake_results import write_json, write_run, write_study

from engine.errors import ConfigError
from stages import quotes

STUDY = "records/fake/results"
CLASSIFIERS = "records/cls/results"
ROWS = "records/speed/rows.jsonl"
RATIO = r"engine +\S+ +(\S+)"  # its speed, not its memory, which is 1.01 too


def forget() -> None:
    """Make tables and charts again, not only once for each repository."""
    quotes.source_text.cache_clear()
    quotes._chart.cache_clear()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A repository with a study's record and one of the benchmarks, and a page that quotes both."""
    root = tmp_path_factory.mktemp("records")
    results = write_study(root)
    (results / "adamw-1" / "model.safetensors").write_text("weights")
    for left in (".sgd-1.lock", ".sgd-1.log", "adamw-1/output.log"):
        (results / left).touch()
    quotes.keep(results, root / "records" / "fake")
    (root / "records" / "speed").mkdir()
    write_speed(root / ROWS)
    page(
        root,
        f"# Page\n\n<!-- quote: {STUDY} -->\n<!-- end of quote -->\n\n"
        f"<!-- quote: {ROWS} -->\n<!-- end of quote -->\n\n"
        f'<!-- figures: {ROWS} "{RATIO}" -->\nThe engine is 1.01 × nanoGPT ([the record](x/1.77.md)), `2.88`.\n',
    )
    quotes.write(root)
    return root


@pytest.fixture
def root(records):
    """The repository, of which a test changes pages only: they are put back, and its tables made once for all."""
    yield from lend(records)


@pytest.fixture
def own(records, tmp_path):
    """A copy of the repository, whose rows a test may change."""
    return shutil.copytree(records, tmp_path / "own")


def lend(shared):
    """The directory, and after the test its pages as they were. Its rows no test may have changed."""
    before = contents(shared)
    yield shared
    after = contents(shared)
    for path in sorted(after.keys() - before.keys(), reverse=True):  # files before their directories
        path.unlink() if path.is_file() else path.rmdir()
    changed = [path for path, content in before.items() if after.get(path, b"lost") != content]
    for path in changed:
        path.write_bytes(before[path])
    assert not [path for path in changed if "records" in path.relative_to(shared).parts]


def contents(directory) -> dict:
    """What is in each file, None for a directory."""
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def write_speed(path) -> None:
    """Rows as the benchmarks write them, with round figures: the engine's are 1.01 × nanoGPT's."""
    figures = {"engine": (10_100, 42.70, 0.303), "bare": (10_500, 40.0, 0.3), "nanogpt": (10_000, 42.81, 0.3)}
    lines = (REPOSITORY / "records" / "speed-cpu" / "cpu.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["tokens_per_second"], row["step_ms"], row["host_peak_gib"] = figures[row["peer"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def page(root, text=None) -> str:
    """README.md's text, or put this into it."""
    if text is not None:
        (root / "README.md").write_text(text, encoding="utf-8")
    return (root / "README.md").read_text(encoding="utf-8")


def problems(root) -> list[str]:
    """What README.md says that its rows do not: the records' own pages are another test's."""
    return quotes.page_problems(root, root / "README.md")


def test_every_page_of_this_repository_says_what_its_rows_say():
    quotes.source_text.cache_clear()
    assert quotes.problems(REPOSITORY) == []
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    sources = [found[0] for found in quotes.QUOTE.findall(readme)]
    assert sources == [
        "records/quickstart/results",
        "records/wikitext2-h200/results",
        "records/speed-h100/speed.jsonl",
        "records/speed-h100/spreading.jsonl",
    ]


def test_a_page_is_made_from_its_rows(root):
    forget()
    assert quotes.problems(root) == []
    text = page(root)
    assert "    Study quickstart: Does activation checkpointing" in text
    assert "\n     sgd " in text and "    engine " in text and " \n" not in text
    assert quotes.quoted(root, text) == text


def test_verdicts_are_the_same_without_what_it_cost(root):
    whole, verdicts = (quotes.source_text(root, STUDY, part) for part in ("", "verdicts"))
    above, _, below = whole.partition("Cost: ")
    assert "\n- " in below
    assert verdicts == above + below[below.index("\n* ") + 1 :]  # the footnotes
    page(root, f"<!-- quote: {STUDY} verdicts -->\n<!-- end of quote -->\n")
    assert "    Study quickstart: " in quotes.quoted(root, page(root))


@pytest.mark.parametrize(
    ("quoted", "part", "is_there"),
    [
        ([], "", True),
        (["", " verdicts"], "", True),
        ([" verdicts"], "", False),  # its runs shared a GPU, and nobody meant their step time
        ([" verdicts"], " findings", False),
        ([""], " verdicts", False),
    ],
)
def test_a_figure_is_in_the_part_that_is_named_or_quoted(root, quoted, part, is_there):
    row = "^(?: adamw|- ).*"
    quotes_ = "".join(f"<!-- quote: {STUDY}{one} -->\n<!-- end of quote -->\n\n" for one in quoted)
    said = f'<!-- figures: {STUDY}{part} "{row}" -->\nA step takes 132.1 ms.\n'
    page(root, quotes.quoted(root, quotes_ + said))
    searched = part or " verdicts"
    assert problems(root) == [f"README.md: 132.1 is not in its rows ({STUDY}{searched} {row})"] * (
        not is_there
    )


def test_tables_are_the_same_without_findings(root):
    whole, tables = (quotes.source_text(root, STUDY, part) for part in ("", "tables"))
    lines = whole.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("- "))
    last = next(i for i, line in enumerate(lines) if line.startswith("* "))
    assert "Cost: " in tables and tables.splitlines() == lines[:first] + lines[last:]


def test_verdicts_have_no_table_of_seconds(tmp_path):
    """Of runs that differ in batch and checkpointing there is one, with the time of an epoch."""
    large = {"batch_size": 512, "steps": 15, "activation_checkpointing": "full", "lr": 0.001, "width": 128}
    small = {"lr": 0.001, "micro_batch_size": 64}
    classifier_study(tmp_path, runs={"small_1": small, "large_1": large}, scaling={}, criteria=[])
    whole, verdicts = (quotes.source_text(tmp_path, "results/agnews", part) for part in ("", "verdicts"))
    assert "epoch (s)" in whole
    assert "epoch (s)" not in verdicts and "Results: " in verdicts


def test_a_record_has_rows_and_no_models(root):
    kept = {path.name for path in (root / STUDY).rglob("*")}
    assert {"study.json", "metrics.json", "steps.csv", "sgd-1.json"} <= kept
    assert not {"model.safetensors", ".sgd-1.lock", ".sgd-1.log", "output.log"} & kept
    assert (root / "records/fake/report/table.md").is_file() and (root / "records/speed/README.md").is_file()
    assert not (root / "records/fake/report/curves.csv").exists()


def test_rows_that_changed_make_the_page_and_the_record_stale(own):
    write_run(own / STUDY, "sgd", 2, test_loss=3.0)
    page_, *files = [problem.split(" is not")[0] for problem in quotes.problems(own)]
    assert page_ == "README.md: a quote"
    report = "records/fake/report"
    assert {
        f"{report}/{name}" for name in ("table.md", "table.csv", "report.html", "metrics/sgd.json")
    } <= set(files)
    assert f"{report}/metrics/adamw.json" not in files


def test_colours_that_the_environment_asks_for_are_in_no_quote(root, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    quotes.source_text.cache_clear()
    assert quotes.problems(root) == []


def test_a_record_is_not_kept_from_itself(own):
    with pytest.raises(ConfigError, match="these are the record's own rows"):
        quotes.keep(own / STUDY, own / "records" / "fake")
    assert (own / STUDY / "adamw-1" / "metrics.json").is_file()


def test_a_group_of_a_row_that_took_no_part_has_no_numbers(root):
    """Of two rows, each has one of the two groups."""
    row = r"engine +\S+ +(\S+)|nanogpt +\S+ +(\S+)"
    page(root, f'<!-- figures: {ROWS} "{row}" -->\nThey are 1.01 × and 1.00 ×.\n')
    assert problems(root) == []


def test_benchmark_rows_that_changed_make_the_page_the_figure_and_the_record_stale(own):
    lines = [json.loads(line) for line in (own / ROWS).read_text().splitlines()]
    for row in lines:
        if row["peer"] == "engine":
            row["tokens_per_second"] *= 2
    (own / ROWS).write_text("".join(json.dumps(row) + "\n" for row in lines))
    found = quotes.problems(own)
    assert [problem.split(";")[0] for problem in found] == [
        "README.md: a quote is not what its rows say",
        f"README.md: 1.01 is not in its rows ({ROWS} {RATIO})",
        "records/speed/README.md is not what rows.jsonl says",
    ]


def test_what_a_command_printed_is_quoted_as_it_is(root):
    (root / "frontier.txt").write_text("\nmicro-batch  peak GiB\n          8     0.450\n\n", encoding="utf-8")
    marker = '<!-- quote: frontier.txt -->\n<!-- end of quote -->\n\n<!-- figures: frontier.txt "^ +8 " -->\n'
    made = quotes.quoted(root, marker + "Eight take 0.450 GiB.\n")
    assert "    micro-batch  peak GiB\n              8     0.450\n" in made
    page(root, made)
    assert problems(root) == []
    page(root, made.replace("take 0.450", "take 0.540"))
    assert problems(root) == ["README.md: 0.540 is not in its rows (frontier.txt ^ +8 )"]


def test_an_edited_number_in_a_quote_is_found(root):
    page(root, page(root).replace("2.619", "2.519"))
    assert len(problems(root)) == 1


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("The engine is 1.03 × nanoGPT.", "1.03 is not in its rows"),
        ("nanoGPT takes 42.81 ms.", "42.81 is not in its rows"),  # true, of another row
        ("A step takes 42.70 ms.", "42.70 is not in its rows"),  # true, of another column
    ],
)
def test_a_figure_that_its_row_does_not_have(root, said, problem):
    page(root, page(root).replace("The engine is 1.01 × nanoGPT", said))
    [found] = problems(root)
    assert problem in found


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("We are 1.13 × faster.", "…1.13 ×…"),
        ("At 0.72 of the memory.", "…0.72 of the m…"),
        ("That is 591,801 tokens/s.", "…1 tokens/s…"),
        ("It took 14.5 GiB.", "…5 GiB…"),
        ("A loss of 2.75 ± 0.25.", "…± 0…"),
        ("Steps are 12 % slower.", "…2 % slower…"),
    ],
)
def test_a_measured_figure_needs_a_source(root, said, problem):
    page(root, f"# Page\n\n{said}\n")
    assert problems(root) == [
        f'README.md: a measured figure without <!-- figures: SOURCE "ROW" -->: {problem}'
    ]


def test_sizes_and_settings_need_none(root):
    page(
        root,
        page(root) + "\n32 × 4 sequences of 1,024 tokens, lr 0.003, `1.13 ×`, 5 minutes, torch 2.13.0.\n",
    )
    assert problems(root) == []


def test_a_marker_may_stand_before_its_paragraph_and_reaches_no_further(root):
    marker = f'<!-- figures: {ROWS} "engine" -->'
    page(root, page(root) + f"\n{marker}\n\n| speed |\n|---|\n| 1.01 × |\n")
    assert problems(root) == []
    page(root, page(root) + "\nAlso 1.01 × here.\n")
    assert len(problems(root)) == 1


def test_a_table_outside_a_quote(root):
    page(root, page(root) + f"\n    run   tokens/s\n    {'─' * 30}\n    mine  9,999\n")
    assert problems(root) == ["README.md: a table of results outside a quote: run   tokens/s…"]


@pytest.mark.parametrize(
    ("marker", "problem"),
    [
        ('<!-- figures: records/gone.jsonl "engine" -->', "no such rows; python -m stages.quotes --keep"),
        (f'<!-- figures: {ROWS} "nobody" -->', "no line has 'nobody' in it"),
    ],
)
def test_a_source_that_is_not_there(root, marker, problem):
    page(root, f"{marker}\n1.01 × nanoGPT\n")
    with pytest.raises(ConfigError, match=problem):
        quotes.problems(root)


def test_an_unfinished_study_is_not_kept(tmp_path):
    results = write_study(tmp_path)
    (results / "sgd-2" / "metrics.json").unlink()
    with pytest.raises(ConfigError, match="sgd-2 is incomplete: interrupted or still running"):
        quotes.keep(results, tmp_path / "records" / "fake")
    assert not (tmp_path / "records").exists()


def test_runs_that_did_not_run_are_kept_as_missing_by_name(tmp_path):
    results = write_study(tmp_path)
    for seed in (1, 2, 3):
        shutil.rmtree(results / f"sgd-{seed}")
    record = tmp_path / "records" / "fake"
    with pytest.raises(ConfigError, match="sgd-1 is missing: has not run"):
        quotes.keep(results, record)
    with pytest.raises(ConfigError, match="--not-run adamw: it has rows, or is no run"):
        quotes.keep(results, record, ["sgd", "adamw"])
    with pytest.raises(ConfigError, match="--not-run sdg: it has rows, or is no run"):
        quotes.keep(results, record, ["sgd", "sdg"])
    assert not record.exists()
    quotes.keep(results, record, ["sgd"])
    text = quotes.source_text(tmp_path, "records/fake/results")
    assert "sgd: seeds 1, 2, 3: missing: has not run" in " ".join(text.split())


def test_a_seed_that_did_not_run_is_kept_as_missing_by_name(tmp_path):
    results, record = write_study(tmp_path), tmp_path / "records" / "fake"
    shutil.rmtree(results / "sgd-3")
    with pytest.raises(ConfigError, match="sgd-3 is missing: has not run"):
        quotes.keep(results, record)
    with pytest.raises(ConfigError, match="--not-run sgd: it has rows, or is no run or seed"):
        quotes.keep(results, record, ["sgd"])
    with pytest.raises(ConfigError, match="--not-run sgd-2: it has rows"):
        quotes.keep(results, record, ["sgd-3", "sgd-2"])
    quotes.keep(results, record, ["sgd-3"])
    assert "sgd: seed 3: missing: has not run" in quotes.source_text(tmp_path, "records/fake/results")


def test_the_command_exits_2_and_names_the_page(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    monkeypatch.setattr("sys.argv", ["quotes"])
    quotes.main()
    page(root, "We are 1.13 × faster.\n")
    with pytest.raises(SystemExit, match="2"):
        quotes.main()
    assert "README.md: a measured figure without" in capsys.readouterr().err


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A repository with a page that shows two charts, and the course of a training, of a record."""
    root = tmp_path_factory.mktemp("drawn")
    quotes.keep(classifier_study(root), root / "records" / "cls")
    (root / "docs").mkdir()
    markers = [f"<!-- chart: {CLASSIFIERS} {name} -->" for name in ("speedup", "val_accuracy")]
    quote = f"<!-- quote: {CLASSIFIERS} epochs -->\n<!-- end of quote -->"
    (root / "docs" / "agnews.md").write_text("# Page\n\n" + "\n\n".join([*markers, quote]) + "\n")
    quotes.write(root)
    return root


@pytest.fixture
def illustrated(drawn):
    """The repository, of which a test changes docs/ only: it is put back, and its charts drawn once for all."""
    yield from lend(drawn)


def test_charts_are_drawn_beside_the_page_and_shown_in_it(illustrated):
    forget()
    assert quotes.problems(illustrated) == []
    text = (illustrated / "docs" / "agnews.md").read_text()
    assert f"<!-- chart: {CLASSIFIERS} speedup -->\n![Speedup over processes](agnews-speedup.svg)\n" in text
    files = sorted((illustrated / "docs").glob("*.svg"))
    assert [file.name for file in files] == ["agnews-speedup.svg", "agnews-val_accuracy.svg"]
    for file in files:
        assert file.stat().st_size < 200_000
        assert (
            file.read_text().startswith("<svg") and 'xmlns="http://www.w3.org/2000/svg"' in file.read_text()
        )
    assert ">small_2: 1.25 × (strong)<" in files[0].read_text()
    again = {file: file.read_bytes() for file in files}
    quotes.write(illustrated)
    assert (illustrated / "docs" / "agnews.md").read_text() == text
    assert {file: file.read_bytes() for file in files} == again


def test_charts_of_one_name_of_two_records_have_a_file_each(monkeypatch):
    monkeypatch.setattr(quotes, "_chart", lambda root, source, name: (name.title(), f"<svg>{source}</svg>"))
    sources = ("records/a/results", "records/b/results")
    text = "\n".join(f"<!-- chart: {source} grid -->" for source in sources)
    text, drawn = quotes.illustrated(
        Path("."), Path("docs/page.md"), f"{text}\n<!-- chart: {sources[0]} one -->"
    )
    assert {file.name: svg for file, svg in drawn.items()} == {
        "page-a-grid.svg": "<svg>records/a/results</svg>",
        "page-b-grid.svg": "<svg>records/b/results</svg>",
        "page-one.svg": "<svg>records/a/results</svg>",
    }
    assert "![Grid](page-a-grid.svg)" in text and "![Grid](page-b-grid.svg)" in text


def test_the_course_of_a_training_is_quoted_like_a_table(illustrated):
    text = (illustrated / "docs" / "agnews.md").read_text()
    assert "small_1: each evaluation, means over 3 seeds" in text and "Cost:" not in text
    (illustrated / "docs" / "agnews.md").write_text(text.replace("91.40   best", "92.40   best"))
    assert [problem.split(";")[0] for problem in quotes.problems(illustrated)] == [
        "docs/agnews.md: a quote is not what its rows say"
    ]


def test_a_chart_that_its_rows_do_not_draw_is_found(drawn, tmp_path):
    root = shutil.copytree(drawn, tmp_path / "own")
    faster = probe(
        "small_2", loaded_seconds=[0.006, 0.006], ready_seconds=[0.0055] * 2, alone_seconds=[0.005] * 2
    )
    for seed in (1, 2, 3):
        write_json(root / CLASSIFIERS / f"small_2-{seed}" / "scaling.json", faster)
    found = [problem.split(";")[0] for problem in quotes.problems(root)]
    assert "docs/agnews-speedup.svg is not what its rows draw" in found
    assert "docs/agnews-val_accuracy.svg is not what its rows draw" not in found


def test_an_edited_or_a_lost_picture_is_found(illustrated):
    file = illustrated / "docs" / "agnews-speedup.svg"
    file.write_text(file.read_text().replace("1.25 ×", "1.85 ×"))
    said = ["docs/agnews-speedup.svg is not what its rows draw; python -m stages.quotes --write"]
    assert quotes.problems(illustrated) == said
    file.unlink()
    assert quotes.problems(illustrated) == said


def test_a_picture_without_a_marker_and_a_marker_without_its_picture(illustrated):
    page_ = illustrated / "docs" / "agnews.md"
    text = page_.read_text()
    page_.write_text(text.replace("![Speedup over processes](agnews-speedup.svg)", ""))
    assert "docs/agnews.md: a chart is not shown below its marker" in quotes.problems(illustrated)[0]
    page_.write_text(text.replace(f"<!-- chart: {CLASSIFIERS} speedup -->\n", ""))
    assert quotes.problems(illustrated) == [
        "docs/agnews-speedup.svg: no marker of docs/agnews.md draws it; remove it"
    ]


def test_a_chart_is_small(illustrated, monkeypatch):
    monkeypatch.setattr(quotes, "LARGEST_CHART", 1000)
    assert quotes.problems(illustrated)[0] == "docs/agnews-speedup.svg is larger than 1,000 bytes"


@pytest.mark.parametrize(
    ("source", "name", "problem"),
    [
        (CLASSIFIERS, "speedups", "it has no chart speedups; it has test_accuracy, samples_per_second"),
        ("records/gone", "speedup", "no such results, of which speedup is to be a chart"),
    ],
)
def test_a_chart_that_there_is_none_of(illustrated, source, name, problem):
    (illustrated / "docs" / "agnews.md").write_text(f"<!-- chart: {source} {name} -->\n")
    with pytest.raises(ConfigError, match=problem):
        quotes.problems(illustrated)
