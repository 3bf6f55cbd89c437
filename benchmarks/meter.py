"""Time and peak memory of functions that take turns: a slow moment of the machine hits all of them alike.

A turn is two runs: the first tells the peak memory, the second, when memory and caches are warm, the time. Time is the
wall clock on a CPU, CUDA events after an L2 flush on a GPU. Memory is what the process (VmHWM) or torch's allocator
held at most, minus what it held before; gradients that stay behind count, so callers free them before each run.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]
MIB = 2**20
_REFERENCES, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_HIGH_WATER_MARK = "5"  # proc(5), clear_refs
_FLUSH_BYTES = 256 * MIB


@dataclass(frozen=True)
class Sample:
    """One turn."""

    seconds: float
    peak_bytes: int | None
    """None where the system does not tell (no Linux, or a kernel without clear_refs)."""


@dataclass(frozen=True)
class Measurement:
    """All turns of one function."""

    samples: tuple[Sample, ...]

    @property
    def ms(self) -> float:
        """The median time."""
        return 1e3 * statistics.median(sample.seconds for sample in self.samples)

    @property
    def samples_ms(self) -> tuple[float, ...]:
        return tuple(1e3 * sample.seconds for sample in self.samples)

    def over(self, other: Measurement) -> float:
        """How many times as long as ``other``: the median over rounds, so that a slow minute hits both sides."""
        pairs = zip(self.samples, other.samples, strict=True)
        return statistics.median(mine.seconds / theirs.seconds for mine, theirs in pairs)

    @property
    def peak_mib(self) -> float | None:
        """The median of the peaks."""
        peaks = [sample.peak_bytes for sample in self.samples if sample.peak_bytes is not None]
        return statistics.median(peaks) / MIB if peaks else None


def measure(
    calls: Mapping[str, Call],
    rounds: int,
    device: torch.device,
    before_each: Call,
    left_out: dict[str, str],
    *,
    peaks: bool = True,
) -> dict[str, Measurement]:
    """Every function has ``rounds`` turns; one that runs out of GPU memory goes to ``left_out``.

    Without ``peaks`` a turn is the timed run only: for functions that take long and have run before.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    gc.collect()
    gc.freeze()  # the collection before each run then looks at what the runs left, not at every module
    for _ in range(rounds):
        for name, call in calls.items():
            if name in left_out:
                continue
            try:
                before_each()
                peak = peak_bytes(call, device) if peaks else None
                before_each()
                samples[name].append(Sample(seconds(call, device), peak))
            except torch.OutOfMemoryError:
                left_out[name] = "out of GPU memory"
                before_each()
                torch.cuda.empty_cache()
    gc.unfreeze()
    return {name: Measurement(tuple(found)) for name, found in samples.items() if name not in left_out}


def seconds(call: Call, device: torch.device) -> float:
    """How long ``call`` takes."""
    gc.collect()
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """How much ``call`` holds at most, beyond what was held before; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    tells = _reset_high_water_mark()
    before = _status_bytes("VmRSS") if tells else 0
    call()
    return _status_bytes("VmHWM") - before if tells else None


def _reset_high_water_mark() -> bool:
    """Give freed memory back and set VmHWM to VmRSS; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    try:
        _REFERENCES.write_text(_RESET_HIGH_WATER_MARK)
    except OSError:  # a kernel or sandbox without it
        return False
    return True


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
