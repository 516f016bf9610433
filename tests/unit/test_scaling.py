"""Scaling: the lost time of a step in parts, by hand; each cause named with its share; what cannot be said."""

import json

import pytest
from fake_classifier import CONTEXT, classifier_study, probe
from fake_results import write_json

from metrics import rows, scaling, summary
from metrics.diagnosis import diagnosis
from metrics.findings import findings
from metrics.scaling import COMMUNICATION, IMBALANCE, LITTLE_WORK, SHARED, TOGETHER, WAIT

SEEDS = (1, 2, 3)
ONE = probe("small_1")  # 256 samples in 10 ms, of which 1 ms is waiting for the loader


def spread(loaded, ready, alone, **changes):
    """scaling.json of as many ranks as there are seconds, in milliseconds."""
    seconds = {"loaded_seconds": loaded, "ready_seconds": ready, "alone_seconds": alone}
    seconds = {key: value and [ms / 1000 for ms in value] for key, value in seconds.items()}
    return probe("small_1", **{"ranks": len(loaded), **seconds, **changes})


def milliseconds(found):
    return {name: round(1000 * part, 9) for name, part in found.parts.items() if round(1000 * part, 9)}


@pytest.mark.parametrize(
    ("own", "parts"),
    [
        # Nothing lost: half the step, half the wait.
        (spread([5, 5], [4.5, 4.5], [4.5, 4.5]), {}),
        # The loader gives each half 3 ms too late.
        (spread([8, 8], [4.5, 4.5], [4.5, 4.5]), {WAIT: 3}),
        # 2 ms of exchange.
        (spread([7, 7], [6.5, 6.5], [4.5, 4.5]), {COMMUNICATION: 2}),
        # Rank 1 needs 3 ms more; the other waits for it, in the exchange as well.
        (spread([8, 8], [7.5, 7.5], [4.5, 7.5]), {IMBALANCE: 3}),
        # A step's fixed cost.
        (spread([7, 7], [6.5, 6.5], [6.5, 6.5]), {LITTLE_WORK: 2}),
        # Both ranks read all 256: half of their 9 ms is for nothing, and the loader works twice.
        (spread([10, 10], [9, 9], [9, 9], samples_drawn=512), {SHARED: 4.5, WAIT: 0.5}),
        # Faster than ideal: a negative part is shown as it is.
        (spread([4, 4], [3.5, 3.5], [3.5, 3.5]), {LITTLE_WORK: -1}),
        # Weak scaling: 512 in the time of 256 would be ideal.
        (
            spread([11, 11], [10, 10], [9, 9], batch_size=512, samples_drawn=512, samples_distinct=512),
            {COMMUNICATION: 1},
        ),
    ],
)
def test_the_parts_by_hand(own, parts):
    found = scaling.lost(own, ONE)
    assert milliseconds(found) == parts
    assert sum(found.parts.values()) == pytest.approx(found.step - found.ideal, abs=1e-15)


def test_the_parts_add_up_whatever_the_times_are():
    own = spread([9.1, 8.7, 9.3], [8.2, 8.3, 8.1], [5.9, 7.7, 6.1], samples_drawn=400, samples_distinct=300)
    for one in (own, own | {"alone_seconds": None}):
        found = scaling.lost(one, ONE)
        assert found.step == pytest.approx(0.0093) and found.ideal == pytest.approx(0.010 * 300 / 256 / 3)
        assert sum(found.parts.values()) == pytest.approx(found.step - found.ideal, abs=1e-15)


def test_without_a_step_alone_only_loading_and_sharing_are_told_apart():
    found = scaling.lost(spread([9, 9], [7.5, 7.5], None), ONE)
    assert milliseconds(found) == {WAIT: 1, TOGETHER: 3}
    found = scaling.lost(spread([9, 9], [8.5, 8.5], None, samples_drawn=512), ONE)
    assert milliseconds(found) == {SHARED: 4.25, TOGETHER: -0.25}


@pytest.fixture
def results(tmp_path):
    return classifier_study(tmp_path)


