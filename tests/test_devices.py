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
    assert device_called("h200").tflops["bf16"] == 989.4
    with pytest.raises(ValueError, match=r"--gpu h300: .* must be one of v100-16, .*h200"):
        device_called("h300")


@pytest.mark.parametrize("short", DEVICES)
def test_half_precision_is_at_least_as_fast(short: str) -> None:
    peaks = DEVICES[short].tflops
    assert peaks["fp16"] >= 2 * DEVICES[short].tf32 * 0.98
    assert DEVICES[short].tf32 >= peaks["fp32"]
    assert peaks.get("bf16", peaks["fp16"]) == peaks["fp16"]


def test_float32_convolves_in_tf32_and_multiplies_without() -> None:
    h100, v100 = DEVICES["h100-80"], DEVICES["v100-16"]
    assert h100.peak("fp32") == pytest.approx(66.9e12)
    assert h100.peak("fp32", convolved=1.0) == pytest.approx(494.7e12)
    assert h100.peak("fp32", convolved=0.5) == pytest.approx(2e12 / (1 / 66.9 + 1 / 494.7))
    assert h100.peak("bf16", convolved=0.5) == pytest.approx(989.4e12)
    assert v100.peak("bf16") is None
