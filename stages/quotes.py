"""Keeps the figures in documents as their rows have them, and the rows of a study as a record.

    python -m stages.quotes                             exit 2, naming each document that says what its rows do not
    python -m stages.quotes --write                     make quoted tables, and the records' own pages, again
    python -m stages.quotes --keep results/X records/X  copy the rows of a study, without models, and then --write
    … --keep results/X records/X --not-run RUN …        the same without runs that no seed was trained of yet
    … --keep results/X records/X --not-run RUN-SEED …   the same without single seeds

A source is a study's results directory, a file of the benchmarks' rows, or a .txt file: what a command printed. In
Markdown:

    <!-- quote: SOURCE -->              its tables, from here …
    <!-- end of quote -->               … to here
    <!-- quote: SOURCE epochs -->       the same of how the baseline's training went
    <!-- quote: SOURCE tables -->       without the findings, which are many where runs are
    <!-- quote: SOURCE verdicts -->     without costs and findings: of runs that shared a GPU
    <!-- quote: SOURCE findings -->     the findings alone
    <!-- quote: SOURCE roadmap -->      a record's rows as the roadmap of techniques
    <!-- chart: SOURCE NAME -->         a chart of a study's report, in PAGE-NAME.svg, is shown below this; in
                                        PAGE-RECORD-NAME.svg where several records have a chart NAME
    <!-- figures: SOURCE "ROW" -->      every decimal number of this paragraph, or of the next, is in a line that the
                                        regular expression ROW finds; if ROW has groups, in what they match. Lines
                                        are of all that SOURCE says; or, where the page
                                        quotes its verdicts and no costs, of those
    <!-- figures: SOURCE PART "ROW" --> of its epochs, tables, verdicts, findings or roadmap

A table of results outside a quote, and a sentence with measured figures without its source, are refused too.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from rich.console import Console

from engine.errors import ConfigError, command
from metrics import rows, summary
from plots import figures
from stages import summarize

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "records/README.md", "benchmarks/README.md")
LEFT_BEHIND = (
    "*.safetensors",
    "tokenizer.json",
    "*.lock",
    "*.log",
    "*.gz",
    ".gitignore",
)  # models, traces and what was printed are no rows
AGAIN = "python -m stages.quotes --write"
PART = "( epochs| tables| verdicts| findings| roadmap)?"
QUOTE = re.compile(rf"<!-- quote: (\S+?){PART} -->\n(.*?)<!-- end of quote -->", re.DOTALL)
CHART = re.compile(r"<!-- chart: (\S+) (\S+) -->(?:\n!\[[^\]]*\]\([^)]*\))?")
LARGEST_CHART = 200_000  # bytes: pages are read in a browser
FIGURES = re.compile(rf'<!-- figures: (\S+){PART} "([^"]+)" -->')
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
TABLE = re.compile(r"─{20}")  # the line under the heads of every table of ours
DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")
MEASURED = re.compile(
    r"\d\.\d+ ×|\d\.\d+ of the \w|\d tokens/s|\d GiB|± ?\d|\d nats|\d % (more|less|fewer|faster|slower)"
)
NOT_PROSE = re.compile(r"`[^`\n]*`|\]\([^)]*\)")  # code, and where links lead


@cache
def source_text(root: Path, source: str, part: str = "") -> str:
    """The tables of a source, as they are printed.

    part: "epochs", of the baseline's training; "tables", without findings; "verdicts", without costs too; "findings";
        or "roadmap".

    Raises:
        ConfigError: there is no such source.
    """
    path = root / source
    if part == "roadmap" and path.exists():
        return _run("benchmarks.roadmap", path).strip("\n")
    if path.is_dir():
        page = io.StringIO()
        console = Console(  # whatever the environment says of colours
            file=page, width=summarize.WIDTH, markup=False, emoji=False, highlight=False, color_system=None
        )
        study = _study(path)
        if part == "epochs":
            summarize.show_course(console, study)
        elif part == "findings":
            summarize.show_findings(console, study)
        else:
            summarize.show(console, study, costs=part != "verdicts", details=not part)
        lines = (line.rstrip() for line in page.getvalue().splitlines())
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    if not path.is_file():
        raise ConfigError(
            "no such rows; python -m stages.quotes --keep RESULTS RECORD makes a record", source
        )
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8").strip("\n")
    return _run("benchmarks.table", path).strip("\n")


def _run(module: str, *paths: Path) -> str:
    """What a command of this repository prints: nobody may import the benchmarks."""
    arguments = [sys.executable, "-m", module, *(str(path.resolve()) for path in paths)]
    return subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True, cwd=REPOSITORY).stdout


def _study(directory: Path) -> summary.Summary:
    try:
        return summary.summarize(rows.read(directory))
    except rows.ResultsError as error:
        raise ConfigError(str(error)) from None


def quoted(root: Path, text: str) -> str:
    """A page's text with every quote made again from its source."""

    def again(found: re.Match) -> str:
        source, part = found[1], found[2] or ""
        lines = source_text(root, source, part.strip()).splitlines()
        block = "\n".join(f"    {line}" if line else "" for line in lines)
        return f"<!-- quote: {source}{part} -->\n\n{block}\n\n<!-- end of quote -->"

    return QUOTE.sub(again, text)


