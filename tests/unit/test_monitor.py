"""The device monitor: a driver's library imitated, what cannot be read left empty, and a run with and without it."""

import ctypes
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from engine_runs import ledger, read_json, rows

from engine import monitor, nvml
from engine.config import resolve
from engine.errors import ConfigError
from engine.monitor import COLUMNS, FILE, Monitor, Process

CPU = torch.device("cpu")
GIB = 2**30


class Library:
    """Answers as libnvidia-ml does, of one GPU; `missing`: functions that its GPU does not support."""

    def __init__(
        self, missing: tuple[str, ...] = (), reasons: int = 0, knows_uuid: bool = True, init: int = 0
    ):
        self.missing, self.reasons, self.knows_uuid, self.init, self.asked = (
            missing,
            reasons,
            knows_uuid,
            init,
            [],
        )

    def __getattr__(self, name: str):
        def call(*arguments) -> int:
            self.asked.append(name)
            if name in self.missing:
                return 3  # NVML_ERROR_NOT_SUPPORTED
            return getattr(self, f"_{name}")(*arguments) or 0

        return call

    def _nvmlInit_v2(self):  # noqa: N802
        return self.init

    def _nvmlDeviceGetHandleByUUID(self, uuid, handle):  # noqa: N802
        return 0 if self.knows_uuid and uuid == b"GPU-abc" else 6

    def _nvmlDeviceGetHandleByPciBusId_v2(self, bus, handle):  # noqa: N802
        return 0 if bus == b"00000000:3B:00.0" else 6

    def _nvmlSystemGetDriverVersion(self, text, size):  # noqa: N802
        text.value = b"580.95.05"
        assert size.value == len(text)

    def _nvmlDeviceGetMaxPcieLinkGeneration(self, _, place):  # noqa: N802
        place._obj.value = 5

    def _nvmlDeviceGetCurrPcieLinkWidth(self, _, place):  # noqa: N802
        place._obj.value = 8

    def _nvmlDeviceGetMemoryInfo(self, _, place):  # noqa: N802
        place._obj.total, place._obj.free, place._obj.used = 80 * GIB, 74 * GIB, 6 * GIB

    def _nvmlDeviceGetUtilizationRates(self, _, place):  # noqa: N802
        place._obj.gpu, place._obj.memory = 0, 40

    def _nvmlDeviceGetTemperature(self, _, sensor, place):  # noqa: N802
        assert sensor == 0
        place._obj.value = 83

    def _nvmlDeviceGetPowerUsage(self, _, place):  # noqa: N802
        place._obj.value = 654_321

    def _nvmlDeviceGetClockInfo(self, _, kind, place):  # noqa: N802
        assert kind == 1
        place._obj.value = 1980

    def _nvmlDeviceGetCurrentClocksThrottleReasons(self, _, place):  # noqa: N802
        assert isinstance(place._obj, ctypes.c_ulonglong)
        place._obj.value = self.reasons


def test_a_gpu_is_read_by_the_drivers_own_library():
    found = nvml.Gpu("abc", "", Library()).read()
    assert found == {
        "device_memory_gib": 6.0,
        "device_utilization_percent": 0,
        "temperature_celsius": 83,
        "power_watts": 654.321,
        "sm_clock_mhz": 1980,
        "thermal_throttle": 0,
        "power_cap": 0,
    }
    assert tuple(found) == monitor.OF_GPU


def test_how_a_gpu_is_installed_comes_from_the_same_library():
    found = {"driver_version": "580.95.05", "pcie_generation": 5, "pcie_width": 8}
    assert nvml.Gpu("abc", "", Library()).installed() == found
    missing = (
        "nvmlSystemGetDriverVersion",
        "nvmlDeviceGetMaxPcieLinkGeneration",
        "nvmlDeviceGetCurrPcieLinkWidth",
    )
    assert nvml.Gpu("abc", "", Library(missing=missing)).installed() == dict.fromkeys(found)