def put(results, run, seconds, seeds=SEEDS):
    """Let a run's probe have timed this, and its training have been as fast."""
    for seed in seeds:
        home = results / f"{run}-{seed}"
        write_json(home / "scaling.json", seconds)
        metrics = json.loads((home / "metrics.json").read_text())
        pace = seconds["samples_distinct"] / max(seconds["loaded_seconds"])
        write_json(home / "metrics.json", metrics | {"samples_per_second": pace})


def small(results):
    return scaling.scalings(summary.summarize(rows.read(results)))[0]


def test_speedup_and_efficiency_are_of_different_samples_a_second(results):
    small_2, large_2 = scaling.scalings(summary.summarize(rows.read(results)))
    assert (small_2.run, small_2.reference, small_2.kind) == ("small_2", "small_1", "strong")
    assert small_2.samples_per_second.mean == pytest.approx(256 / 0.008)
    assert (small_2.speedup.mean, small_2.efficiency.mean) == pytest.approx((1.25, 0.625))
    shares = {name: round(share.mean, 6) for name, share in small_2.parts.items()}
    expected = {COMMUNICATION: 0.5, IMBALANCE: 0.4, LITTLE_WORK: 2.1}  # of 8 ms
    assert shares == {SHARED: 0, WAIT: 0} | {name: round(ms / 8, 6) for name, ms in expected.items()}
    assert small_2.lost.mean == pytest.approx(3 / 8)
    assert large_2.speedup.mean == pytest.approx(
        512 / 0.042 / 6400
    )  # weak: twice the samples in 42 ms, not 40
    # Both ranks read the same 256: drawn twice as many, got as far as before.
    put(results, "small_2", spread([8, 8], [7.5, 7.5], [7, 7], samples_drawn=512))
    assert small(results).speedup.mean == pytest.approx(1.25)


def test_intervals_are_over_paired_seeds(results):
    put(results, "small_1", spread([20], [18], [18]), (3,))  # a slow day for both: the pair is as before
    put(results, "small_2", spread([16, 16], [15, 14.8], [14, 13.2]), (3,))
    one = small(results)
    assert (one.speedup.count, one.speedup.low, one.speedup.high) == pytest.approx((3, 1.25, 1.25))
    put(results, "small_2", spread([12, 12], [12, 12], [12, 12]), (1,))
    one = small(results)
    assert one.speedup.mean == pytest.approx((1.25 * 1.25 * 256 / 12 / 25.6) ** (1 / 3))
    assert one.speedup.low < one.speedup.mean < one.speedup.high
    assert one.efficiency.low == pytest.approx(one.speedup.low / 2)
    assert one.lost.half_width > 0 and one.parts[LITTLE_WORK].half_width > 0


def test_no_figure_comes_from_the_time_of_an_epoch(results):
    before = small(results)
    for seed in SEEDS:
        path = results / f"small_2-{seed}" / "metrics.json"
        changed = {"train_seconds": 99.0, "samples_per_epoch": 7, "step_seconds_median": 5.0}
        write_json(path, json.loads(path.read_text()) | changed)
    assert small(results) == before


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (
            spread([10, 10], [9, 9], [9, 9], samples_drawn=512),
            "of each step 50 % is lost, most of it, 45 % of the step, because the samples are not divided among the "
            "ranks, which read 256 different ones of the 512 that a step draws; let each rank read its own part",
        ),
        (
            spread([8, 8], [4.5, 4.5], [4.5, 4.5], training_data_wait_seconds=[0.001, 0.002]),
            "of each step 38 % is lost, most of it, 38 % of the step, because it takes longer with batches "
            "from the loader than with one at hand (while they trained, ranks waited 1.5 ms a step for it); prepare "
            "more batches ahead (prefetch)",
        ),
        (
            spread([8, 8], [7.5, 7.5], [4.5, 4.5]),
            "most of it, 38 % of the step, because the ranks exchange gradients while nothing is computed; use a "
            "larger batch per rank",
        ),
        (
            spread([9, 9, 9], [8.5, 8.5, 8.5], [3, 8.5, 3]),
            "most of it, 61 % of the step, because the others wait for rank 1, which computes 2.83 × as long as the "
            "fastest; see what else runs on that rank's device and cores",
        ),
        (
            spread([8, 8], [7.5, 7.5], [7.5, 7.5]),
            "most of it, 38 % of the step, because each rank has too little work: its samples of a step take it "
            "7.50 ms, where small_1 has as many done in 4.50 ms; use a larger batch per rank",
        ),
    ],
    ids=["sampler", "loader", "communication", "imbalance", "little work"],
)
def test_each_cause_is_named_with_its_share_and_what_to_change(results, seconds, said):
    put(results, "small_2", seconds)
    text = diagnosis(small(results))
    assert said in text
    assert text.startswith("small_2 ") and text.endswith("; 3 paired seeds.")
    assert "tell" not in text and text.count("because") == 1


