"""The search for the largest micro-batch: its order by hand, its memory of what was tried, the number of trials."""

import math
import random
from dataclasses import replace

import pytest

from engine.largest import Result, search


class Device:
    """Stands in for a trial: fits up to `fits`, breaks at `broken`, is killed after `calls` trials."""

    def __init__(self, fits: int, broken: int = 0, calls: int = 1000):
        self.fits, self.broken, self.calls, self.tried, self.kept = fits, broken, calls, [], []

    def __call__(self, micro: int) -> Result:
        if len(self.tried) == self.calls:
            raise KeyboardInterrupt
        self.tried.append(micro)
        if micro == self.broken:
            return Result(micro, "error", message="exit status 1")
        return Result(micro, "success" if micro <= self.fits else "out_of_memory")

    def keep(self, results):
        self.kept = results

    def search(self, largest=10**9, known=(), start=1):
        return search(self, list(known), largest, self.keep, start)


@pytest.mark.parametrize(
    ("fits", "largest", "tried"),
    [
        (11, 10**9, [1, 2, 4, 8, 16, 12, 10, 11]),
        (1, 10**9, [1, 2]),
        (0, 10**9, [1]),
        (7, 7, [1, 2, 4, 7]),
        (100, 1, [1]),
        (66, 66, [1, 2, 4, 8, 16, 32, 64, 66]),
        (65, 66, [1, 2, 4, 8, 16, 32, 64, 66]),  # 66 is nearer than a sixteenth
        (90, 10**9, [1, 2, 4, 8, 16, 32, 64, 128, 96, 80, 88, 92]),
    ],
)
def test_double_then_bisect_where_memory_is_not_known(fits, largest, tried):
    device = Device(fits)
    results = device.search(largest)
    assert device.tried == tried
    assert [r.micro_batch for r in results] == sorted(tried) and results == device.kept
    assert all((r.status == "success") == (r.micro_batch <= fits) for r in results)


def test_an_error_is_no_limit_and_ends_the_search():
    device = Device(fits=11, broken=8)
    results = device.search()
    assert device.tried == [1, 2, 4, 8]
    assert [r.status for r in results] == ["success"] * 3 + ["error"] and device.kept == results
    again = Device(fits=11)  # what was broken is repaired
    assert [r.status for r in again.search(known=results)].count("error") == 0
    assert again.tried == [8, 16, 12, 10, 11]


def test_a_killed_search_goes_on_where_it_was():
    device = Device(fits=11, calls=5)
    with pytest.raises(KeyboardInterrupt):
        device.search()
    assert [r.micro_batch for r in device.kept] == [1, 2, 4, 8, 16]
    again = Device(fits=11)
    again.search(known=device.kept)
    assert again.tried == [12, 10, 11]
    last = Device(fits=11)
    last.search(known=again.kept)
    assert last.tried == []


class Memory(Device):
    """A device with a limit of 95.75 GiB, of which a trial holds 2 GiB and 0.5 for each sequence.

    So 187 fit, unless `fits` says otherwise; then what is held ends at the limit. held: another function of the
    micro-batch, in GiB.
    """

    def __init__(self, held=lambda micro: 2 + micro / 2, limit=95.75, fits=0, calls=1000):
        self.held, self.limit = held, limit
        super().__init__(fits or max((m for m in range(1, 4000) if held(m) <= limit), default=0), calls=calls)

    def __call__(self, micro: int) -> Result:
        found = super().__call__(micro)
        if found.status != "success":
            return found
        return replace(found, reserved_gib=min(self.held(micro), self.limit), limit_gib=self.limit)


@pytest.mark.parametrize(
    ("start", "tried"),
    [
        # 60 hold 32: in proportion 95.75 are reached at 179.5. From (60, 32) to (179, 91.5) it is 0.5 each: 187.5.
        (60, [60, 179, 187, 188]),
        # 1 holds 2.5: 38.3, but no more than 8 times as many at once; from (1, 2.5) to (8, 6) the line ends at 187.
        (1, [1, 8, 64, 187, 188]),
        (512, [512, 64, 180, 187, 188]),  # too much: an eighth of it; 64 hold 34: in proportion 180.2
        (187, [187, 188]),
        (188, [188, 23, 163, 187]),  # 23 hold 13.5: in proportion 163.1
    ],
)
def test_memory_along_a_line(start, tried):
    device = Memory()
    results = device.search(start=start)
    assert device.tried == tried
    assert [r.micro_batch for r in results] == sorted(tried) and results == device.kept


