"""Peaks of accelerators, and how a machine's own name finds them."""

import pytest

from imitate_ds.devices import DEVICES, device_called, find_device


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA RTX A6000", "a6000"),
    ],
)
def test_the_name_torch_gives_finds_the_device(name: str, short: str) -> None:
    assert find_device(name) is DEVICES[short]


def test_what_is_not_listed_has_no_peak() -> None:
    assert find_device("AMD EPYC 9655") is None
    assert find_device("NVIDIA A100-SXM-64GB") is None  # not an A10


def test_short_names_are_checked() -> None:
    assert device_called("h200").gib == 141
    with pytest.raises(ValueError, match=r"--gpu h300: .* must be one of v100-16, .*h200"):
        device_called("h300")


@pytest.mark.parametrize("short", DEVICES)
def test_half_precision_is_at_least_as_fast(short: str) -> None:
    peaks = DEVICES[short].tflops
    assert peaks["fp16"] >= 2 * peaks["fp32"] * 0.98
    assert peaks.get("bf16", peaks["fp16"]) == peaks["fp16"]
