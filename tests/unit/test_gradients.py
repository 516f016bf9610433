"""Gradient norms of blocks and the noise scale, from rows to sentences and charts; by hand."""

import math
from dataclasses import replace

import polars as pl
import pytest
from fake_results import write_study

from metrics import findings, gradients, rows, summary
from plots import figures, gradient_charts
from plots.svg import svg

NORMS = {"adamw": (3.0, 0.5), "sgd": (8.0, 2.0)}  # of blocks 0 and 2


def with_block_norms(results):
    """Block 2 has a norm of its own, block 0 one that in the first tenth is four times as large."""
    for run, (first, last) in NORMS.items():
        for seed in (1, 2, 3):
            path = results / f"{run}-{seed}" / "steps.csv"
            head, *lines = path.read_text().splitlines()
            more = [f"{(4 if i < 30 else 1) * first},{last}" for i in range(len(lines))]
            text = [f"{head},gradient_norm_0,gradient_norm_2", *map(",".join, zip(lines, more, strict=True))]
            path.write_text("\n".join(text) + "\n")
    return results


def with_noise(results, run: str = "adamw", negative: bool = False):
    """Three measurements a seed: S = 60, 90, 120 and |G|² = 1, 2, 3, so 10, 30, 20 times the seed in the third."""
    for seed in (1, 2, 3):
        home = results / f"{run}-{seed}"
        config = (home / "config.toml").read_text()
        (home / "config.toml").write_text(config + "\n[logging]\nnoise_scale_interval = 100\n")
        lines = ["step,tokens_seen,small_batch,large_batch,gradient_square,noise,noise_scale,coherence"]
        for i in range(3):
            signal, noise = (-1 if negative else 1) * (i + 1), seed * (60 + 30 * i)
            lines.append(
                f"{100 * i + 99},{(100 * i + 100) * 4096},8,32,{signal},{noise},{noise / signal},{0.5 + i / 10}"
            )
        (home / "noise_scale.csv").write_text("\n".join(lines) + "\n")
    return results


def words(results) -> list[str]:
    return [one.text for one in findings.findings(summary.summarize(rows.read(results)))]


def test_how_far_apart_blocks_are_at_the_start_and_at_the_end(tmp_path):
    results = rows.read(with_block_norms(write_study(tmp_path)))
    assert gradients.blocks(results) == [0, 2]
    found = {one.run: (one.start, one.end, one.seeds) for one in gradients.spreads(results)}
    assert found == {
        "adamw": (pytest.approx(24), pytest.approx(6), 3),
        "sgd": (pytest.approx(16), pytest.approx(4), 3),
    }
    said = (
        "sgd: the largest gradient norm of a block was 16.0 × the smallest in the first tenth of the steps, "
    )
    assert f"{said}4.00 × in the last; 3 seeds." in words(tmp_path / "results/quickstart")


def test_of_a_ratio_that_is_out_of_all_proportion_the_order_of_magnitude_is_said():
    text = gradients.Spread("deep", 99_999.0, 6_421_858_717.0, 3).words
    assert "was 99,999 × the smallest" in text and "steps, 6.4e+09 × in the last" in text


def test_block_norms_are_a_row_a_run_step_and_block(tmp_path):
    results = rows.read(with_block_norms(write_study(tmp_path)))
    frame = gradients.block_norms(results, points=10)
    assert frame.columns == ["run", "step", "block", "gradient_norm"]
    own = frame.filter((pl.col("run") == "sgd") & (pl.col("block") == 2))
    assert own.height == 10 and set(own["gradient_norm"]) == {2.0}
    assert set(frame["run"]) == {"adamw", "sgd"}  # the third recorded none


def test_a_study_without_them_says_and_draws_nothing(tmp_path):
    results = rows.read(write_study(tmp_path))
    assert gradients.blocks(results) == [] and gradients.spreads(results) == () == gradients.noise(results)
    assert gradients.block_norms(results).is_empty()
    drawn = figures.every(summary.summarize(results))
    assert not any("gradient_norms" in name or "noise" in name for name in drawn)
    assert not any(
        "noise scale" in text or "of a block" in text for text in words(tmp_path / "results/quickstart")
    )


def test_each_run_is_drawn_on_one_scale_from_dark_to_light(tmp_path):
    one = summary.summarize(rows.read(with_block_norms(write_study(tmp_path))))
    drawn = figures.every(one)
    assert {"gradient_norms_adamw", "gradient_norms_sgd", "gradient_norm_spread"} <= set(drawn)
    charts = [drawn[f"gradient_norms_{run}"].chart.to_dict() for run in NORMS]
    domains = [chart["encoding"]["y"]["scale"]["domain"] for chart in charts]
    assert domains[0] == domains[1] == [0.5 / 1.2, 8.0 * 4 * 1.2]
    assert svg(drawn["gradient_norms_sgd"].chart, "x", "d").count("<path") > 2


def test_norms_of_zero_leave_a_gap():
    frame = pl.DataFrame({"step": [1, 2], "block": [0, 0], "gradient_norm": [0.0, 2.0]})
    [data] = gradient_charts.blocks(frame, "t", (1.0, 3.0)).to_dict()["datasets"].values()
    assert [row["gradient_norm"] for row in data] == [None, 2.0]


def test_the_noise_scale_is_a_quotient_of_averages_over_seeds(tmp_path):
    """Mean S is 90 times the seed, mean |G|² is 2: 45, 90, 135; thirds are 60 / 1 and 120 / 3 times the seed."""
    results = with_noise(write_study(tmp_path))
    (one,) = gradients.noise(rows.read(results))
    assert (one.scale.mean, one.early.mean, one.late.mean) == pytest.approx((90, 120, 80))
    # 95 % t quantile of two degrees of freedom 4.3027, deviation 45, of three seeds
    assert one.scale.half_width == pytest.approx(4.3027 * 45 / math.sqrt(3), rel=1e-3)
    assert one.coherence.mean == pytest.approx(0.6)
    text = next(text for text in words(results) if text.startswith("adamw: its gradient noise scale"))
    assert text == (
        "adamw: its gradient noise scale is 90 ± 112 sequences (120 in the first third, 80.0 in the last); its batch "
        "of 32 is below that; coherence of micro-batches of 8 0.6000 ± 0; 3 measurements a run, 3 seeds."
    )
    assert {"noise_scale", "coherence"} <= set(figures.every(summary.summarize(rows.read(results))))


def test_a_batch_that_the_noise_scale_grows_past_is_on_both_sides_of_it(tmp_path):
    (one,) = gradients.noise(rows.read(with_noise(write_study(tmp_path))))  # scale 90, late 80
    assert (
        "its batch of 85 is below that, but above that of the last third; "
        in replace(one, large_batch=85).words
    )
    assert "its batch of 100 is above that; " in replace(one, large_batch=100).words


def test_a_gradient_lost_in_noise_has_no_number(tmp_path):
    results = with_noise(write_study(tmp_path), negative=True)
    (one,) = gradients.noise(rows.read(results))
    assert one.scale is None
    assert (
        "no gradient stands out of the noise of batches of 32, so its noise scale is far above that"
        in one.words
    )


def test_a_run_that_measured_and_has_no_file_is_refused(tmp_path):
    results = with_noise(write_study(tmp_path))
    (results / "adamw-2" / "noise_scale.csv").unlink()
    with pytest.raises(rows.ResultsError, match="noise_scale.csv is missing although the run is complete"):
        rows.read(results)
