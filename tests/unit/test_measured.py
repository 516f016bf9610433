"""Latency, the machine and attention, from a study's rows to tables, sentences and charts; by hand."""

import json

import polars as pl
import pytest
from fake_results import write_json, write_study

from metrics import attention, columns, devices, files, findings, latencies, rows, summary
from metrics.columns import DEVICE_COLUMNS
from metrics.rows import ResultsError
from plots import attention_charts, figures, measured_tables, report, tables
from plots.svg import svg
from stages import summarize


def change(path, **values) -> None:
    write_json(path, json.loads(path.read_text()) | values)


def setting(home, line: str) -> None:
    config = (home / "config.toml").read_text()
    (home / "config.toml").write_text(
        f"{config}\n[{'logging' if 'latency' not in line else 'evaluation'}]\n{line}\n"
    )


def with_latency(results):
    """sgd takes twice as long as adamw at 512 tokens and has half its cache; each has a length of its own."""
    for run, times, lengths in (("adamw", 1, [512, 1024]), ("sgd", 2, [512, 2048])):
        for seed in (1, 2, 3):
            home, found = results / f"{run}-{seed}", []
            setting(home, f"latency_lengths = {lengths}")
            for n in lengths:
                p50 = times * n / 100 * seed
                figures = {"prefill_p50_ms": p50, "prefill_p95_ms": p50 + 1, "token_p50_ms": p50 / 10}
                figures |= {
                    "token_p95_ms": p50 / 10 + 1,
                    "cache_bytes": 9,
                    "cache_bytes_per_token": 3072 / times,
                }
                found.append({"length": n} | figures)
            write_json(home / "latency.json", {"lengths": found})
    return results


def with_device(results, throttled: float | None = 0.25):
    """A sample a second of adamw: seeds draw 300, 400, 500 W on average; nothing is known of the clock."""
    for seed in (1, 2, 3):
        home = results / f"adamw-{seed}"
        setting(home, "monitor_interval = 1.0")
        cells = [["" if c == "sm_clock_mhz" else str(i + seed) for c in DEVICE_COLUMNS] for i in range(5)]
        lines = [",".join(DEVICE_COLUMNS), *(",".join(["7", *row[1:]]) for row in cells)]
        (home / "device.csv").write_text("\n".join(lines) + "\n")
        figures = {"monitor_samples": 5, "power_watts_mean": 200.0 + 100 * seed, "power_watts_max": 700.0}
        figures |= {"temperature_celsius_mean": 80.0, "temperature_celsius_max": 86.0 + seed}
        figures |= {"sm_clock_mhz_mean": None, "sm_clock_mhz_max": None, "thermal_throttle_share": throttled}
        change(home / "metrics.json", **figures)
    return results


def with_attention(results):
    """Two layers of adamw, of sgd one: entropies 2 and 4 at first, and half a nat less each time."""
    for run, layers in (("adamw", 2), ("sgd", 1)):
        for seed in (1, 2, 3):
            home = results / f"{run}-{seed}"
            setting(home, "attention_sequences = 2")
            names = [
                f"{what}_{i}" for what in ("entropy", "reciprocity", "weakest_head") for i in range(layers)
            ]
            lines = [",".join(["step", "tokens_seen", *names])]
            for n in range(3):
                entropies, others = [2 * (i + 1) - n / 2 for i in range(layers)], [0.1 * seed] * layers
                values = [*entropies, *others, *[""] * layers]
                lines.append(",".join(map(str, [100 * n + 99, 4096 * n, *values])))
            (home / "attention.csv").write_text("\n".join(lines) + "\n")
    return results


def read(results) -> summary.Summary:
    return summary.summarize(rows.read(results))


# --- latency


def test_latency_is_compared_length_by_length_over_paired_seeds(tmp_path):
    found = latencies.latencies(read(with_latency(write_study(tmp_path))))
    assert [(one.run, one.length) for one in found] == [
        ("adamw", 512),
        ("sgd", 512),
        ("adamw", 1024),
        ("sgd", 2048),
    ]
    base, other, _, alone = found
    assert alone.prefill_ratio is alone.token_ratio is alone.cache_ratio is None
    assert base.figures["prefill_p50_ms"].mean == pytest.approx(5.12 * 2)
    assert base.prefill_ratio is None and other.prefill_ratio.mean == pytest.approx(2)
    assert other.token_ratio.mean == pytest.approx(2) and other.cache_ratio.mean == pytest.approx(0.5)


def test_latency_in_words(tmp_path):
    study = read(with_latency(write_study(tmp_path)))
    [(caption, (heads, cells))] = measured_tables.latency_tables(study)
    assert caption.startswith("Inference latency: one sequence, uncompiled;")
    assert cells[0] == ["adamw", "512", "10.24", "11.24", "–", "1.024", "2.024", "–", "3,072", "–"]
    assert cells[1][4] == "2.00" and cells[1][-2:] == ["1,536", "0.50"] and len(heads) == len(cells[1])
    assert "Inference latency" in tables.markdown(study) and "Inference and machine" in report.html(study)
    frame = pl.read_csv(_written(study, tmp_path) / "table.csv")
    assert frame["latency_prefill_p50_ms_at_512_ratio"].to_list()[1:] == [None, pytest.approx(2)]
    # Of 1,024 tokens adamw alone has any: no run's latency is set beside that of another length.
    assert frame["latency_token_p95_ms_at_1024_ratio"].to_list() == [1, None, None]