def illustrated(root: Path, page: Path, text: str) -> tuple[str, dict[Path, str]]:
    """A page's text with every chart shown below its marker, and what is in the files beside it.

    Charts of one name, of several records, have their record's in their file's name.
    """
    drawn: dict[Path, str] = {}
    of_name = Counter(name for _, name in {found.groups() for found in CHART.finditer(text)})

    def again(found: re.Match) -> str:
        source, name = found.groups()
        title, svg = _chart(root, source, name)
        record = f"{Path(source).parent.name}-" if of_name[name] > 1 else ""
        file = page.with_name(f"{page.stem}-{record}{name}.svg")
        if drawn.get(file, svg) != svg:
            raise ConfigError(f"two charts would be {file.name}", source)
        drawn[file] = svg
        return f"<!-- chart: {source} {name} -->\n![{title}]({file.name})"

    return CHART.sub(again, text), drawn


@cache
def _chart(root: Path, source: str, name: str) -> tuple[str, str]:
    """A chart's title and SVG.

    Raises:
        ConfigError: the study has no such chart.
    """
    if not (root / source).is_dir():
        raise ConfigError(f"no such results, of which {name} is to be a chart", source)
    study, charts = _charts(root / source)
    if name not in charts:
        raise ConfigError(f"it has no chart {name}; it has {', '.join(charts)}", source)
    return charts[name].title, figures.picture(charts[name], name, study) + "\n"


@cache
def _charts(directory: Path) -> tuple[summary.Summary, dict[str, figures.Drawn]]:
    study = _study(directory)
    return study, figures.every(study)


def _chart_problems(root: Path, page: Path, text: str) -> list[str]:
    """Pictures beside a page that are not what its markers' rows draw."""
    name = page.relative_to(root)
    shown, drawn = illustrated(root, page, text)
    problems = [f"{name}: a chart is not shown below its marker; {AGAIN}"] * (shown != text)
    for file, svg in drawn.items():
        if not file.is_file() or file.read_text(encoding="utf-8") != svg:
            problems.append(f"{file.relative_to(root)} is not what its rows draw; {AGAIN}")
        if len(svg.encode()) > LARGEST_CHART:
            problems.append(f"{file.relative_to(root)} is larger than {LARGEST_CHART:,} bytes")
    problems += [
        f"{file.relative_to(root)}: no marker of {name} draws it; remove it"
        for file in sorted(page.parent.glob(f"{page.stem}-*.svg"))
        if file not in drawn
    ]
    return problems


def page_problems(root: Path, page: Path) -> list[str]:
    """What a page says that its rows do not, or without saying which rows."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(root)
    problems = [f"{name}: a quote is not what its rows say; {AGAIN}"] * (quoted(root, text) != text)
    problems += _chart_problems(root, page, text)
    rest, costless = QUOTE.sub("", text), _quoted_without_costs(text)
    problems += [
        f"{name}: a table of results outside a quote: {line.strip()[:40]}…" for line in _tables(rest)
    ]
    waiting: list[tuple[str, str, str]] = []  # markers that stand before their paragraph
    for paragraph in re.split(r"\n\s*\n", re.sub(r"(?m)^    .*$", "", rest)):
        sources = waiting + [
            (source, part.strip() or "verdicts" * (source in costless), row)
            for source, part, row in FIGURES.findall(paragraph)
        ]
        prose = NOT_PROSE.sub("", COMMENT.sub("", paragraph))
        waiting = sources if not prose.strip() else []
        if sources:
            known = {number for source in sources for number in _numbers(root, *source)}
            problems += [
                f"{name}: {number} is not in its rows ({'; '.join(' '.join(filter(None, s)) for s in sources)})"
                for number in DECIMAL.findall(prose)
                if number not in known
            ]
        elif found := MEASURED.search(prose):
            problems.append(f'{name}: a measured figure without <!-- figures: SOURCE "ROW" -->: …{found[0]}…')
    return problems


def _quoted_without_costs(text: str) -> set[str]:
    """Sources of which a page quotes verdicts and no costs: a step time of theirs may be another run's doing."""
    parts: dict[str, set[str]] = {}
    for source, part, _ in QUOTE.findall(text):
        parts.setdefault(source, set()).add(part.strip())
    return {source for source, found in parts.items() if "verdicts" in found and not found & {"", "tables"}}


def _tables(text: str) -> list[str]:
    """The heads of tables: the line before each rule."""
    lines = text.splitlines()
    return [lines[i - 1] for i in range(1, len(lines)) if TABLE.search(lines[i])]


