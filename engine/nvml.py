"""What an NVIDIA driver says of one GPU, through its own library (libnvidia-ml), which comes with every driver.

By ctypes, so that nothing needs to be installed; a call takes no lock of Python's while it waits for the driver.
"""

import ctypes
from collections.abc import Callable

LIBRARY = "libnvidia-ml.so.1"
GIB = 2**30
# Bits of the reasons why clocks are below what was asked for (nvml.h, nvmlClocksEventReasons).
THERMAL = 0x20 | 0x40  # software's slowdown for temperature, and hardware's
POWER_CAP = 0x04
SM_CLOCK, GPU_TEMPERATURE = 1, 0
VERSION_BYTES = 96  # nvml.h has 80 at most


class NvmlError(Exception):
    """Why nothing can be read: no library, no driver, no such GPU."""


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class _Utilization(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("gpu", "memory")]


class Gpu:
    """One GPU, found by its UUID, or where the library does not know that, by its place on the PCI bus."""

    def __init__(self, uuid: str, bus: str, library=None):
        """library: libnvidia-ml as ctypes has it; None: load it. Raises NvmlError."""
        try:
            self._library = library or ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise NvmlError(f"{LIBRARY} cannot be loaded ({error})") from None
        if code := self._library.nvmlInit_v2():
            raise NvmlError(f"nvmlInit failed with code {code}")
        self._handle = ctypes.c_void_p()
        ways = (
            (self._library.nvmlDeviceGetHandleByUUID, f"GPU-{uuid}"),
            (
                self._library.nvmlDeviceGetHandleByUUID,
                f"MIG-{uuid}",
            ),  # a slice, whose place is that of the whole
            (self._library.nvmlDeviceGetHandleByPciBusId_v2, bus),
        )
        codes = []
        for find, name in ways:
            codes.append(find(name.encode(), ctypes.byref(self._handle)))
            if not codes[-1]:
                return
        raise NvmlError(f"NVML knows no GPU {uuid} and none at {bus} (codes {', '.join(map(str, codes))})")

    @classmethod
    def of(cls, properties, library=None) -> "Gpu":
        """The GPU with these `properties`, as torch.cuda.get_device_properties tells them. Raises NvmlError."""
        place = (getattr(properties, f"pci_{part}_id", 0) for part in ("domain", "bus", "device"))
        return cls(
            str(getattr(properties, "uuid", "")), "{:08X}:{:02X}:{:02X}.0".format(*place), library=library
        )

    def installed(self) -> dict[str, str | int | None]:
        """How the GPU is installed: its driver, and its link to the host; None for what it cannot say.

        The generation is the highest that the GPU and its slot can have together: it is lower while the link rests.
        The width is what the link has now.
        """
        nvml, number, text = self._library, ctypes.c_uint, ctypes.create_string_buffer(VERSION_BYTES)
        failed = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(VERSION_BYTES))
        return {
            "driver_version": None if failed else text.value.decode("ascii", "replace"),
            "pcie_generation": self._asked(nvml.nvmlDeviceGetMaxPcieLinkGeneration, number(), "value"),
            "pcie_width": self._asked(nvml.nvmlDeviceGetCurrPcieLinkWidth, number(), "value"),
        }

    def read(self) -> dict[str, float | None]:
        """What the GPU does now; None for what it cannot say."""
        nvml, number, large = self._library, ctypes.c_uint, ctypes.c_ulonglong
        milliwatts = self._asked(nvml.nvmlDeviceGetPowerUsage, number(), "value")
        reasons = self._asked(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, large(), "value")
        used = self._asked(nvml.nvmlDeviceGetMemoryInfo, _Memory(), "used")
        return {
            "device_memory_gib": None if used is None else used / GIB,
            "device_utilization_percent": self._asked(
                nvml.nvmlDeviceGetUtilizationRates, _Utilization(), "gpu"
            ),
            "temperature_celsius": self._asked(
                nvml.nvmlDeviceGetTemperature, number(), "value", GPU_TEMPERATURE
            ),
            "power_watts": None if milliwatts is None else milliwatts / 1000,
            "sm_clock_mhz": self._asked(nvml.nvmlDeviceGetClockInfo, number(), "value", SM_CLOCK),
            "thermal_throttle": None if reasons is None else int(bool(reasons & THERMAL)),
            "power_cap": None if reasons is None else int(bool(reasons & POWER_CAP)),
        }

    def _asked(self, call: Callable, place, field: str, *how: int) -> int | None:
        """The `field` of `place`, where the call puts it; None where the GPU does not support it."""
        return None if call(self._handle, *how, ctypes.byref(place)) else getattr(place, field)
