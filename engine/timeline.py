"""Where the time of traced steps went, from the events of a Chrome trace (times in microseconds).

On a GPU it is the device's time that is divided: a kernel belongs to the part of the step in which the host launched
it, and NCCL's kernels are communication. On a CPU it is the host's. Nothing here needs torch.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable

from engine.profiling import END_OF_STEP, PREFIX

PARTS = ("data", "forward", "backward", "optimizer", "communication", "other", "idle")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
GRAPH = "## Call CompiledFxGraph"  # how a call of compiled code begins in a trace
TOP = 15

Intervals = list[tuple[float, float]]  # sorted, disjoint (start, end)


def split(events: Iterable[dict]) -> dict:
    """The content of profile.json: milliseconds a step of each part, and the operations that took most of them.

    The parts add up to the step. `communication` is what nothing else hid; the hidden rest is
    communication_overlapped_ms. `other` is outside every part. `idle` (on a GPU alone): the device had nothing to do,
    and data was not what it waited for.
    """
    events = [e for e in events if e.get("ph") == "X"]
    windows, ranges = _windows(events), _ranges(events)
    on_gpu = any(e["cat"] in ON_DEVICE for e in events)
    if on_gpu:
        launches = _launches(events)
        steps = _split_device(launches, windows, ranges)
        mine = [kernel for time, kernel in launches if contains(windows, time)]
        top = _most_time(mine, len(windows), inside={})
    else:
        steps = [_split_host(events, window, ranges) for window in windows]
        mine = [e for e in events if _is_operation(e) and contains(windows, e["ts"])]
        top = _most_time(mine, len(windows), inside=_inside(mine))
    n = len(steps)
    return {
        "steps": n,
        "device": "cuda" if on_gpu else "cpu",
        "step_ms": sum(s["step"] for s in steps) / n / 1000,
        "parts_ms": {part: sum(s[part] for s in steps) / n / 1000 for part in PARTS},
        "communication_overlapped_ms": sum(s["overlapped"] for s in steps) / n / 1000,
        "operations": top,
    }


def _interval(event: dict) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _ranges(events: list[dict]) -> dict[str, Intervals]:
    """The host's time in each part that the training loop marked."""
    found = defaultdict(list)
    for event in events:
        if event["name"].startswith(PREFIX) and event["cat"] == "user_annotation":
            found[event["name"].removeprefix(PREFIX)].append(_interval(event))
    return {part: union(intervals) for part, intervals in found.items()}


def _windows(events: list[dict]) -> Intervals:
    """Each step on the host: from the first part after the step before, which waits for data, to its own end."""
    marks = sorted(
        (e["ts"], e["name"] == END_OF_STEP)
        for e in events
        if e["name"].startswith(PREFIX) and e["cat"] == "user_annotation"
    )
    windows, start = [], None
    for time, is_end in marks:
        if is_end:
            windows.append((start, time))
            start = None
        elif start is None:
            start = time
    return windows


# --- on a CPU


def _is_operation(event: dict) -> bool:
    return event["cat"] == "cpu_op" or event["name"].startswith(GRAPH)


def _split_host(events: list[dict], window: tuple[float, float], ranges: dict[str, Intervals]) -> dict:
    """One step, by the durations of its parts; communication is what gloo's threads do meanwhile."""
    main = next(e["tid"] for e in events if e["name"] == END_OF_STEP)
    computing = union(
        _interval(e) for e in events if e["tid"] == main and e["name"].startswith(("aten::", GRAPH))
    )
    gloo = clip(union(_interval(e) for e in events if e["name"].startswith("gloo:")), window)
    exposed = subtract(gloo, computing)
    found, taken = dict.fromkeys(PARTS, 0.0), exposed
    for part in ("data", "forward", "backward", "optimizer"):
        mine = subtract(clip(ranges.get(part, []), window), taken)
        found[part], taken = length(mine), union([*taken, *mine])
    found["communication"] = length(exposed)
    found["other"] = window[1] - window[0] - length(taken)
    return {**found, "step": window[1] - window[0], "overlapped": length(gloo) - length(exposed)}