def _written(study, directory):
    out = directory / "reports"
    out.mkdir()
    summarize.write_tables(out, study)
    return out


def test_a_latency_file_that_is_not_one_is_named(tmp_path):
    results = with_latency(write_study(tmp_path))
    write_json(results / "sgd-2" / "latency.json", {"lengths": [{"length": 512}]})
    with pytest.raises(ResultsError, match=r"sgd-2/latency.json lacks prefill_p50_ms"):
        rows.read(results)
    write_json(results / "sgd-2" / "latency.json", {"lengths": []})
    with pytest.raises(ResultsError, match="must hold a list 'lengths'"):
        rows.read(results)
    (results / "sgd-2" / "latency.json").unlink()
    line = {"what": "latency_lengths", "in_effect": "not measured"}
    assert files.latency(results / "sgd-2" / "latency.json", {"latency_lengths": [8]}, (line,)) == ()
    with pytest.raises(ResultsError, match=r"latency.json is missing although the run is complete"):
        rows.read(results)


# --- the machine


def test_the_machine_in_means_and_maxima_over_seeds(tmp_path):
    study = read(with_device(write_study(tmp_path)))
    (one,) = devices.uses(study)
    assert (
        one.run == "adamw" and one.mean["power_watts"].mean == 400 and one.highest["power_watts"].mean == 700
    )
    assert one.highest["temperature_celsius"].mean == 88 and "sm_clock_mhz" not in one.mean
    [(_, (heads, cells))] = measured_tables.device_tables(study)
    assert heads == ["run", "GPU temperature (°C)", "GPU power (W)"]
    assert cells == [["adamw", "80.0 / 88.0", "400 / 700"]]


def test_the_machine_over_time_is_one_seeds(tmp_path):
    study = read(with_device(write_study(tmp_path)))
    frame = devices.over_seconds(study.results, points=3)
    assert frame["seconds"].to_list() == [1.0, 3.0, 5.0] and frame["power_watts"].to_list() == [1.0, 3.0, 5.0]
    drawn = {name: one for name, one in figures.every(study).items() if name.startswith("device_")}
    assert set(drawn) == {
        "device_device_memory_gib",
        "device_device_utilization_percent",
        "device_temperature_celsius",
        "device_power_watts",
    }  # what is known of the GPU, and so nothing of the process
    assert drawn["device_power_watts"].title == "GPU power"
    assert "<path" in svg(drawn["device_power_watts"].chart, "x", "d")


def test_a_hot_gpu_is_a_finding_and_a_cool_one_none(tmp_path):
    def said(throttled):
        results = with_device(write_study(tmp_path / str(throttled)), throttled)
        return [one for one in findings.findings(read(results)) if "clocks" in one.text]

    assert [(one.text, one.runs) for one in said(0.25)] == [
        (
            "adamw: the GPU slowed its clocks because it was hot in 25.0 % of the samples, at up to 89.0 °C, so its "
            "times are longer than a cool one's; 3 seeds.",
            ("adamw",),
        )
    ]
    assert not said(0.0) and not said(None)


def test_a_gpu_at_its_power_limit_most_of_the_time_is_a_finding(tmp_path):
    def said(*shares, **figures):
        results = write_study(tmp_path / str(shares))
        for seed, share in enumerate(shares, 1):
            path = results / f"adamw-{seed}" / "metrics.json"
            write_json(path, json.loads(path.read_text()) | {"power_cap_share": share} | figures)
        return [(one.text, one.runs) for one in findings.findings(read(results)) if "limit" in one.text]

    clocks = {"sm_clock_mhz_mean": 1700.0, "sm_clock_mhz_max": 1980.0}
    text = "adamw: the GPU was at its power limit, which lowers its clocks, in 60.0 % of the samples"
    assert said(0.4, 0.6, 0.8, **clocks) == [
        (f"{text}, at 1,700 MHz in the mean, 1,980 at most; 3 seeds.", ("adamw",))
    ]
    assert said(0.6, 0.6, 0.6) == [(f"{text}; 3 seeds.", ("adamw",))]
    assert not said(0.4, 0.4, 0.6) and not said(None, None, None)


# --- attention