def test_a_cause_is_named_only_if_it_is_the_largest_in_every_seed(results):
    put(results, "small_2", spread([8, 8], [7.5, 7.5], [4.5, 4.5]), (1, 2))  # exchange
    put(results, "small_2", spread([8, 8], [7.5, 7.5], [7.5, 7.5]), (3,))  # little work
    text = diagnosis(small(results))
    assert (
        "of each step 38 % is lost, and these seeds do not tell to what: its largest part is communication, too "
        "little work, seed by seed; 3 paired seeds." in text
    )
    assert "because" not in text and "use a larger batch" not in text


def test_an_interval_on_both_sides_of_a_good_efficiency_says_neither(results):
    for seed, ms in ((1, 5.2), (2, 5.6), (3, 7.5)):
        put(results, "small_2", spread([ms, ms], [ms - 0.5, ms - 0.5], [4.5, 4.5]), (seed,))
    text = diagnosis(small(results))
    assert text.startswith(
        "small_2 has an efficiency that these seeds do not place above or below 85 %: in 2 "
    )


def test_the_slowest_rank_is_named_only_if_it_is_always_the_same(results):
    put(results, "small_2", spread([9, 9], [8.5, 8.5], [4.5, 8.5]), (1, 2))
    put(results, "small_2", spread([9, 9], [8.5, 8.5], [8.5, 4.5]), (3,))
    text = diagnosis(small(results))
    assert "because the others wait for one rank, not always the same, which computes 1.89 × as long" in text


def test_threads_that_were_not_as_many_are_said(results):
    for run, threads in (("small_1", 16), ("small_2", 1)):
        for seed in SEEDS:
            path = results / f"{run}-{seed}" / "env.json"
            write_json(path, json.loads(path.read_text()) | {"threads": threads})
    assert "a process of small_2 had 1 CPU threads, that of small_1 16; 3 paired" in diagnosis(small(results))


def test_seeds_of_other_shapes_are_not_one_scaling(results):
    put(results, "small_2", spread([5, 5], [4, 4], [4, 4], samples_drawn=128, samples_distinct=128), (2,))
    assert small(results).reason == "small_2's seeds differ in ranks or in the samples of a step"


def test_what_one_seed_cannot_tell_apart_none_does(results):
    put(results, "small_2", spread([8, 8], [7.5, 7.5], None, exchange="no hook"), (2,))
    assert set(small(results).parts) == {SHARED, WAIT, TOGETHER}


def test_the_largest_of_several_parts_is_not_most_of_it(results):
    put(results, "small_2", spread([8, 8], [7, 7], [5.7, 5.7]))  # 0.5 loader, 1.3 exchange, 1.2 fixed cost
    assert "38 % is lost, the largest part 16 % of the step, because the ranks exchange" in diagnosis(
        small(results)
    )