def _inside(events: list[dict]) -> dict[int, float]:
    """By id of an event: the time that it spent in the events directly inside it, on its thread."""
    inside, around = defaultdict(float), []
    for event in sorted(events, key=lambda e: (e["tid"], e["ts"], -e["dur"])):
        while around and (around[-1]["tid"] != event["tid"] or _interval(around[-1])[1] <= event["ts"]):
            around.pop()
        if around:
            inside[id(around[-1])] += event["dur"]
        around.append(event)
    return inside


# --- on a GPU


def _launches(events: list[dict]) -> list[tuple[float, dict]]:
    """What ran on the device, each with the time of its launch by the host, if that is in the trace."""
    times = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e["cat"] in LAUNCHES and "correlation" in e.get("args", {})
    }
    device = [e for e in events if e["cat"] in ON_DEVICE]
    return [(times[c], e) for e in device if (c := e["args"]["correlation"]) in times]


def _split_device(
    launches: list[tuple[float, dict]], windows: Intervals, ranges: dict[str, Intervals]
) -> list[dict]:
    """Each step on the device: from the end of what was launched before it to the end of what it launched."""
    steps = []
    for start, end in windows:
        before = [_interval(e)[1] for time, e in launches if time < start]
        mine = [(time, e) for time, e in launches if start <= time <= end]
        window = max([start, *before]), max([end, *(_interval(e)[1] for _, e in mine)])
        steps.append(_split_kernels(mine, window, ranges))
    return steps


def _split_kernels(
    launches: list[tuple[float, dict]], window: tuple[float, float], ranges: dict[str, Intervals]
) -> dict:
    """One step's kernels with the time of their launch; what runs at the same time counts once."""
    by_part = defaultdict(list)
    for time, kernel in launches:
        by_part[_part_of(time, kernel, ranges)].append(_interval(kernel))
    found, taken = dict.fromkeys(PARTS, 0.0), []
    for part in ("data", "forward", "backward", "optimizer", "other"):
        mine = subtract(clip(union(by_part[part]), window), taken)
        found[part], taken = length(mine), union([*taken, *mine])
    nccl = clip(union(by_part["communication"]), window)
    exposed = subtract(nccl, taken)
    idle = subtract([window], union([*taken, *nccl]))
    without_data = subtract(idle, ranges.get("data", []))
    found["communication"] = length(exposed)
    found["idle"] = length(without_data)
    found["data"] += length(idle) - length(without_data)
    return {**found, "step": window[1] - window[0], "overlapped": length(nccl) - length(exposed)}


def _part_of(time: float, kernel: dict, ranges: dict[str, Intervals]) -> str:
    if kernel["name"].startswith("nccl"):
        return "communication"
    for part in ("data", "forward", "backward", "optimizer"):
        if contains(ranges.get(part, []), time):
            return part
    return "other"


# --- operations


def _most_time(events: list[dict], steps: int, inside: dict[int, float]) -> list[dict]:
    """The TOP operations by their own time, without what was spent `inside` in others; means of `steps` steps."""
    time, calls = Counter(), Counter()
    for event in events:
        time[event["name"]] += event["dur"] - inside.get(id(event), 0.0)
        calls[event["name"]] += 1
    return [
        {"name": name, "ms": total / steps / 1000, "calls": calls[name] / steps}
        for name, total in time.most_common(TOP)
    ]


# --- intervals


def union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """What is in any of them."""
    joined = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def subtract(intervals: Intervals, taken: Intervals) -> Intervals:
    """What is in `intervals` and not in `taken`."""
    left, i = [], 0
    for start, end in intervals:
        free = start  # nothing before it is left to look at
        while i < len(taken) and taken[i][0] < end:
            if taken[i][0] > free:
                left.append((free, taken[i][0]))
            free = max(free, taken[i][1])
            if taken[i][1] > end:
                break  # it reaches into the next interval
            i += 1
        if free < end:
            left.append((free, end))
    return left


def clip(intervals: Intervals, window: tuple[float, float]) -> Intervals:
    """What lies in `window`."""
    low, high = window
    return [(max(a, low), min(b, high)) for a, b in intervals if b > low and a < high]


def contains(intervals: Intervals, time: float) -> bool:
    """Whether one of them holds `time`."""
    i = bisect_right(intervals, (time, float("inf")))
    return i > 0 and time <= intervals[i - 1][1]


def length(intervals: Intervals) -> float:
    """Their time together."""
    return sum(end - start for start, end in intervals)
