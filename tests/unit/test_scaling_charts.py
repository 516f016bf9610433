"""The charts of scaling: what lies apart in them, and where names are."""

from itertools import pairwise

import polars as pl
import pytest
from fake_classifier import classifier_study

from metrics import diagnosis, rows, summary
from metrics.scaling import POINTS, scaling_points
from plots import scaling_charts
from plots.charts import CHARACTER, WIDTH
from plots.labels import HEIGHT

LONG = "a_run_whose_name_is_so_long_{}: 1.90 × (strong)"


def points(runs: dict[str, tuple[int, float]], label="{}: 1.90 × (strong)") -> pl.DataFrame:
    """run -> processes and value, all against `one`."""
    found = [("one", "one, strong", "", 1, 1.0, None, None)]
    found += [(run, "one, strong", label.format(run), n, v, v - 0.1, v + 0.1) for run, (n, v) in runs.items()]
    return pl.DataFrame(found, schema=POINTS, orient="row")


def pixels(frame: pl.DataFrame) -> float:
    """Pixels of one process."""
    left, right = scaling_charts._across(frame)
    return WIDTH / (right - left)


def test_runs_in_as_many_processes_lie_beside_each_other():
    frame = points({"b": (2, 1.9), "a": (2, 1.9), "c": (2, 1.9), "four": (4, 3.8)})
    x = dict(scaling_charts.apart(frame, ["one", "a", "b", "c", "four"]).select("run", "x").iter_rows())
    assert (x["one"], x["b"], x["four"]) == (1, 2, 4)
    assert pixels(frame) * (2 - x["a"]) == pytest.approx(10) == pixels(frame) * (x["c"] - 2)


def test_many_runs_in_as_many_processes_stay_near_their_place():
    frame = points({f"run_{i}": (2, 1.5) for i in range(11)})
    x = scaling_charts.apart(frame, frame["run"].to_list()).filter(processes=2)["x"].to_list()
    assert len(set(x)) == 11 and pixels(frame) * (max(x) - min(x)) == pytest.approx(40)


@pytest.mark.parametrize("label", ["{}: 1.90 × (strong)", LONG])
@pytest.mark.parametrize("level", [0.0, 1.0, 2.0])
def test_names_are_right_of_all_points_and_cover_nothing(label, level):
    """All at one height, which is the axis's end, or its middle."""
    frame = points({f"run_{i}": (2, level) for i in range(6)}, label)
    named = scaling_charts.beside(scaling_charts.apart(frame, frame["run"].to_list()), (0.0, 2.0)).to_dicts()
    lines = [row["label"].split("\n") for row in named]
    assert [" ".join(own) for own in lines] == [label.format(f"run_{i}") for i in range(6)]
    left, right = scaling_charts._across(frame)
    widest = CHARACTER * max(len(line) for own in lines for line in own)
    for row in named:
        assert pixels(frame) * (row["name_x"] - 2) > 20 + 3  # half of those that lie apart, and a point
        assert pixels(frame) * (right - row["name_x"]) == pytest.approx(widest)
    tops = [(2.0 - row["name_value"]) * 150 - HEIGHT / 2 for row in named]  # 300 pixels for 2
    ends = [top + HEIGHT * len(own) for top, own in zip(tops, lines, strict=True)]
    assert all(above <= below + 1e-9 for above, (_, below) in zip(ends, pairwise(tops), strict=False))
    assert tops[0] > -1e-9 and ends[-1] < 300 + 1e-9


def test_a_name_with_room_is_at_the_height_of_its_point():
    frame = points({"a": (2, 0.5), "b": (2, 1.5)})
    named = scaling_charts.beside(scaling_charts.apart(frame, ["one", "a", "b"]), (0.0, 2.0))
    assert dict(named.select("run", "name_value").iter_rows()) == pytest.approx({"a": 0.5, "b": 1.5})


def test_the_line_of_what_scales_well_is_where_the_diagnosis_says(monkeypatch):
    frame = points({"a": (2, 90.0)})
    for good, said in ((diagnosis.GOOD, "85 %"), (0.7, "70 %")):
        monkeypatch.setattr(scaling_charts, "GOOD", good)
        chart = scaling_charts.efficiency(frame, "t", "y", ["one", "a"]).to_dict()
        lines = [drawn for drawn in chart["datasets"].values() if "text" in drawn[0] and len(drawn) > 1]
        assert {"x": 2.0, "value": pytest.approx(100 * good), "text": said} in [drawn[1] for drawn in lines]


def test_the_zone_below_one_process_is_where_it_belongs(tmp_path):
    """At one process all of the efficiency's axis up to 100 % is slower than one; at two half of it."""
    read = summary.summarize(rows.read(classifier_study(tmp_path)))
    for efficiency, draw, at_two in (
        (False, scaling_charts.speedup, 1),
        (True, scaling_charts.efficiency, 50),
    ):
        chart = draw(scaling_points(read, efficiency), "t", "y", list(read.results.study.runs)).to_dict()
        [zone] = [rows for rows in chart["datasets"].values() if "top" in rows[0] and len(rows) > 1]
        near = min(zone, key=lambda row: abs(row["x"] - 2))
        assert near["top"] == pytest.approx(at_two, rel=0.03) and {row["bottom"] for row in zone} == {0}