def test_attention_is_a_row_a_run_step_and_layer_and_a_mean_over_them(tmp_path):
    results = rows.read(with_attention(write_study(tmp_path)))
    assert attention.layers(results, "entropy") == ["entropy_0", "entropy_1"]
    frame = attention.by_layer(results, "entropy")
    own = frame.filter((pl.col("run") == "adamw") & (pl.col("layer") == 1))
    assert own["value"].to_list() == [4.0, 3.5, 3.0] and own["step"].to_list() == [99, 199, 299]
    assert set(frame.filter(pl.col("run") == "sgd")["layer"]) == {0}
    means = attention.over_layers(results)
    assert means.filter(pl.col("run") == "adamw")["entropy"].to_list() == [3.0, 2.5, 2.0]
    assert means.filter(pl.col("run") == "sgd")["entropy"].to_list() == [2.0, 1.5, 1.0]
    assert means["reciprocity"].to_list() == pytest.approx([0.2] * 6)
    assert means["reciprocity_high"].to_list() == pytest.approx([0.3] * 6)


def test_attention_is_drawn_on_one_scale(tmp_path):
    drawn = figures.every(read(with_attention(write_study(tmp_path))))
    names = {name for name in drawn if name.startswith("attention_")}
    assert names == {
        f"attention_{what}{run}" for what in ("entropy", "reciprocity") for run in ("", "_adamw", "_sgd")
    }
    charts = [drawn[f"attention_entropy_{run}"].chart.to_dict() for run in ("adamw", "sgd")]
    assert [c["encoding"]["y"]["scale"]["domain"] for c in charts] == [[1.0 - 0.15, 4.0 + 0.15]] * 2
    assert svg(drawn["attention_entropy_adamw"].chart, "x", "d").count("<path") > 2
    assert attention_charts.domain(pl.DataFrame({"value": [2.0, 2.0]})) == (1.95, 2.05)


def test_few_evaluations_of_attention_are_points_and_many_are_lines_alone():
    def paths(steps: int) -> int:
        rows = [{"step": n, "layer": k, "value": float(k)} for n in range(steps) for k in (0, 1)]
        return svg(attention_charts.layers(pl.DataFrame(rows), "t", "a", (-1.0, 2.0)), "x", "d").count(
            "<path"
        )

    few, lines = attention_charts.FEW, paths(attention_charts.FEW + 1)
    assert paths(few + 2) == lines  # a path a layer, however many evaluations
    assert (paths(1) - lines, paths(few) - lines) == (2, 2 * few)


def test_of_many_runs_those_drawn_have_each_form_of_attention(tmp_path, monkeypatch):
    results = with_attention(write_study(tmp_path))
    monkeypatch.setattr(figures, "MOST_PANELS", 1)
    drawn = figures.every(read(results))
    assert "attention_entropy_adamw" in drawn and "attention_entropy_sgd" not in drawn
    assert drawn["attention_entropy_adamw"].caption == "Of 2 runs these are 1."
    names = [f"run_{n}" for n in range(6)]
    forms = ["multi_head"] * 4 + ["latent"] * 2
    results = write_study(tmp_path / "many", seeds=(1,), runs=dict.fromkeys(names, {}), baseline="run_0")
    for name, form in zip(names, forms, strict=True):
        setting(results / f"{name}-1", f'attention_form = "{form}"')
    config = results / "run_5-1" / "config.toml"
    config.write_text(f"{config.read_text()}reciprocal_alpha = 0.25\n")
    found = rows.read(results)
    assert attention.of_each_form(found, names, 4) == ["run_0", "run_1", "run_4", "run_5"]
    assert attention.of_each_form(found, names[1:], 3) == ["run_1", "run_4", "run_5"]
    assert attention.of_each_form(found, names, 9) == names


def test_a_study_that_measured_none_of_them_says_and_draws_nothing(tmp_path):
    study = read(write_study(tmp_path))
    assert measured_tables.measured_tables(study) == [] and devices.over_seconds(study.results).is_empty()
    assert attention.over_layers(study.results).is_empty()
    assert not any(name.startswith(("attention_", "device_")) for name in figures.every(study))
    assert "Inference and machine" not in report.html(study) and "latency" not in tables.markdown(study)


def test_what_a_run_writes_is_what_is_read(lab, monkeypatch):
    """A real run's files, by the reader of results."""
    monkeypatch.setattr("engine.rules.kept.SHORTEST_INTERVAL", 0.0)
    monkeypatch.setattr("engine.latency.RUNS", 2)
    home = lab.train(attention_sequences=2, monitor_interval=0.002, latency_lengths=[8, 16], steps=30)
    config = {"latency_lengths": [8, 16]}
    one = rows.RunSeed("run", 1, "complete", metrics=json.loads((home / "metrics.json").read_text()))
    read_table = {wanted: rows._rows(home.parent, one, name, wanted) for name, wanted in FILES.items()}
    assert read_table[columns.ATTENTION_COLUMNS]["entropy_1"].is_finite().all()
    device = read_table[columns.DEVICE_COLUMNS]
    assert device.columns == ["run", "seed", *columns.DEVICE_COLUMNS] and device.height > 0
    assert device["power_watts"].null_count() == device.height and device["process_memory_gib"].min() > 0
    found = files.latency(home / "latency.json", config)
    assert [one["length"] for one in found] == [8, 16] and set(found[0]) == set(columns.LATENCY_KEYS)


FILES = {"attention.csv": columns.ATTENTION_COLUMNS, "device.csv": columns.DEVICE_COLUMNS}
