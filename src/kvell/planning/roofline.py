"""Lower bounds on time, from a device's bandwidth and arithmetic: no step can be faster than the reading of what it
reads, or than its matrix products.

The figures are the vendors' dense peak rates (datasheets: NVIDIA H100, H200, B200, A100, L40S; Ada and Blackwell RTX
whitepapers, fp32 accumulation; AMD MI300X); CPUs: memory channels x transfer rate, cores x base clock x operations
per cycle. No device reaches them: they bound, they do not predict.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

from kvell.errors import InputError
from kvell.planning.flops import Flops
from kvell.planning.formats import StorageFormat


@dataclass(frozen=True)
class Device:
    """Bytes of memory and bytes a second; FLOPs a second in 16 bits and, where it computes in FP8, in 8. `type` is
    torch's name for its kind, which decides what loading leaves on disk."""

    name: str
    memory_bytes: int
    bytes_per_second: float
    flops_per_second: float
    fp8_flops_per_second: float | None = None
    type: str = "cuda"


GB, TB, TERA = 10**9, 1e12, 1e12
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("h100", 80 * GB, 3.35 * TB, 989 * TERA, 1979 * TERA),
        Device("h200", 141 * GB, 4.8 * TB, 989 * TERA, 1979 * TERA),
        Device("b200", 180 * GB, 8 * TB, 2250 * TERA, 4500 * TERA),
        Device("a100-80gb", 80 * GB, 2.039 * TB, 312 * TERA),
        Device("l40s", 48 * GB, 0.864 * TB, 362 * TERA, 733 * TERA),
        Device("mi300x", 192 * GB, 5.3 * TB, 1307 * TERA, 2615 * TERA),
        Device("rtx-4090", 24 * GB, 1.008 * TB, 165 * TERA, 330 * TERA),
        Device("rtx-5090", 32 * GB, 1.792 * TB, 209 * TERA, 419 * TERA),
        Device("xeon-8480+", 512 * GB, 0.307 * TB, 229 * TERA, type="cpu"),
        Device("desktop-ddr5", 64 * GB, 0.0896 * TB, 1.2 * TERA, type="cpu"),
    )
}


def known_device(name: str) -> Device:
    """A device of the table. InputError, with the known ones, for another."""
    if name not in DEVICES:
        raise InputError(f"device {name} is unknown: use one of {', '.join(DEVICES)}, or measure this one")
    return DEVICES[name]


def seconds(flops: Flops, read_bytes: float, device: Device, form: StorageFormat) -> float:
    """The longer of reading and computing; in FP8 where the weights are stored so and the device can."""
    if form.narrow != "none" and device.fp8_flops_per_second is not None:
        computing = flops.equivalent_fp8 / device.fp8_flops_per_second
    else:
        computing = flops.total / device.flops_per_second
    return max(computing, read_bytes / device.bytes_per_second)


def measured_device(dtype: torch.dtype = torch.bfloat16) -> Device:
    """This machine: the best of a few readings of a large tensor, and of a few products of large matrices."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    place = accelerator or torch.device("cpu")
    large = torch.ones(1 << 26, device=place)
    matrix = torch.ones(2048, 2048, dtype=dtype, device=place)
    reading = _best(large.sum, place)
    products = [_best(partial(torch.matmul, one, one), place) for one in (matrix, matrix.float())]
    rate = 2 * 2048**3 / min(products)
    memory = _memory(place)
    return Device(f"this {place.type}", memory, large.nbytes / reading, rate, type=place.type)


def _best(work: Callable[[], object], place: torch.device) -> float:
    times = []
    for _ in range(5):
        started = perf_counter()
        work()
        if place.type != "cpu":
            torch.accelerator.synchronize()
        times.append(perf_counter() - started)
    return min(times)


def _memory(place: torch.device) -> int:
    if place.type == "cuda":
        return int(torch.cuda.get_device_properties(place).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
