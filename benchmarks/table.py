"""Rows to tables, as plain text. Pure: the same rows give the same text.

    python -m benchmarks.table FILE.jsonl…

A ratio is the median of the ratios within each turn of a run, with the smallest and the largest: the peers of a
turn ran right after each other. Rows of different sizes, machines, versions or commits are never in one table.
"""

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

TOGETHER = ("size", "hardware", "torch", "git_commit", "git_engine_changed", "experiment")
REFERENCES = ("nanogpt", "hashed", "padded")  # the first of them that was measured


def tables(rows: list[dict]) -> str:
    """All tables that can be made from these rows."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in TOGETHER), []).append(row)
    return "\n\n".join(_table_of(group) for group in groups.values())


def _table_of(rows: list[dict]) -> str:
    if rows[0]["experiment"]:
        return experiment_table(rows)
    return race_table(rows) if any("target_loss" in row for row in rows) else speed_table(rows)


def race_table(rows: list[dict]) -> str:
    """Who is the first to have a validation loss, in seconds of training."""
    peers = _groups(rows, "peer")
    target = next(row["target_loss"] for row in rows if "target_loss" in row)
    reference = peers.get("nanogpt_char", [])
    lines = [
        [
            name,
            _number(_median(own, "best_val_loss"), ".4f"),
            _number(_largest(own, "best_val_loss"), ".4f"),
            f"{len(_values(own, 'seconds_to_target'))} of {len(own)}",
            _number(_median(own, "steps_to_target"), ",.0f"),
            _number(_median(own, "seconds_to_target"), ".2f"),
            _ratio(own, reference, "seconds_to_target"),
            _number(_median(own, "seconds_to_target_compiling"), ".1f"),
            _number(_median(own, "tokens_per_second"), ",.0f"),
            _number(_peak(own), ".3g"),
            _status(own),
        ]
        for name, own in peers.items()
    ]
    head = ["peer", "best val loss", "worst turn's", f"turns at {target}", "steps to it", "seconds to it"]
    head += [
        "ratio to nanogpt_char",
        "with compiling",
        "tokens/s",
        f"peak GiB ({_memory_words(rows)})",
        "status",
    ]
    note = "Medians over the turns, each with another seed; seconds are of training, without evaluations."
    return "\n".join([_title(rows), "", aligned(head, lines), "", note, *_footnotes(peers)])


def speed_table(rows: list[dict]) -> str:
    """The peers beside each other, and what the engine's trainer costs."""
    peers = _groups(rows, "peer")
    name_of_reference = next((name for name in REFERENCES if name in peers), REFERENCES[0])
    reference = peers.get(name_of_reference, [])
    labelled = any("samples_per_second" in row for row in rows)
    speed = "samples_per_second" if labelled else "tokens_per_second"
    lines = [
        [
            name,
            _number(_median(own, speed), ",.0f"),
            _ratio(own, reference, speed),
            # A loader that starves a step now and then shows in the mean alone.
            *([_ratio(own, reference, "tokens_per_second_mean")] if labelled else []),
            _number(_median(own, "step_ms"), ",.2f"),
            _number(_peak(own), ".3g"),
            _ratio(own, reference, _memory_of(rows)),
            _number(_median(own, "mfu"), ".1%"),
            _number(_largest(own, "first_step_seconds"), ".1f"),
            _losses(own),
            _status(own),
        ]
        for name, own in peers.items()
    ]
    head = [
        "peer",
        "samples/s" if labelled else "tokens/s",
        f"ratio to {name_of_reference}",
        *(["ratio of means"] if labelled else []),
        "step ms",
        f"peak GiB ({_memory_words(rows)})",
        "ratio",
    ]
    text = [
        _title(rows),
        "",
        aligned([*head, "MFU", "first step s", "loss", "status"], lines),
        *_overhead(peers),
    ]
    return "\n".join([*text, *_footnotes(peers)])


def experiment_table(rows: list[dict]) -> str:
    """The combinations of an experiment, and each technique's effect alone and combined."""
    combinations = _groups(rows, "levels")
    base, means = combinations.get(key({}), []), rows[0].get("means", False)
    measured = [
        [
            _words(own[0]["levels"]),
            _number(_median(own, "tokens_per_second"), ",.0f"),
            _ratio(own, base, "tokens_per_second"),
            *([_ratio(own, base, "tokens_per_second_mean")] if means else []),
            _number(_median(own, "step_ms_fastest"), ",.2f"),
            _number(_peak(own), ".3g"),
            _ratio(own, base, _memory_of(rows)),
            _number(_median(own, "activation_mib"), ",.4g"),
            _number(_largest(own, "compile_seconds"), ".0f"),
            _status(own),
        ]
        for own in combinations.values()
    ]
    head = [
        "settings",
        "tokens/s",
        "ratio to base",
        *(["ratio of means"] if means else []),
        "fastest step ms",
        f"peak GiB ({_memory_words(rows)})",
        "ratio",
    ]
    head += ["activations MiB", "compile s", "status"]
    text = [f"{_title(rows)}\n{rows[0]['experiment']}: {rows[0]['question']}", "", aligned(head, measured)]
    if rows[0]["all_on"]:
        text += ["", *_effects(combinations, rows[0]["all_on"], _memory_of(rows))]
    named = {_words(own[0]["levels"]): own for own in combinations.values()}
    return "\n".join([*text, *_footnotes(named)])


