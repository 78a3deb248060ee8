"""The machine: its parts, peak memory, energy, and the peak rate of its matrix products."""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..fileio import GIB

POWERCAP = Path("/sys/class/powercap")


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, and CUDA devices, for a run's config."""
    import psutil
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1), "system": platform.platform(),
        "python": platform.python_version(),
    }  # fmt: skip
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["gpus"] = [
            {"name": p.name, "memory_gib": round(p.total_memory / GIB, 1)}
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


# Memory


def memory_now(device: Any = None) -> dict[str, float]:
    """GiB by kind: resident memory of this process and its peak; on CUDA, peak allocated and reserved memory."""
    import psutil

    resident = psutil.Process().memory_info().rss
    peak = max(
        resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )  # the kernel updates the peak in batches
    found = {"memory/rss_gib": resident / GIB, "memory/peak_rss_gib": peak / GIB}
    if device is not None and device.type == "cuda":
        import torch

        found["memory/peak_cuda_allocated_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        found["memory/peak_cuda_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    return found


# Energy


class EnergyMeter:
    """Counts joules since it was created, if the device measures them; otherwise `source` is empty.

    On a GPU it reads NVML's counter of the device (Volta and later). On a CPU it reads RAPL's counters of its packages,
    which include everything that runs on the machine, and which most systems show to root only.
    """

    def __init__(self, device: Any = None, powercap: Path = POWERCAP) -> None:
        counters, self.source = _nvml(device) if device is not None and device.type == "cuda" else _rapl(powercap)
        self._counters = [_Counter(*c) for c in counters]

    def joules(self) -> float | None:
        """Joules since creation; None if nothing is measured."""
        return sum(c.joules() for c in self._counters) if self._counters else None


class _Counter:
    """A counter of microjoules that wraps around at `wrap`."""

    def __init__(self, read: Callable[[], float], wrap: float) -> None:
        self.read, self.wrap = read, wrap
        self.last, self.total = read(), 0.0

    def joules(self) -> float:
        now = self.read()
        self.total += now - self.last if now >= self.last else now - self.last + self.wrap
        self.last = now
        return self.total / 1e6


def _nvml(device: Any) -> tuple[Sequence[tuple[Callable[[], float], float]], str]:
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        return [], ""
    except pynvml.NVMLError:
        return [], ""
    return [(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1e3, 0.0)], "NVML, this GPU"


def _rapl(powercap: Path) -> tuple[Sequence[tuple[Callable[[], float], float]], str]:
    counters = []
    for package in sorted(powercap.glob("intel-rapl:*")):
        if package.name.count(":") != 1:  # a part of a package
            continue
        try:
            wrap = float((package / "max_energy_range_uj").read_text())
            float((package / "energy_uj").read_text())
        except (OSError, ValueError):  # not readable for this user
            return [], ""
        counters.append((lambda file=package / "energy_uj": float(file.read_text()), wrap))
    return counters, f"RAPL, {len(counters)} packages, whole machine" if counters else ""


# Peak


def peak_flops(device: Any, dtype: str) -> tuple[float, str]:
    """Peak FLOP/s of a device in matrix products, and the source of the number.

    For a known accelerator it is the maker's, as listed by TRL; otherwise the median of large products, measured here.
    """
    import torch

    from ..upstream.trl import get_peak_flops

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = get_peak_flops(name, dtype)
        if known is not None:
            return known, f"{name}, {dtype}, by its maker"
    return measure_peak(device, dtype), f"measured {dtype} products on {device.type}"


def measure_peak(device: Any, dtype: str) -> float:
    """FLOP/s of square matrix products, the median of five. Takes a fraction of a second."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, dtype=getattr(torch, dtype), device=device)
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / statistics.median(seconds[1:])