def test_what_scales_well_and_what_is_slower_than_one(results):
    put(results, "small_2", spread([5.8, 5.8], [5.2, 5.2], [4.8, 4.8]))
    text = diagnosis(small(results))
    assert text.startswith(
        "small_2 scales well: in 2 processes it is through with 1.72 × the samples a second of small_1 in one "
        "(efficiency 86 %, strong scaling); of each step 14 % is lost; 3"
    )
    put(results, "small_2", spread([12, 12], [11.5, 11.5], [5, 5]))
    text = diagnosis(small(results))
    assert text.startswith(
        "small_2 is slower than one process: in 2 processes it is through with 0.83 × the samples"
    )
    for seed, ms in ((1, 9), (2, 12), (3, 12)):  # 1.11 × in one seed, 0.83 × in two
        put(results, "small_2", spread([ms, ms], [ms - 0.5, ms - 0.5], [5, 5]), (seed,))
    one = small(results)
    assert one.speedup.mean < 1 < one.speedup.high
    assert diagnosis(one).startswith(
        "small_2 is no faster than one process, as far as these seeds tell: in 2 "
    )
    put(results, "small_2", spread([5.9, 5.9], [5.4, 5.4], [5, 5]))  # 84.7 %
    assert "does not scale well" in diagnosis(small(results))


def test_shared_samples_are_said_even_where_more_is_lost_to_something_else(results):
    put(results, "small_2", spread([30, 30], [9, 9], [9, 9], samples_drawn=512))
    text = diagnosis(small(results))
    assert "because it takes longer with batches from the loader" in text
    assert "and ranks read the same samples: 256 different ones of the 512 that a step draws" in text


def test_what_could_not_be_told_apart_is_said(results):
    put(results, "small_2", spread([8, 8], [7.5, 7.5], None, exchange="fsdp gathers weights in every step"))
    one = small(results)
    assert set(one.parts) == {SHARED, WAIT, TOGETHER}
    text = diagnosis(one)
    assert "most of it, 38 % of the step, because of communication, imbalance or too little work" in text
    assert (
        "communication, imbalance and too little work could not be told apart: no step was timed without exchange "
        "(fsdp gathers weights in every step)"
    ) in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"scaling.json": {"ranks": 1, "loaded_seconds": [1], "ready_seconds": [1], "alone_seconds": [1]}},
            "small_2 ran in one process",
        ),
        (
            {"env.json": {"device_name": "another"}},
            "ran on another machine or torch: device_name another, small_1's None",
        ),
        (
            {"metrics.json": {"val_loss": 0.1}},
            "small_2 is invalid: metrics.json says val_loss 0.1, evals.csv ends in 0.28",
        ),
        (
            {"metrics.json": {"data_order_sha256": "another"}},
            "small_2 is not comparable: read its data in another order than the baseline",
        ),
        (
            {"metrics.json": {"status": "failed", "reason": "out of memory"}},
            "small_2 has no result; no seed in common",
        ),
    ],
)
def test_why_a_pair_was_not_measured(results, change, reason):
    [(name, values)] = change.items()
    for seed in SEEDS:
        path = results / f"small_2-{seed}" / name
        write_json(path, json.loads(path.read_text()) | values)
    one = small(results)
    assert (one.reason, one.speedup) == (reason, None)
    assert diagnosis(one) == f"The scaling of small_2 against small_1 was not measured: {reason}."


def test_a_run_that_was_not_probed_has_no_figures(results):
    for seed in SEEDS:
        config = results / f"small_2-{seed}" / "config.toml"
        config.write_text(config.read_text().replace("scaling_probe_steps = 5", "scaling_probe_steps = 0"))
        (results / f"small_2-{seed}" / "scaling.json").unlink()
    assert small(results).reason == (
        "small_2's steps were not probed (scaling_probe_steps is 0); no seed in common"
    )


def test_a_reference_in_several_processes_is_none(results):
    put(results, "small_1", spread([5, 5], [4.5, 4.5], [4.5, 4.5]))
    assert small(results).reason == "small_1 ran in 2 processes, and a reference is to be one"