def _effects(combinations: dict[str, list[dict]], all_on: dict, memory: str) -> list[str]:
    """Each level: alone against the base; combined, everything on against everything on without its slot."""
    base, everything = combinations.get(key({}), []), combinations.get(key(all_on), [])
    levels = {
        next(iter(own[0]["levels"].items())) for own in combinations.values() if len(own[0]["levels"]) == 1
    }
    order = [tuple(json.loads(k)[0]) for k in combinations if len(json.loads(k)) == 1]
    lines = []
    for slot, level in [pair for pair in order if pair in levels]:
        alone = combinations[key({slot: level})]
        with_it = combinations.get(key(all_on | {slot: level}), [])
        without = combinations.get(key({k: v for k, v in all_on.items() if k != slot}), [])
        if slot not in all_on:
            without = everything
        lines.append(
            [
                f"{slot}: {level}",
                _ratio(alone, base, "tokens_per_second"),
                _ratio(alone, base, memory),
                _ratio(with_it, without, "tokens_per_second"),
                _ratio(with_it, without, memory),
            ]
        )
    lines.append(
        ["all together", _ratio(everything, base, "tokens_per_second"), _ratio(everything, base, memory)]
    )
    lines[-1] += ["", ""]
    return [aligned(["technique", "speed alone", "memory alone", "speed combined", "memory combined"], lines)]


def ratios(own: list[dict], reference: list[dict], name: str) -> list[float]:
    """The ratio of `name` in each turn that both completed."""
    there = {(row["run"], row["repeat"]): row.get(name) for row in _good(reference)}
    turns = [(row.get(name), there.get((row["run"], row["repeat"]))) for row in _good(own)]
    return [mine / theirs for mine, theirs in turns if mine and theirs]


def _overhead(peers: dict[str, list[dict]]) -> list[str]:
    engine, bare = peers.get("engine", []), peers.get("bare", [])
    median = ratios(engine, bare, "tokens_per_second")
    mean = ratios(engine, bare, "tokens_per_second_mean")
    if not median:
        return []
    return [
        "",
        f"engine / bare loop: {_spread(median, '.3f')} by the median step, {_spread(mean, '.3f')} by the mean",
    ]


def _good(rows: Iterable[dict]) -> list[dict]:
    return [row for row in rows if row["status"] == "ok"]


def key(levels: dict) -> str:
    """A combination of levels, whatever their order."""
    return json.dumps(sorted(levels.items()))


def _groups(rows: list[dict], name: str) -> dict[str, list[dict]]:
    found = {}
    for row in rows:
        found.setdefault(row[name] if name == "peer" else key(row[name]), []).append(row)
    return found


def _words(levels: dict) -> str:
    return ", ".join(f"{slot}: {level}" for slot, level in levels.items()) or "base"


def _values(rows: list[dict], name: str) -> list[float]:
    return [row[name] for row in _good(rows) if row.get(name) is not None]


def _median(rows: list[dict], name: str) -> float | None:
    found = _values(rows, name)
    return statistics.median(found) if found else None


def _largest(rows: list[dict], name: str) -> float | None:
    return max(_values(rows, name), default=None)


def _memory_of(rows: list[dict]) -> str:
    """On a GPU, tensors at their most; on a CPU, the resident memory of the process."""
    return "host_peak_gib" if rows[0]["device"] == "cpu" else "peak_gib"


def _memory_words(rows: list[dict]) -> str:
    return "process" if rows[0]["device"] == "cpu" else "tensors"


def _peak(rows: list[dict]) -> float | None:
    return _median(rows, _memory_of(rows))


def _ratio(own: list[dict], reference: list[dict], name: str) -> str:
    found = ratios(own, reference, name)
    return _spread(found, ".2f") if found else "–"


def _spread(values: list[float], form: str) -> str:
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}–{max(values):{form}})"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _losses(rows: list[dict]) -> str:
    good = _good(rows)
    return f"{good[0]['loss_first']:.2f} → {good[0]['loss_last']:.2f}" if good else "–"


def _status(rows: list[dict]) -> str:
    found = [row["status"] for row in rows]
    counts = [f"{found.count(s)} × {s}" if len(found) > 1 else s for s in dict.fromkeys(found)]
    return "ok" if set(found) == {"ok"} else ", ".join(counts)


def _footnotes(groups: dict[str, list[dict]]) -> list[str]:
    """Why a row has no figure: its problems, or the last line that it printed."""
    notes = [
        f"* {name}: {row['status']}: {'; '.join(row.get('problems') or row.get('last_lines', [])[-1:])}"
        for name, own in groups.items()
        for row in own
        if row["status"] != "ok"
    ]
    return ["", *dict.fromkeys(notes)] if notes else []


def machine_words(row: dict) -> str:
    """Where a row was measured."""
    commit = (row["git_commit"] or "unknown commit")[:12] + (
        " with changes" if row["git_engine_changed"] else ""
    )
    return f"{row['hardware']}, torch {row['torch']}, {commit}"


def _title(rows: list[dict]) -> str:
    row = rows[0]
    turns = len({(r["run"], r["repeat"]) for r in rows})
    return (
        f"{row['size']}: {row['step_tokens']:,} tokens a step, median of {row['steps']} steps, "
        f"{turns} turn{'s' if turns > 1 else ''}; {machine_words(row)}"
    )


def aligned(head: list[str], lines: list[list[str]]) -> str:
    """Columns two spaces apart, the first and the last to the left."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]

    def joined(line: list[str]) -> str:
        last = len(line) - 1
        cells = [
            c.ljust(w) if i in (0, last) else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([joined(head), "─" * (sum(widths) + 2 * len(widths) - 2), *map(joined, lines)])


def read(paths: Iterable[str | Path]) -> list[dict]:
    """The rows of JSON-lines files."""
    return [
        json.loads(line) for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()
    ]


if __name__ == "__main__":
    print(tables(read(sys.argv[1:])))
