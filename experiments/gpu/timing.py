"""Times of several variants in one race: a repetition runs each once, so that a slow moment meets them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from common import OUT_OF_TIME, Deadline, Failure, free, synchronise

OK, OUT_OF_MEMORY = "ok", "out of memory"
REPEATS, TOY_REPEATS = 20, 2
LONG_S = 2.0
TIMED_S = 0.01
MOST_STEPS = 20


@dataclass
class Timing:
    """Seconds of a step by repetition, the peak of memory above that before it, and how the variant fared."""

    status: str = OK
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def ms(self) -> float | None:
        """The median over the repetitions."""
        return 1000 * median(self.seconds) if self.seconds else None


def race(
    steps: Mapping[Hashable, Callable[[], object]], device: str, deadline: Deadline
) -> dict[Hashable, Timing]:
    """Time each step as often as the deadline allows; every other repetition goes in reverse order.

    A step is warmed up by two runs, of which the second stands in for repetitions that there is no time for. One
    that takes longer than `LONG_S` seconds is run once. What fails is out of the race, and says why.
    """
    repeats = TOY_REPEATS if device == "cpu" else REPEATS
    timings = {key: Timing() for key in steps}
    warm: dict[Hashable, float] = {}

    def attempt(key: Hashable, work: Callable[[], object]) -> None:
        try:
            work()
        except torch.OutOfMemoryError:
            timings[key].status = OUT_OF_MEMORY
        except Exception as error:  # the others may do
            timings[key].status = Failure(error)
        if timings[key].status != OK:
            free(device)

    def warm_up(key: Hashable) -> None:
        warm[key] = elapsed(steps[key], device)
        if warm[key] < LONG_S:
            timings[key].peak_bytes = peak_bytes(steps[key], device)
            warm[key] = elapsed(steps[key], device)

    def repeat(key: Hashable) -> None:
        times = min(MOST_STEPS, int(TIMED_S / max(warm[key], 1e-6)) + 1)
        timings[key].seconds.append(elapsed(steps[key], device, times))

    for key in steps:
        if deadline.passed:
            timings[key].status = OUT_OF_TIME
        else:
            attempt(key, lambda key=key: warm_up(key))
    for repetition in range(repeats):
        for key in list(steps)[:: (-1) ** repetition]:
            if timings[key].status == OK and warm[key] < LONG_S and not deadline.passed:
                attempt(key, lambda key=key: repeat(key))
    for key, timing in timings.items():
        if timing.status == OK and not timing.seconds:
            timing.seconds.append(warm[key])
    return timings


def elapsed(step: Callable[[], object], device: str, times: int = 1) -> float:
    """Seconds of a step, of some in a row: by CUDA's events on a GPU, by the clock on the CPU."""
    if device == "cpu":
        started = time.perf_counter()
        for _ in range(times):
            step()
        return (time.perf_counter() - started) / times
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / times


def peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """The most memory that a step holds beyond what was held before it; unknown on the CPU."""
    if device == "cpu":
        step()
        return None
    synchronise(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    synchronise(device)
    return torch.cuda.max_memory_allocated() - before


def columns(timing: Timing, static: Timing, own_bytes: int = 0) -> dict[str, object]:
    """Return the columns of a row: time, ratio to the static variant, memory, repetitions and status."""
    known = timing.ms is not None
    return {
        "ms": f"{timing.ms:.4g}" if known else "",
        "to_static": f"{timing.ms / static.ms:.3f}" if known and static.ms else "",
        "peak_mb": "" if timing.peak_bytes is None else round((timing.peak_bytes + own_bytes) / 1e6, 1),
        "repeats": len(timing.seconds),
        "status": timing.status,
    }
