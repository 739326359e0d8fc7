"""Every number that a plan rests on and that is not worked out, in one place, each with where it comes from.

No GPU figure of this program exists yet: on GPUs what is here is assumed, from published figures, with a range. The ResNet-50
of NVIDIA's DeepLearningExamples (PyTorch, 224 px, mixed precision, training images a second of one device: A100 80 GB 2470, V100
16 GB 1200) is what the shares of the peaks were set by; tests/planning holds the plan to both.
"""

from typing import NamedTuple

from imitate_ds.config import TrainConfig
from imitate_ds.devices import Device, Precision

GIB = 2**30


class Span(NamedTuple):
    """A number, and how far it may be off. `low` is the cautious end: slower, larger, dearer."""

    low: float
    likely: float
    high: float
    source: str


ASSUMED = {
    "share of peak, matrix products": Span(0.40, 0.55, 0.70, "assumed: large products; whole ViT steps reach .35 to .55"),
    "share of peak, convolutions": Span(0.25, 0.40, 0.55, "assumed: set by ResNet-50 in NVIDIA's DeepLearningExamples"),
    "share of peak, depthwise convolutions": Span(0.01, 0.02, 0.04, "assumed: cuDNN has no tensor cores for them"),
    "share of memory bandwidth": Span(0.60, 0.75, 0.90, "assumed: what STREAM-like kernels reach on A100 and H100"),
    "share of the link in a node": Span(0.55, 0.75, 0.85, "assumed: bus bandwidth of nccl-tests over the data sheet's"),
    "share of the link between nodes": Span(0.60, 0.80, 0.90, "assumed: bus bandwidth of nccl-tests over the line rate"),
    "GB/s of host memory for a rank": Span(8, 20, 40, "assumed: a two-socket host shared by eight devices"),
    "GB/s between host and device": Span(10, 20, 50, "assumed: PCIe 4 and 5, pinned memory"),
    "seconds to launch an operation": Span(12e-6, 7e-6, 4e-6, "assumed: eager torch, forward and backward"),
    "seconds of ZeRO-3 at a module": Span(300e-6, 150e-6, 80e-6, "assumed: its hooks are Python; fetch and release, both ways"),
    "seconds to begin a collective": Span(60e-6, 30e-6, 15e-6, "assumed: small messages of nccl-tests"),
    "GiB of context, libraries and NCCL": Span(2.5, 1.5, 1.0, "assumed: CUDA context, cuBLAS and cuDNN workspaces, NCCL"),
    "share lost to fragments": Span(0.10, 0.05, 0.02, "assumed: of what is allocated anew in every step"),
    "share of the device's watts": Span(1.0, 0.8, 0.6, "assumed: of its thermal design power, while it trains"),
    "watts of all over watts of devices": Span(1.8, 1.5, 1.3, "assumed: host, network, cooling; DGX H100: 10.2 kW for 8 x 700 W"),
}  # fmt: skip
# Peaks lie up to 1.089 times above what was said of them (15 cases, benchmarks/results/plan_check_cpu.json).
UNSEEN = 1.10
# Of findings and impression, where no report is here to be counted: assumed for MIMIC-CXR; in Open-i they are half as long.
USUAL_TOKENS = (80, 32)
USUAL_SPREAD = 0.5  # standard deviation of their sum over its mean, likewise
INTERCONNECT = 50.0  # GB/s out of a node, where nobody says: one 400 Gbit/s port


class Rates(NamedTuple):
    """What a device achieves, and what it keeps for itself."""

    matmul: float  # FLOP/s
    convolution: float
    depthwise: float
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to the other ranks, in each direction
    host_bandwidth: float  # bytes/s of the host's memory, of one rank
    host_link: float  # bytes/s between host and device
    launch: float = 0.0  # seconds of the host, of an operation
    hooks: float = 0.0  # seconds of the host, of ZeRO-3 at a module with weights, forward or backward
    meet: float = 0.0  # seconds, of a collective beside its bytes
    pages: float = 0.0  # seconds, of a byte of memory that a step takes anew: a CPU's system finds its pages each time
    overhead: float = 0.0  # bytes that no tensor of ours explains
    fragments: float = 0.0  # share of what is allocated in a step


class Machine(NamedTuple):
    """Where a run is planned for: `nodes` times `per_node` of one device."""

    name: str
    nodes: int
    per_node: int
    memory: float  # bytes of a device
    on_cuda: bool
    rates: dict[str, Rates]  # low, likely, high
    watts: float = 0.0  # of a device; 0: nobody knows

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


def gpu_machine(
    name: str, device: Device, train: TrainConfig, *, nodes: int, per_node: int, interconnect: float = INTERCONNECT
) -> Machine:
    """interconnect: GB/s that all devices of a node have together to other nodes. Raises ValueError."""
    for option, value in (("--nodes", nodes), ("--gpus-per-node", per_node), ("--interconnect", interconnect)):
        if not value > 0:
            raise ValueError(f"{option} {value}: must be greater than 0")
    if train.precision not in device.tflops:
        raise ValueError(f"train.precision = {train.precision!r}: {name} has no {train.precision}; use fp16 or fp32")
    speeds = {end: _rates(end, device, train.precision, nodes, interconnect) for end in ("low", "likely", "high")}
    return Machine(name, nodes, per_node, device.gib * GIB, True, speeds, device.watts)


def assumed(name: str, end: str) -> float:
    return getattr(ASSUMED[name], end)


def _rates(end: str, device: Device, precision: Precision, nodes: int, interconnect: float) -> Rates:
    products, convolutions = device.peak(precision), device.peak(precision, convolved=1.0)
    assert products is not None, "gpu_machine has looked"
    assert convolutions is not None
    link = device.link * 1e9 * assumed("share of the link in a node", end)
    if nodes > 1:  # a ring leaves every node once, over all of its ports
        link = min(link, interconnect * 1e9 * assumed("share of the link between nodes", end))
    return Rates(
        matmul=products * assumed("share of peak, matrix products", end),
        convolution=convolutions * assumed("share of peak, convolutions", end),
        depthwise=convolutions * assumed("share of peak, depthwise convolutions", end),
        bandwidth=device.bandwidth * 1e9 * assumed("share of memory bandwidth", end),
        link=link,
        host_bandwidth=1e9 * assumed("GB/s of host memory for a rank", end),
        host_link=1e9 * assumed("GB/s between host and device", end),
        launch=assumed("seconds to launch an operation", end),
        hooks=assumed("seconds of ZeRO-3 at a module", end),
        meet=assumed("seconds to begin a collective", end),
        overhead=GIB * assumed("GiB of context, libraries and NCCL", end),
        fragments=assumed("share lost to fragments", end),
    )
