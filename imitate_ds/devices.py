"""What accelerators can do, by their makers' data sheets: the peaks that a measurement is compared with.

Peaks are dense (no structured sparsity) at boost clock, with sums in float32. A machine that is not listed, a CPU for one, has
no peak here: shares of it are not reported then.
"""

import re
from typing import Literal, NamedTuple

Precision = Literal["fp32", "bf16", "fp16"]


class Device(NamedTuple):
    """One accelerator as it is sold."""

    gib: int  # memory, as in its name
    tflops: dict[
        Precision, float
    ]  # of matrix products; fp32 is that of TF32 where the device has it, as torch may use it
    bandwidth: int  # of its memory, GB/s
    link: int  # to the others of its node, GB/s in each direction: NVLink, or PCIe where there is none
    watts: int  # thermal design power
    names: tuple[str, ...]  # one of them is a part of torch.cuda.get_device_name()


def _tensor_cores(dense16: float, fp32: float, *, has_bf16: bool = True) -> dict[Precision, float]:
    peaks: dict[Precision, float] = {"fp32": fp32, "fp16": dense16}
    if has_bf16:
        peaks["bf16"] = dense16
    return peaks


DEVICES: dict[str, Device] = {
    "v100-16": Device(16, _tensor_cores(125, 15.7, has_bf16=False), 900, 150, 300, ("V100-SXM2-16GB",)),
    "v100-32": Device(
        32, _tensor_cores(125, 15.7, has_bf16=False), 900, 150, 300, ("V100-SXM2-32GB", "V100-SXM3-32GB")
    ),
    "a10": Device(24, _tensor_cores(125, 62.5), 600, 32, 150, ("NVIDIA A10",)),
    "a100-40": Device(40, _tensor_cores(312, 156), 1555, 300, 400, ("A100-SXM4-40GB", "A100-PCIE-40GB")),
    "a100-80": Device(80, _tensor_cores(312, 156), 2039, 300, 400, ("A100-SXM4-80GB", "A100 80GB PCIe")),
    "a6000": Device(48, _tensor_cores(154.8, 77.4), 768, 32, 300, ("RTX A6000",)),
    "l40s": Device(48, _tensor_cores(362, 183), 864, 32, 350, ("L40S",)),
    "rtx4090": Device(24, _tensor_cores(165.2, 82.6), 1008, 32, 450, ("RTX 4090",)),
    "h100-80": Device(80, _tensor_cores(989.4, 494.7), 3350, 450, 700, ("H100 80GB HBM3",)),
    "h100-pcie": Device(80, _tensor_cores(756, 378), 2000, 64, 350, ("H100 PCIe",)),
    "h200": Device(141, _tensor_cores(989.4, 494.7), 4800, 450, 700, ("H200",)),
    "b200": Device(180, _tensor_cores(2250, 1125), 8000, 900, 1000, ("B200",)),
}


def find_device(name: str) -> Device | None:
    """The device that torch.cuda.get_device_name() calls so; None where it is not listed."""
    for device in DEVICES.values():
        if any(re.search(rf"{re.escape(part)}(?!\w)", name) for part in device.names):  # A10 is not A100
            return device
    return None


def device_called(name: str) -> Device:
    """By its short name, as `imitate-ds plan --gpu` has it. Raises ValueError."""
    if name not in DEVICES:
        raise ValueError(f"--gpu {name}: not a device that is known; must be one of {', '.join(DEVICES)}")
    return DEVICES[name]
