"""The ceilings of a device (FLOP/s and bytes/s): from its data sheet, or measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch.utils.benchmark import Timer

from adaskip.common.configs import load_yaml

MEASURE_SECONDS = 1.0
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
"""Much larger than the last-level cache."""
MATMUL_SIZES = {"cuda": (4096, 8192), "cpu": (512, 1024)}
"""Sizes of square matrices; the fastest one is used."""


@dataclass(frozen=True)
class Ceilings:
    """The two limits of a device: matrix-multiplication FLOP/s in the dtype used, and memory bytes/s."""

    name: str
    matmul_flops: float
    bandwidth: float
    source: str = ""

    def __post_init__(self) -> None:
        if not (self.matmul_flops > 0 and self.bandwidth > 0):
            raise ValueError(
                f"ceilings of {self.name} must be positive; got {self.matmul_flops} FLOP/s, {self.bandwidth} bytes/s"
            )


def known_devices() -> tuple[str, ...]:
    """The names in `configs/devices.yaml`."""
    return tuple(load_yaml("devices"))


def known_ceilings(name: str) -> Ceilings:
    """The data-sheet ceilings of a GPU in bfloat16; ValueError that lists all names if it is not in
    `configs/devices.yaml`."""
    devices = load_yaml("devices")
    if name not in devices:
        near = get_close_matches(name.upper(), devices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown device {name!r}.{hint} Available: {', '.join(devices)}")
    entry = devices[name]
    return Ceilings(name, entry["tflops"] * 1e12, entry["gb_s"] * 1e9, entry["source"])


def measure_ceilings(device: str | torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure copy bandwidth and large-matmul rate of a CUDA or CPU device, each as a median over about a second.

    A copy counts both the bytes it reads and those it writes.
    """
    present = [kind for kind in COPY_BYTES if kind == "cpu" or torch.cuda.is_available()]
    if str(device).split(":")[0] not in present:
        raise ValueError(f"cannot measure device {str(device)!r}; present here: {', '.join(present)}")
    device = torch.device(device)
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    copy_s = _median_s("target.copy_(source)", source=source, target=torch.empty_like(source))
    bandwidth = 2 * source.nbytes / copy_s
    del source
    rate = max(_matmul_flops(size, device, dtype) for size in MATMUL_SIZES[device.type])
    source = f"measured, {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda":
        return Ceilings(torch.cuda.get_device_name(device), rate, bandwidth, source)
    return Ceilings("CPU", rate, bandwidth, f"{source}, threads: {torch.get_num_threads()}")


def _matmul_flops(size: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _median_s("torch.mm(a, b, out=out)", a=a, b=b, out=torch.empty_like(a))


def _median_s(statement: str, **values: torch.Tensor) -> float:
    timer = Timer(statement, globals={**values, "torch": torch}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=MEASURE_SECONDS).median
