"""Accelerators: what one chip can do at most, so that a rate can be told as a share of it.

Figures are per chip, dense (without 2:4 sparsity), as their vendors print them. Sources: Google Cloud's pages "TPU v4", "v5e", "v5p",
"v6e", "TPU7x", and the scaling book (jax-ml.github.io/scaling-book); NVIDIA's data sheets for T4, L4, A100, H100, H200 and B200.
What runs reach at best is less: 798 TFLOP/s and 3.0 TB/s were seen on an H100, 4.3 TB/s on an H200. Between slices each chip has its share
of its host's network (scaling book, "TPU networking"; tpu7x: its product page). Prices are Google Cloud's list prices in the United States in
2025, on demand, dollars a chip and hour: they change by region and month, so that whoever asks may say another.
Left out on purpose: sparse peaks, and prices of what is sold by many at many prices (GPUs) or on request (TPU7x).
"""

import dataclasses
import functools
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Device = Any  # a jax.Device, which is a variable to type checkers
TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip: FLOP/s, bytes and bytes/s. A peak is None where the chip has no such units; int8 counts operations as FLOPs.

    `links` links to other chips, of `link_bandwidth` bytes/s each way; `dcn` bytes/s to chips of other slices; `price` dollars an hour;
    `devices` is how many JAX devices one chip shows itself as.
    """

    name: str
    kinds: str  # regex over `device.device_kind`
    bf16: float
    int8: float | None
    fp8: float | None
    hbm: float
    hbm_bandwidth: float
    links: int
    link_bandwidth: float
    dcn: float = 0.0
    price: float | None = None
    devices: int = 1


def _chip(name, kinds, bf16, int8, fp8, hbm, bandwidth, links, each, dcn=0.0, price=None, devices=1) -> Chip:
    peaks = [None if peak is None else peak * TERA for peak in (int8, fp8)]
    return Chip(name=name, kinds=kinds, bf16=bf16 * TERA, int8=peaks[0], fp8=peaks[1], hbm=hbm * GIB, hbm_bandwidth=bandwidth * TERA,
                links=links, link_bandwidth=each * GIGA, dcn=dcn * GIGA, price=price, devices=devices)  # fmt: skip


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in [
        #      name      device_kind                     bf16  int8   fp8  GiB  TB/s  links  GB/s each way  dcn GB/s  $/h
        _chip("v4", r"TPU v4", 275, 275, None, 32, 1.2, 6, 45, 6.25, 3.22),
        _chip("v5e", r"TPU v5 ?(lite|e)", 197, 394, None, 16, 0.82, 4, 45, 3.125, 1.20),
        _chip("v5p", r"TPU v5p?", 459, 918, 459, 95, 2.77, 6, 90, 6.25, 4.20),
        _chip("v6e", r"TPU v6 ?(lite|e)", 918, 1836, 918, 32, 1.64, 4, 90, 12.5, 2.70),
        _chip("tpu7x", r"TPU ?v?7x?", 2307, None, 4614, 192, 7.4, 6, 100, 12.5, None, 2),  # two cores, each a device of its own
        _chip("t4", r".*\bT4", 65, 130, None, 16, 0.32, 0, 0),  # the 65 are float16: it has no bfloat16 units
        _chip("l4", r".*\bL4", 121, 242, 242, 24, 0.30, 0, 0),
        _chip("a100", r".*\bA100.*80GB.*", 312, 624, None, 80, 2.04, 12, 25),
        _chip("a100-40", r".*\bA100.*", 312, 624, None, 40, 1.56, 12, 25),
        _chip("h100", r".*\bH100.*HBM3", 989, 1979, 1979, 80, 3.35, 18, 25),
        _chip("h100-pcie", r".*\bH100 PCIe", 756, 1513, 1513, 80, 2.0, 0, 0),
        _chip("h200", r".*\bH200.*", 989, 1979, 1979, 141, 4.8, 18, 25),
        _chip("b200", r".*\bB200.*", 2250, 4500, 4500, 180, 8.0, 18, 50),
    ]
}


def chip(device: Device | str) -> Chip | None:
    """The chip of a device, of a `device_kind`, or of a name in CHIPS; None for a CPU or a kind that the table lacks."""
    kind = device if isinstance(device, str) else device.device_kind
    return CHIPS.get(kind) or next((c for c in CHIPS.values() if re.fullmatch(c.kinds, kind)), None)


def peak_flops(devices: Sequence[Device] | None = None, dtype: str = "bf16") -> float | None:
    """Peak FLOP/s of these devices together (default: all of the run's); None where one of them is not in the table or lacks `dtype`.

    The CPU devices of a process share one machine, however many they are called: each process counts once, with a measured peak.
    """
    devices = jax.devices() if devices is None else devices
    if all(device.platform == "cpu" for device in devices):
        return measured_peak_flops() * len({device.process_index for device in devices})
    chips = [chip(device) for device in devices]
    peaks = [getattr(c, dtype) / c.devices if c is not None and getattr(c, dtype) else None for c in chips]
    return None if None in peaks else sum(p for p in peaks if p is not None)


@functools.cache
def measured_peak_flops(size: int = 1024, seconds: float = 0.1) -> float:
    """FLOP/s of one float32 matrix product, the best of what fits in `seconds`: "peak" on a CPU means this machine's own.

    Measured once a process. On a machine that is busy just then it comes out low, and a share of it high.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x = jnp.ones((size, size), jnp.float32)
        product = jax.jit(jnp.matmul)
        product(x, x).block_until_ready()
        best, end = float("inf"), time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            product(x, x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
