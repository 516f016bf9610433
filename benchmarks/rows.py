"""A measurement as a row: one JSON line, with everything that follows from the times and the losses."""

import statistics

from benchmarks.race import outcome
from benchmarks.sizes import Size

PEAK_FLOPS = {"H200": 989e12, "H100 80GB HBM3": 989e12}  # dense bf16, NVIDIA's data sheets
LOSS_TOLERANCE = (
    0.7  # nats: how far a first loss may be from ln(vocabulary); Llama's initial weights give 0.5 more
)


def complete(
    measured: dict, size: Size, vocabulary: int, device_name: str, device_memory_gib: float | None = None
) -> dict:
    """What a peer measured, with tokens a second, MFU and the checks; a row that fails one has status `invalid`.

    A peer that did not run is returned as it is.
    """
    if measured["status"] != "ok":
        return measured
    seconds = measured.pop("step_seconds")
    step_tokens = measured.get("step_tokens", size.step_tokens)  # in a race each has its own
    tokens_per_second = step_tokens / statistics.median(seconds)
    peak = peak_flops(device_name) if size.device == "cuda" else None
    of_rows = bool(size.classes or size.choices)
    problems = [*measured.pop("problems", []), *loss_problems(measured, size.chance(vocabulary))]
    problems += paging_problems(measured, device_memory_gib)
    return {
        **measured,
        "status": "invalid" if problems else "ok",
        "problems": problems,
        "tokens_per_second": tokens_per_second,
        **({"samples_per_second": tokens_per_second / size.sample_tokens} if of_rows else {}),
        **(outcome(measured["evals"], size.target_loss) if size.target_loss else {}),
        "tokens_per_second_mean": step_tokens / statistics.mean(seconds),
        "mfu": tokens_per_second * size.flops_per_token(vocabulary) / peak
        if peak and not size.choices
        else None,
        "step_ms": 1000 * statistics.median(seconds),
        "step_ms_fastest": 1000 * min(seconds),
        "step_ms_slowest": 1000 * max(seconds),
        "step_seconds": [round(s, 6) for s in seconds],
    }


def paging_problems(measured: dict, device_memory_gib: float | None) -> list[str]:
    """Whether more memory was held than the device has: then its driver paged to the host, and times mean nothing.

    Known by what torch's allocator held at its most. Where CUDA does not page, it raises, and the row says so.
    """
    held = measured.get("peak_reserved_gib")
    if held is None or device_memory_gib is None or held <= device_memory_gib:
        return []
    return [
        f"{held:.4g} GiB were held at most, and the device has {device_memory_gib:.4g}: memory was paged to the "
        "host, so neither this row nor a ratio to it means anything"
    ]


def loss_problems(measured: dict, chance: float) -> list[str]:
    """What is wrong with the losses of a model that should begin at chance and learn."""
    first, last = measured["loss_first"], measured["loss_last"]
    if not abs(first - chance) <= LOSS_TOLERANCE:  # NaN too
        return [f"first loss {first:.3f}, where chance is {chance:.3f}"]
    return [] if last < first else [f"loss did not fall: {first:.3f} → {last:.3f}"]


def peak_flops(device_name: str) -> float | None:
    """The nominal peak of the device, or None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
