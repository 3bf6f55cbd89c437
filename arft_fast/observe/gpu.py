"""What the GPU did, by NVML's word: share of time at work, memory, energy, power."""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """One look at the card; nan for what it cannot tell."""

    busy: float
    memory_mib: float
    power_w: float


class GpuMeter:
    """Reads one card a few times a second from a thread of its own; NVML answers without touching CUDA's streams.

    The figures are the card's: other processes on it are part of them.
    """

    def __init__(self, nvml: Any, card: Any, *, period_s: float = 0.2) -> None:
        """Args:
        nvml: the module ``pynvml``, initialised.
        card: NVML's handle of the card.
        """
        self._nvml, self._card, self._period_s = nvml, card, period_s
        self._readings: list[_Reading] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._energy_j = self._energy()

    @classmethod
    def open(cls, index: int, *, nvml: Any = None, uuid: str | None = None) -> GpuMeter | None:
        """The meter of torch's GPU ``index``; None where there is no such GPU or no NVML for it.

        NVML numbers all cards of a machine, torch those that ``CUDA_VISIBLE_DEVICES`` leaves in its order: the card is
        found by its UUID.

        Args:
            nvml: None imports ``pynvml``.
            uuid: None asks torch.
        """
        if uuid is None:
            if not (torch.cuda.is_available() and 0 <= index < torch.cuda.device_count()):
                return None
            uuid = str(torch.cuda.get_device_properties(index).uuid)
        if nvml is None:
            try:
                nvml = importlib.import_module("pynvml")
            except ImportError:
                return None
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:
            return None
        for prefix in ("GPU-", "MIG-"):  # torch leaves out whether it is a card or a slice of one
            try:
                return cls(nvml, nvml.nvmlDeviceGetHandleByUUID(f"{prefix}{uuid}"))
            except nvml.NVMLError:
                continue
        return None

    def start(self) -> None:
        """Read in the background from now on."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._watch, name="gpu meter", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop reading in the background. ``take`` still works."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def take(self) -> dict[str, float]:
        """Figures since the last call, or since the meter was made; nan for what the card does not tell.

        Returns:
            ``gpu/utilisation``: mean share of time in which a kernel ran, 0 to 1. ``gpu/memory_mib``: the most memory
            that was in use. ``gpu/power_w``: mean draw. ``gpu/energy_j``: difference of the card's own counter, which
            misses nothing between two readings.
        """
        self._read()
        with self._lock:
            readings, self._readings = self._readings, []
        before, self._energy_j = self._energy_j, self._energy()
        return {
            "gpu/utilisation": _mean([reading.busy for reading in readings]),
            "gpu/memory_mib": max(_known([reading.memory_mib for reading in readings]), default=math.nan),
            "gpu/power_w": _mean([reading.power_w for reading in readings]),
            "gpu/energy_j": self._energy_j - before,
        }

    def _watch(self) -> None:
        while not self._stop.wait(self._period_s):
            self._read()

    def _read(self) -> None:
        nvml, card = self._nvml, self._card
        reading = _Reading(
            busy=self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(card).gpu / 100),
            memory_mib=self._ask(lambda: nvml.nvmlDeviceGetMemoryInfo(card).used / _MIB),
            power_w=self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(card) / 1000),
        )
        with self._lock:
            self._readings.append(reading)

    def _energy(self) -> float:
        """Joules since the driver was loaded."""
        return self._ask(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card) / 1000)

    def _ask(self, question: Callable[[], float]) -> float:
        try:
            return question()
        except self._nvml.NVMLError:  # not supported by this card, or the card is lost: unknown either way
            return math.nan


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _mean(values: Sequence[float]) -> float:
    known = _known(values)
    return sum(known) / len(known) if known else math.nan
