"""Kinds as JAX names them find their chip; figures are of the size they claim; a CPU's peak is its own."""

import math

import jax
import pytest

from bigflax.chips import CHIPS, chip, measured_peak_flops, peak_flops

KINDS = {  # device.device_kind -> chip
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "Tesla T4": "t4",
    "NVIDIA L4": "l4",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "TPU v4 lite": None,
    "NVIDIA L40S": None,
    "NVIDIA GH200 480GB": None,
    "NVIDIA GB200": None,
    "cpu": None,
}


class Device:
    platform, process_index = "tpu", 0

    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind):
    found = chip(Device(kind))
    assert (found.name if found else None) == KINDS[kind]
    assert found == chip(KINDS[kind] or kind)


@pytest.mark.parametrize("name", CHIPS)
def test_every_chip_is_found_by_a_kind_and_is_plausible(name):
    c = CHIPS[name]
    assert name in KINDS.values()
    assert 5e13 < c.bf16 < 1e16
    assert all(peak is None or c.bf16 <= peak <= 2 * c.bf16 + 1e12 for peak in (c.int8, c.fp8))
    assert 15 * 2**30 < c.hbm < 300 * 2**30
    assert 50 < c.bf16 / c.hbm_bandwidth < 1000  # FLOPs a byte at which compute and memory balance
    assert c.links * c.link_bandwidth < c.hbm_bandwidth


def test_peak_adds_devices_and_knows_cores_from_chips():
    assert peak_flops([Device("TPU v5 lite")] * 4) == 4 * 197e12
    assert peak_flops([Device("TPU7x")] * 4) == 2 * 2307e12
    assert peak_flops([Device("TPU v5p")], dtype="int8") == 918e12


def test_peak_of_the_unknown_is_unknown():
    assert peak_flops([Device("TPU v5p"), Device("NVIDIA L40S")]) is None
    assert peak_flops([Device("TPU v4")], dtype="fp8") is None


def test_the_cpu_is_measured_once_and_not_eight_times():
    measured = measured_peak_flops()
    assert math.isfinite(measured)
    assert 1e8 < measured < 1e14
    assert peak_flops(jax.devices()) == measured == measured_peak_flops()