@pytest.mark.parametrize(
    ("fits", "tried"),
    [
        (185, [60, 179, 187]),  # 187 is nearer to 179 than a sixteenth of it
        (170, [60, 179, 169]),  # 179 - 179 // 17
        # Steps down double, 10, 18, to 119: not below the middle of 60 and 151. Then down again from 151, by 8.
        (150, [60, 179, 169, 151, 119, 143]),
        (189, [60, 179, 187, 188, 199]),  # more than the line has room for: 188 + 188 // 16
        # 199 + 2 × 12. The line ends at 199, so 200; the middle of 200 and 223.
        (200, [60, 179, 187, 188, 199, 223, 200, 211]),
    ],
)
def test_a_line_that_is_wrong_at_its_end(fits, tried):
    device = Memory(fits=fits)
    device.search(start=60)
    assert device.tried == tried


def test_memory_in_steps():
    """In steps of 8 GiB 172 fit, which hold 88; 60 hold 32, as they do without steps."""
    device = Memory(lambda micro: 8 * math.ceil((2 + micro / 2) / 8))
    device.search(start=60)
    assert (device.fits, device.tried) == (172, [60, 179, 169])


def test_memory_that_grows_faster_than_the_micro_batch():
    """(micro / 16)² of 140 GiB: 189 fit. 64 hold 16, in proportion 560 fit; 512 is 8 times as many.

    Steps down from there are 30, 56, 100 and then to the middles; from (64, 16) to (129, 65) the line ends at 228,
    and 195 - 195 // 17 is tried.
    """
    device = Memory(lambda micro: (micro / 16) ** 2, limit=140)
    device.search(start=64)
    assert (device.fits, device.tried) == (189, [64, 512, 482, 426, 326, 195, 129, 184])


@pytest.mark.parametrize(
    ("limit", "largest", "tried"),
    [
        (1.0, 10**9, [60, 7, 1]),  # nothing fits
        (95.75, 100, [60, 100]),
        (95.75, 40, [40]),
        (95.75, 187, [60, 179, 187]),
    ],
)
def test_where_nothing_fits_or_all_that_may_be_tried(limit, largest, tried):
    device = Memory(limit=limit)
    device.search(largest, start=60)
    assert device.tried == tried


def test_what_is_known_is_where_the_line_goes_on():
    device = Memory(calls=2)
    with pytest.raises(KeyboardInterrupt):
        device.search(start=60)
    again = Memory()
    again.search(known=device.kept, start=60)
    assert again.tried == [187, 188]
    for largest in (10**9, 187, 100):  # nor is anything tried that may not be
        last = Memory()
        last.search(largest, known=again.kept, start=60)
        assert last.tried == []


def trials_of_doubling(fits: int) -> int:
    """Of doubling from 1 and bisecting to a sixteenth."""
    device = Device(fits)
    device.search()
    return len(device.tried)


CURVES = {  # shares of the limit at a share x of what fits
    "line": lambda x: 0.2 + 0.8 * x,
    "flat, then a line": lambda x: max(0.4, 0.1 + 0.9 * x),
    "steps": lambda x: math.ceil(25 * (0.2 + 0.8 * x)) / 25,
    "faster": lambda x: 0.1 + 0.9 * x**2,
    "slower": lambda x: 0.1 + 0.9 * math.sqrt(x),
    "noise": lambda x: (0.2 + 0.8 * x) * (1 + 0.03 * random.Random(x).uniform(-1, 1)),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("more", [1.0, 1.3])
def test_few_trials_whatever_memory_is_like(curve, more):
    """Never many more than doubling takes; the end is proven. more: fits than the curve has room for."""
    for fits in range(1, 700, 9):
        by_doubling = trials_of_doubling(fits)
        for start in (1, 16, 60, 256):
            device = Memory(lambda micro: 140 * CURVES[curve](more * micro / (fits + 0.5)), 140.0, fits)  # noqa: B023
            results = {r.micro_batch: r.status for r in device.search(start=start)}
            largest = max(m for m, status in results.items() if status == "success")
            smallest = min(m for m, status in results.items() if status == "out_of_memory")
            assert largest <= fits < smallest and smallest - largest <= max(largest // 16, 1)
            assert len(device.tried) == len(set(device.tried)) <= by_doubling + 5
            if curve == "line" and more == 1 and start <= fits:
                assert len(device.tried) <= 6 and (largest, smallest) == (fits, fits + 1)