def test_a_gpu_is_found_from_what_torch_knows_of_it():
    known = SimpleNamespace(uuid="other", pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    library = Library()
    assert nvml.Gpu.of(known, library).installed()["pcie_width"] == 8
    assert library.asked.count("nvmlDeviceGetHandleByPciBusId_v2") == 1


@pytest.mark.parametrize(
    ("reasons", "thermal", "capped"),
    [(0x1, 0, 0), (0x4, 0, 1), (0x20, 1, 0), (0x40, 1, 0), (0x4 | 0x20, 1, 1), (0x80, 0, 0)],
)
def test_why_clocks_are_low(reasons, thermal, capped):
    found = nvml.Gpu("abc", "", Library(reasons=reasons)).read()
    assert (found["thermal_throttle"], found["power_cap"]) == (thermal, capped)


def test_what_a_gpu_cannot_say_is_nothing_and_not_0():
    asked = [
        n.removeprefix("_") for n in vars(Library) if n.startswith("_nvmlDeviceGet") and "Handle" not in n
    ]
    assert set(nvml.Gpu("abc", "", Library(missing=tuple(asked))).read().values()) == {None}


def test_a_gpu_is_found_by_its_uuid_or_its_place():
    library = Library(knows_uuid=False)
    nvml.Gpu("abc", "00000000:3B:00.0", library)
    assert library.asked[-1] == "nvmlDeviceGetHandleByPciBusId_v2"
    with pytest.raises(nvml.NvmlError, match=r"NVML knows no GPU abc and none at x \(codes 6, 6, 6\)"):
        nvml.Gpu("abc", "x", Library(knows_uuid=False))
    with pytest.raises(nvml.NvmlError, match="nvmlInit failed with code 9"):
        nvml.Gpu("abc", "x", Library(init=9))


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(nvml, "LIBRARY", "libnone-of-that-name.so.1")
    with pytest.raises(nvml.NvmlError, match="libnone-of-that-name.so.1 cannot be loaded"):
        nvml.Gpu("abc", "x")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    reader, problem = monitor.gpu_reader(torch.device("cuda"))
    assert reader is None and problem.startswith(
        "no figures of the GPU: libnone-of-that-name.so.1 cannot be loaded"
    )
    assert monitor.gpu_reader(CPU) == (None, "")


def test_a_process_is_read_without_a_library():
    process = Process()
    while time.process_time() - process._cpu < 0.02:
        pass
    found = process.read()
    assert 0.01 < found["process_memory_gib"] < 100 and 0 < found["process_cpu_percent"] <= 110 * 64
    assert monitor._resident_gib("/proc/none-of-that-name") is None


def sampled(values: list[dict]) -> Monitor:
    """A monitor that has read `values`, one a step, in this thread."""
    given = iter(values)
    one = Monitor(0.5, CPU, [lambda: next(given)])
    for step in range(len(values)):
        one.step = step
        one.sample()
    return one


def test_means_and_maxima_of_what_was_read(tmp_path):
    one = sampled(
        [{"power_watts": 300.0, "thermal_throttle": 0}, {"thermal_throttle": 1}, {"power_watts": 500.0}]
    )
    found = one.figures()
    assert (found["monitor_samples"], found["power_watts_mean"], found["power_watts_max"]) == (
        3,
        400.0,
        500.0,
    )
    assert found["thermal_throttle_share"] == 0.5
    assert (
        found["temperature_celsius_mean"]
        is found["temperature_celsius_max"]
        is found["power_cap_share"]
        is None
    )
    one.write(tmp_path, last=1)
    written = rows(tmp_path / FILE)
    assert list(written[0]) == list(COLUMNS) and [row["step"] for row in written] == ["0", "1"]
    assert [row["power_watts"] for row in written] == ["300.0", ""]
    assert written[0]["thermal_throttle"] == "0" and written[0]["temperature_celsius"] == ""
    (line,) = one.lines()
    assert line.agrees and line.in_effect == "3 samples" and "not read here: device_memory_gib" in line.how


def test_nothing_is_sampled_in_a_pause():
    one = Monitor(0.5, CPU, [dict])
    with one.paused():
        one.sample()
    assert not one.rows
    one.sample()
    assert len(one.rows) == 1


def test_what_the_process_did_in_a_pause_is_in_no_row(monkeypatch):
    """80 % of a second is used in the pause, 10 % of one after it."""
    clock, used = iter([0.0, 1.0, 2.0]), iter([0.0, 0.8, 0.9])
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(monitor.time, "process_time", lambda: next(used))
    one = Monitor(0.0, CPU)
    one._process = monitor.Process()
    with one.paused():
        pass
    assert one._process.read()["process_cpu_percent"] == pytest.approx(10.0)


def test_a_thread_samples_until_the_end():
    enough, count = threading.Event(), []

    def read() -> dict:
        count.append(1)
        if len(count) == 3:
            enough.set()
        return {}

    with Monitor(0.001, CPU, [read]) as one:
        assert enough.wait(30)
    seen = len(one.rows)
    assert seen >= 3 and not one._thread.is_alive() and one.busy_seconds > 0
    assert all(a["seconds"] < b["seconds"] for a, b in zip(one.rows, one.rows[1:], strict=False))


def test_the_ledger_says_what_was_not_sampled():
    one = Monitor(0.5, CPU, [])
    assert [(line.in_effect, line.agrees) for line in one.lines()] == [("0 samples", False)]
    one = sampled([{"process_memory_gib": 1.0}])
    one.problem = "no figures of the GPU: because"
    (line,) = one.lines()
    assert not line.agrees and line.how.endswith("no figures of the GPU: because")
    off = Monitor(0.0, CPU)
    assert off.lines() == [] and off.figures() == {}


# --- in a run


def test_a_run_is_sampled_and_trains_as_without(lab, monkeypatch):
    monkeypatch.setattr("engine.rules.kept.SHORTEST_INTERVAL", 0.0)
    settings = {"steps": 60, "dropout": 0.1}
    plain = lab.train(run="plain", **settings)
    run = lab.train(run="watched", monitor_interval=0.002, **settings)
    assert [r["train_loss"] for r in rows(plain / "steps.csv")] == [
        r["train_loss"] for r in rows(run / "steps.csv")
    ]
    found, metrics = rows(run / FILE), read_json(run / "metrics.json")
    assert metrics["monitor_samples"] == len(found) > 3
    memory = [float(row["process_memory_gib"]) for row in found]
    assert metrics["process_memory_gib_max"] == max(memory) > 0.05
    assert metrics["power_watts_mean"] is None and {row["power_watts"] for row in found} == {""}
    assert {int(row["step"]) for row in found} <= set(range(60))
    line = ledger(run)["monitor_interval"]
    assert line["agrees"] and line["requested"] == "every 0.002 s" and " ms each" in line["how"]
    assert not (plain / FILE).exists() and "monitor_samples" not in read_json(plain / "metrics.json")


def test_an_interval_that_would_disturb_is_refused():
    with pytest.raises(ConfigError, match=r"monitor_interval = 0.01: must be 0 or ≥ 0.05"):
        resolve({"monitor_interval": 0.01}, "test")
    resolve({"monitor_interval": 0.05}, "test")