def _numbers(root: Path, source: str, part: str, row: str) -> set[str]:
    """The decimal numbers in the lines of a source's part that `row` finds, or in its groups there."""
    lines = [
        (line, found)
        for line in source_text(root, source, part).splitlines()
        if (found := re.search(row, line))
    ]
    if not lines:
        raise ConfigError(f"no line has {row!r} in it", source)
    parts = [part for line, found in lines for part in (found.groups() or (line,))]
    return {number for part in parts if part for number in DECIMAL.findall(part)}


def _report(study: summary.Summary, directory: Path) -> None:
    """What `summarize` writes, without curves.csv: no record has DVC's charts, and it is the rows again."""
    directory.mkdir(exist_ok=True)
    summarize.write_dvc_files(directory, study)
    summarize.write_tables(directory, study)
    (directory / "curves.csv").unlink()


def record_problems(root: Path) -> list[str]:
    """Records whose page is not what their rows give."""
    problems = []
    for results in sorted(root.glob("records/*/results")):
        study, report = _study(results), results.parent / "report"
        with tempfile.TemporaryDirectory() as name:
            _report(study, Path(name))
            problems += [
                f"{(report / path).relative_to(root)} is not what its rows say; {AGAIN}"
                for path in _other_files(Path(name), report)
            ]
    for file in sorted(root.glob("records/*/*.jsonl")):
        page = file.parent / "README.md"
        if source_text(root, str(file.relative_to(root))) not in page.read_text(encoding="utf-8"):
            problems.append(f"{page.relative_to(root)} is not what {file.name} says; {AGAIN}")
    return problems


def _other_files(made: Path, kept: Path) -> list[Path]:
    """Files that are not the same in both, by their paths there."""
    found = {path.relative_to(root) for root in (made, kept) for path in root.rglob("*") if path.is_file()}
    return [
        path
        for path in sorted(found)
        if not ((made / path).is_file() and (kept / path).is_file())
        or (made / path).read_bytes() != (kept / path).read_bytes()
    ]


def problems(root: Path) -> list[str]:
    """Every page and record under `root` that its rows do not bear out."""
    pages = sorted(page for pattern in PAGES for page in root.glob(pattern))
    return [problem for page in pages for problem in page_problems(root, page)] + record_problems(root)


def write(root: Path) -> None:
    """Make the records' pages and all quotes again."""
    for results in sorted(root.glob("records/*/results")):
        _report(_study(results), results.parent / "report")
    for directory in sorted({file.parent for file in root.glob("records/*/*.jsonl")}):
        _run("benchmarks.record", directory)
    for page in (page for pattern in PAGES for page in root.glob(pattern)):
        text = page.read_text(encoding="utf-8")
        text, drawn = illustrated(root, page, quoted(root, text))
        page.write_text(text, encoding="utf-8")
        for file, svg in drawn.items():
            file.write_text(svg, encoding="utf-8")


def keep(results: Path, record: Path, not_run: Sequence[str] = ()) -> None:
    """Copy a study's rows to record/results, replacing what was there.

    not_run: runs, or single seeds as RUN-SEED, that were not trained, which the record's tables show as missing.

    Raises:
        ConfigError: another run of the study is not finished, or one of `not_run` has rows.
    """
    runs = _study(results).results.runs
    named = {name: [one for one in runs if name in (one.run, f"{one.run}-{one.seed}")] for name in not_run}
    left_out = {(one.run, one.seed) for ones in named.values() for one in ones}
    problems = [
        f"{one.run}-{one.seed} is {one.state}: {one.reason}"
        for one in runs
        if one.state not in ("complete", "diverged") and (one.run, one.seed) not in left_out
    ]
    missing = {name: {one.state for one in ones} == {"missing"} for name, ones in named.items()}
    problems += [
        f"--not-run {name}: it has rows, or is no run or seed" for name, so in missing.items() if not so
    ]
    if problems:
        raise ConfigError(problems, str(results))
    if results.resolve() == (record / "results").resolve():
        raise ConfigError("these are the record's own rows; name the study's results", str(results))
    shutil.rmtree(record / "results", ignore_errors=True)
    shutil.copytree(results, record / "results", ignore=shutil.ignore_patterns(*LEFT_BEHIND))


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make quotes and the records' pages again")
    parser.add_argument("--keep", nargs=2, type=Path, metavar=("RESULTS", "RECORD"))
    parser.add_argument("--not-run", nargs="+", default=[], metavar="RUN")
    arguments = parser.parse_args()
    if arguments.not_run and not arguments.keep:
        parser.error("--not-run says what --keep may leave out")
    if arguments.keep:
        keep(*arguments.keep, arguments.not_run)
    if arguments.keep or arguments.write:
        write(Path())
    elif found := problems(Path()):
        raise ConfigError(found)


if __name__ == "__main__":
    main()