def test_a_probe_that_is_not_as_fast_as_the_training_is_said(results):
    for seed in SEEDS:
        path = results / f"small_2-{seed}" / "metrics.json"
        write_json(path, json.loads(path.read_text()) | {"samples_per_second": 16_000})
    text = diagnosis(small(results))
    assert "the probe's steps of small_2 did 2.00 × the samples a second of its training's" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 0}, "ranks must be a whole number ≥ 1, got 0"),
        ({"samples_distinct": 300}, "300 distinct samples of 256 drawn cannot be"),
        ({"ready_seconds": [0.1]}, "ready_seconds must be the seconds of each of 2 ranks, got \\[0.1\\]"),
        ({"loaded_seconds": [0.1, float("nan")]}, "loaded_seconds must be the seconds of each of 2 ranks"),
        (
            {"alone_seconds": None, "exchange": None},
            "alone_seconds must be the seconds of each of 2 ranks, got None",
        ),
    ],
)
def test_a_malformed_probe_is_named(results, change, message):
    put(results, "small_2", probe("small_2", **change), (2,))
    with pytest.raises(rows.ResultsError, match=f"small_2-2/scaling.json: {message}"):
        rows.read(results)


def test_a_probe_that_was_asked_for_must_be_there(results):
    (results / "small_2-2" / "scaling.json").unlink()
    with pytest.raises(
        rows.ResultsError, match="small_2-2/scaling.json is missing although the run is complete"
    ):
        rows.read(results)


def test_a_declared_pair_is_diagnosed_and_others_are_found_as_before(results, tmp_path):
    made = [one for one in findings(summary.summarize(rows.read(results))) if "processes" in one.text]
    assert [one.runs for one in made] == [("small_2", "small_1"), ("large_2", "large_1")]
    assert made[0].text == diagnosis(small(results))
    undeclared = classifier_study(tmp_path / "b", scaling={}, criteria=[])
    read = summary.summarize(rows.read(undeclared))
    made = {one.runs: one.text for one in findings(read) if "processes" in one.text}
    assert (
        "small_2 in 2 processes trains 1.25 × as many samples a second as small_1 in 1"
        in made["small_2", "small_1"]
    )
    assert scaling.scalings(read) == () and scaling.scaling_frame(read).is_empty()


def test_samples_that_two_ranks_read_are_counted_once_in_throughput_and_epochs(results):
    from metrics.epochs import epochs

    put(results, "small_2", spread([8, 8], [7.5, 7.5], [7, 7], samples_drawn=512))
    for seed in SEEDS:
        path = results / f"small_2-{seed}" / "metrics.json"
        twice = {"samples": 2 * 30 * 256, "tokens": 2 * 30 * 256 * CONTEXT}
        write_json(path, json.loads(path.read_text()) | twice)
        for name in ("steps.csv", "evals.csv"):
            path = results / f"small_2-{seed}" / name
            head, *lines = path.read_text().splitlines()
            cells = [line.split(",") for line in lines]
            path.write_text("\n".join([head, *(",".join([c[0], str(2 * int(c[1])), *c[2:]]) for c in cells)]))
    read = rows.read(results)
    study = summary.summarize(read)
    assert study.of("small_2").estimates["samples_per_second"].mean == pytest.approx(32_000)
    ends = {row["run"]: row["epoch"] for row in epochs(read).to_dicts()}
    assert ends == dict.fromkeys(ends, 3.0)
    assert study.of("small_2").status == "not comparable"  # it had twice the tokens


def test_the_frame_of_the_pairs(results):
    frame = scaling.scaling_frame(summary.summarize(rows.read(results)))
    first = frame.row(0, named=True)
    assert (first["run"], first["kind"], first["processes"], first["drawn"]) == ("small_2", "strong", 2, 256)
    assert first["lost"] == pytest.approx(sum(first[name.replace(" ", "_")] for name in scaling.PARTS))
    points = scaling.scaling_points(summary.summarize(rows.read(results)), efficiency=True)
    assert points.select("run", "series", "processes", "value").rows() == [
        ("large_1", "large_1, weak", 1, 100.0),
        ("large_2", "large_1, weak", 2, pytest.approx(100 * 40 / 42)),
        ("small_1", "small_1, strong", 1, 100.0),
        ("small_2", "small_1, strong", 2, pytest.approx(62.5)),
    ]
