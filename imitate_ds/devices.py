"""What accelerators can do, by their makers' data sheets: the peaks that a measurement is compared with.

Peaks are dense (no structured sparsity) at boost clock, with sums in float32. A machine that is not listed, a CPU for one, has
no peak here: shares of it are not reported then.
"""

import re
from typing import Literal, NamedTuple

Precision = Literal["fp32", "bf16", "fp16"]


class Device(NamedTuple):
    """One accelerator as it is sold, but for its memory."""

    gib: float  # of memory that a program can have: less than in its name, and the least that torch has reported
    tflops: dict[
        Precision, float
    ]  # of matrix products: fp32 is plain float32, as torch multiplies unless it is told otherwise
    tf32: (
        float  # TFLOP/s of float32 convolutions, for which cuDNN takes TF32 unasked; plain float32 where there is none
    )
    bandwidth: int  # of its memory, GB/s
    link: int  # to the others of its node, GB/s in each direction: NVLink, or PCIe where there is none
    watts: int  # thermal design power
    names: tuple[str, ...]  # one of them is a part of torch.cuda.get_device_name()

    def peak(self, precision: Precision, convolved: float = 0.0) -> float | None:
        """FLOP/s where `convolved` is the share of convolutions in all FLOPs; None for a precision that it has not."""
        if precision not in self.tflops:
            return None
        products = self.tflops[precision]
        convolutions = self.tf32 if precision == "fp32" else products
        return 1e12 / ((1 - convolved) / products + convolved / convolutions)


def _peaks(dense16: float, fp32: float, *, has_bf16: bool = True) -> dict[Precision, float]:
    peaks: dict[Precision, float] = {"fp32": fp32, "fp16": dense16}
    if has_bf16:
        peaks["bf16"] = dense16
    return peaks


_V100 = _peaks(125, 15.7, has_bf16=False)
DEVICES: dict[str, Device] = {
    "v100-16": Device(15.7, _V100, 15.7, 900, 150, 300, ("V100-SXM2-16GB",)),
    "v100-32": Device(31.7, _V100, 15.7, 900, 150, 300, ("V100-SXM2-32GB", "V100-SXM3-32GB")),
    "a10": Device(22.0, _peaks(125, 31.2), 62.5, 600, 32, 150, ("NVIDIA A10",)),
    "a100-40": Device(39.4, _peaks(312, 19.5), 156, 1555, 300, 400, ("A100-SXM4-40GB", "A100-PCIE-40GB")),
    "a100-80": Device(79.1, _peaks(312, 19.5), 156, 2039, 300, 400, ("A100-SXM4-80GB", "A100 80GB PCIe")),
    "a6000": Device(47.4, _peaks(154.8, 38.7), 77.4, 768, 32, 300, ("RTX A6000",)),
    "l40s": Device(44.3, _peaks(362, 91.6), 183, 864, 32, 350, ("L40S",)),
    "rtx4090": Device(23.5, _peaks(165.2, 82.6), 82.6, 1008, 32, 450, ("RTX 4090",)),
    "h100-80": Device(79.1, _peaks(989.4, 66.9), 494.7, 3350, 450, 700, ("H100 80GB HBM3",)),
    "h100-pcie": Device(79.1, _peaks(756, 51.2), 378, 2000, 64, 350, ("H100 PCIe",)),
    "h200": Device(139.7, _peaks(989.4, 66.9), 494.7, 4800, 450, 700, ("H200",)),
    "b200": Device(178.3, _peaks(2250, 75), 1125, 8000, 900, 1000, ("B200",)),
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
