from __future__ import annotations

import math
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from arft_fast.observe.gpu import GpuMeter


class _NvmlError(Exception):
    pass


class _FakeNvml:
    """One card that works harder with every look at it."""

    NVMLError = _NvmlError

    def __init__(self, uuid: str = "GPU-1234", lacks: tuple[str, ...] = (), driver: bool = True) -> None:
        self.uuid, self.lacks, self.driver = uuid, lacks, driver
        self.looks = 0
        self.energy_mj = 5_000_000

    def nvmlInit(self) -> None:
        if not self.driver:
            raise _NvmlError("no driver")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.uuid:
            raise _NvmlError("not found")
        return "card"

    def _ask(self, what: str, card: str) -> None:
        assert card == "card"
        if what in self.lacks:
            raise _NvmlError("not supported")

    def nvmlDeviceGetUtilizationRates(self, card: str) -> SimpleNamespace:
        self._ask("utilisation", card)
        self.looks += 1
        return SimpleNamespace(gpu=10 * self.looks)

    def nvmlDeviceGetMemoryInfo(self, card: str) -> SimpleNamespace:
        self._ask("memory", card)
        return SimpleNamespace(used=(100 - self.looks) * 2**20)

    def nvmlDeviceGetPowerUsage(self, card: str) -> int:
        self._ask("power", card)
        return 300_000

    def nvmlDeviceGetTotalEnergyConsumption(self, card: str) -> int:
        self._ask("energy", card)
        return self.energy_mj


def _open(nvml: _FakeNvml, uuid: str = "1234") -> GpuMeter:
    meter = GpuMeter.open(0, nvml=nvml, uuid=uuid)
    assert meter is not None
    return meter


def _wait_for(nvml: _FakeNvml, looks: int) -> None:
    deadline = time.monotonic() + 10
    while nvml.looks < looks:
        assert time.monotonic() < deadline, "the meter does not look"
        time.sleep(0.005)


def test_figures_are_mean_share_most_memory_mean_power_and_the_counter_s_difference() -> None:
    nvml = _FakeNvml()
    meter = GpuMeter(nvml, "card", period_s=0.001)
    meter.start()
    _wait_for(nvml, 3)
    meter.stop()
    looked = nvml.looks
    nvml.energy_mj += 7_500
    figures = meter.take()
    assert nvml.looks == looked + 1
    assert figures["gpu/utilisation"] == pytest.approx(sum(range(1, looked + 2)) / (looked + 1) / 10)
    assert figures["gpu/memory_mib"] == 99.0
    assert (figures["gpu/power_w"], figures["gpu/energy_j"]) == (300.0, 7.5)


def test_a_figure_covers_the_time_since_the_last_one() -> None:
    nvml = _FakeNvml()
    meter = _open(nvml)
    nvml.energy_mj += 1000
    assert (meter.take()["gpu/utilisation"], nvml.looks) == (0.1, 1)
    nvml.energy_mj += 2000
    second = meter.take()
    assert (second["gpu/utilisation"], second["gpu/energy_j"]) == (0.2, 2.0)


@pytest.mark.parametrize(
    ("lacks", "name"),
    [("utilisation", "gpu/utilisation"), ("memory", "gpu/memory_mib"), ("power", "gpu/power_w"),
     ("energy", "gpu/energy_j")],
)  # fmt: skip
def test_what_a_card_does_not_tell_is_nan_and_the_rest_is_there(lacks: str, name: str) -> None:
    figures = _open(_FakeNvml(lacks=(lacks,))).take()
    assert math.isnan(figures.pop(name))
    assert len(figures) == 3 and not any(math.isnan(value) for value in figures.values())


def test_the_thread_ends_with_stop() -> None:
    before = threading.active_count()
    meter = _open(_FakeNvml())
    meter.start()
    meter.start()
    assert threading.active_count() == before + 1
    meter.stop()
    meter.stop()
    assert threading.active_count() == before


def test_a_slice_of_a_card_is_found_too() -> None:
    assert GpuMeter.open(0, nvml=_FakeNvml(uuid="MIG-1234"), uuid="1234") is not None


@pytest.mark.parametrize("nvml", [_FakeNvml(driver=False), _FakeNvml(uuid="GPU-another")], ids=["driver", "card"])
def test_there_is_no_meter_without_a_driver_or_for_an_unknown_card(nvml: _FakeNvml) -> None:
    assert GpuMeter.open(0, nvml=nvml, uuid="1234") is None


def test_there_is_no_meter_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuMeter.open(0, uuid="1234") is None


def test_torch_names_the_card_so_that_visible_devices_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=["55", "1234"][index]))
    nvml = _FakeNvml()
    assert GpuMeter.open(1, nvml=nvml) is not None
    assert GpuMeter.open(0, nvml=nvml) is None
    assert GpuMeter.open(2, nvml=nvml) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_has_no_meter() -> None:
    assert GpuMeter.open(0) is None


@pytest.mark.gpu
def test_a_real_card_shows_its_work() -> None:
    meter = GpuMeter.open(0)
    assert meter is not None, "torch finds a GPU that NVML does not"
    meter.start()
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        a = (a @ a).clamp(-1, 1)
        torch.cuda.synchronize()
    meter.stop()
    figures = meter.take()
    assert figures["gpu/utilisation"] > 0.3 and figures["gpu/memory_mib"] > 100
    assert figures["gpu/energy_j"] > 0 or math.isnan(figures["gpu/energy_j"])
