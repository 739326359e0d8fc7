"""What lies in the memory of one rank, by kind, at the worst moment of a step, for every ZeRO stage.

Of weights, gradients and optimizer it is what DeepSpeed 0.19.8 allocates (stage_1_and_2.py, stage3.py), which is more than
"ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (Rajbhandari et al., 2020) counts: a second copy of weights
that are float32 already, buckets of fixed size, flat copies while gradients are reduced. The rest is traced.
"""

from typing import NamedTuple

from torch import nn

from imitate_ds.config import TrainConfig
from imitate_ds.planning.assumptions import Machine
from imitate_ds.planning.loss import FLOAT, LossCost
from imitate_ds.planning.trace import CrowdedTraces, Trace, Traces
from imitate_ds.training.batch_norm import BATCH_NORMS
from imitate_ds.training.engine import load_deepspeed_json, lowered_elements, zero_settings

KINDS = (
    "parameters",
    "gradients",
    "optimizer states",
    "activations",
    "loss buffers",
    "gathered embeddings",
    "communication buckets",
    "framework overhead",
)
ADAM = 2 * FLOAT  # bytes of both moments of an element


class Stage(NamedTuple):
    """A ZeRO configuration, as a file in ds_configs/ and DeepSpeed's defaults make it."""

    name: str  # as train.deepspeed has it
    stage: int
    bucket: int  # elements
    overlap: bool
    offloads_optimizer: bool
    offloads_parameters: bool
    live: int  # elements of parameters that ZeRO-3 may hold gathered
    persistent: int  # a parameter of no more elements stays whole on every rank
    ahead: int  # elements of parameters that ZeRO-3 fetches before they are needed

    @property
    def label(self) -> str:
        offload = " + offload" if self.offloads_optimizer else ""
        return f"ZeRO-{self.stage}{offload}"


class Size(NamedTuple):
    """Of a model: elements, by what DeepSpeed does with them."""

    trained: int
    lowered: int  # of trained: reduced in 16 bits under autocast
    largest: int  # of trained: in one parameter
    frozen: int  # of parameters that do not train: ZeRO-3 shares them out too
    each: tuple[int, ...]  # of both: in every parameter
    buffers: int  # bytes
    batch_norms: int  # layers
    modules: int  # that hold weights themselves

    def small(self, stage: Stage) -> int:
        """In parameters that ZeRO-3 leaves whole on every rank."""
        return sum(count for count in self.each if count <= stage.persistent)

    def sharded(self, stage: Stage) -> int:
        """That a rank of ZeRO-3 holds a part of."""
        return self.trained + self.frozen - self.small(stage)


class Precision(NamedTuple):
    weights: int  # bytes of an element of weights and gradients
    autocast: bool

    @property
    def is_half(self) -> bool:
        return self.weights < FLOAT


class Work(NamedTuple):
    """A step, the ZeRO stage that it is taken under, and the machine that takes it."""

    traces: Traces | CrowdedTraces
    loss: LossCost
    size: Size
    precision: Precision
    stage: Stage
    machine: Machine


class Placed(NamedTuple):
    """Bytes of one rank by kind, at the moment when they are most."""

    moment: str
    kinds: dict[str, float]
    host: float  # bytes of the host's memory, for this rank

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


def read_stage(name: str) -> Stage:
    settings = zero_settings(load_deepspeed_json(name))
    return Stage(
        name,
        int(settings.stage),
        settings.reduce_bucket_size,
        bool(settings.overlap_comm),
        settings.offload_optimizer is not None,
        settings.offload_param is not None,
        min(settings.max_live_parameters, settings.max_reuse_distance),
        settings.param_persistence_threshold,
        settings.prefetch_bucket_size,
    )


def model_size(model: nn.Module) -> Size:
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
    return Size(
        sum(trained),
        lowered_elements(model),
        max(trained),
        sum(frozen),
        (*trained, *frozen),
        sum(buffer.nbytes for buffer in model.buffers()),
        sum(isinstance(module, BATCH_NORMS) for module in model.modules()),
        sum(1 for module in model.modules() if next(module.parameters(recurse=False), None) is not None),
    )


def precision_of(train: TrainConfig, *, has_batch_norm: bool) -> Precision:
    """As engine.deepspeed_config: autocast for models with BatchNorm, 16-bit weights without."""
    half = train.precision != "fp32"
    return Precision(2 if half and not has_batch_norm else FLOAT, half and has_batch_norm)


def place(
    work: Work, *, studies: int, chunk: int, batch_bytes: float, features_bytes: float, end: str = "likely"
) -> Placed:
    """studies: of this rank and step; chunk: of them pass the encoder together. Bytes of a study: batch_bytes, features_bytes."""
    traces, loss, size, precision, stage, machine = work
    ranks, rates = machine.ranks, machine.rates[end]
    whole = size.trained * precision.weights
    state = _states(size, precision, stage, ranks)
    cached = chunk < studies
    trace = traces.at(chunk)
    batch = (studies - chunk) * batch_bytes if cached else 0.0
    features = 3 * studies * features_bytes if cached else 0.0  # of the chunks, joined, and their gradients
    # Gradients stay in the parameters while they are added up; ZeRO-3 moves them to a bucket, and on a GPU ZeRO-2 does too.
    reserved = (stage.stage == 3 or (machine.on_cuda and stage.stage == 2)) and not cached
    in_place = 0.0 if reserved else 1.0
    # From the second chunk on all of them are there from the start.
    finished = whole if cached else _finished_at_peak(trace, in_place)
    alive = trace.peak() if cached else trace.peak(in_place) - finished
    buckets = _buckets(size, precision, stage, on_cuda=machine.on_cuda)
    gathered = {"gathered embeddings": loss.gathered}
    lasting = {"communication buckets": buckets if stage.stage == 3 else 0.0}
    flushed = _flushed(size, precision, stage)

    moments = {
        "forward": gathered
        | lasting
        | {
            "activations": batch + features + trace.saved,
            "gradients": finished if cached else 0.0,
            "parameters": _gathered_parameters(size, precision, stage, ranks),
            "communication buckets": lasting["communication buckets"] + _in_flight(size, precision, stage, ranks),
        },
        "loss": gathered
        | lasting
        | {
            "activations": batch + features + (0.0 if cached else trace.saved),
            "loss buffers": loss.peak,
            "parameters": _gathered_parameters(size, precision, stage, ranks),
        },
        "backward": gathered
        | {
            "activations": batch + features + alive,
            "gradients": finished,
            "loss buffers": 0.0 if cached else loss.saved,
            "communication buckets": lasting["communication buckets"] if cached else buckets + flushed,
            "parameters": _gathered_parameters(size, precision, stage, ranks),
        },
        "reduction": gathered
        | {
            "gradients": 0.0 if reserved else whole,
            "communication buckets": buckets + _reduction(size, precision, stage, ranks),
        },
        "optimizer": gathered | lasting | {"gradients": _stepping(size, precision, stage, ranks)},
    }
    placed = [_at(moment, state, kinds, rates.overhead, rates.fragments) for moment, kinds in moments.items()]
    worst = max(placed, key=lambda it: it.total)
    return worst._replace(host=_host(size, precision, stage, ranks))


def _at(moment: str, state: dict[str, float], kinds: dict[str, float], overhead: float, fragments: float) -> Placed:
    whole = {kind: state.get(kind, 0.0) + kinds.get(kind, 0.0) for kind in KINDS}
    whole["framework overhead"] = overhead + fragments * sum(kinds.values())
    return Placed(moment, whole, 0.0)


def _finished_at_peak(trace: Trace, in_place: float) -> float:
    return float(in_place * trace.finished[(trace.live + in_place * trace.finished).argmax()])


def _states(size: Size, precision: Precision, stage: Stage, ranks: int) -> dict[str, float]:
    """What lasts from step to step."""
    share = ranks if stage.stage else 1
    weights, own = (size.trained + size.frozen) * precision.weights, size.trained / share
    # ZeRO-1 and 2 keep a copy of their share though the weights be float32 already; ZeRO-3 does not.
    copies = precision.is_half or stage.stage in (1, 2)
    optimizer = 0.0 if stage.offloads_optimizer else own * (ADAM + FLOAT * copies)
    if stage.stage < 3:
        return {"parameters": weights + size.buffers, "optimizer states": optimizer}
    kept = size.sharded(stage) * precision.weights / ranks * (not stage.offloads_parameters)
    small = size.small(stage) * precision.weights * (1 if ranks == 1 else 1 + 1 / ranks)
    return {
        "parameters": kept + small + size.buffers,
        "optimizer states": optimizer,
        "gradients": own * precision.weights * (not stage.offloads_optimizer),
    }


def _gathered_parameters(size: Size, precision: Precision, stage: Stage, ranks: int) -> float:
    """ZeRO-3 lets go of what is not needed again within `live` elements: of most models, nothing before the backward pass."""
    if stage.stage < 3 or (ranks == 1 and not stage.offloads_parameters):
        return 0.0
    return min(size.sharded(stage), stage.live) * precision.weights


def _in_flight(size: Size, precision: Precision, stage: Stage, ranks: int) -> float:
    """What ZeRO-3 fetches ahead comes in one flat buffer, from which every weight is copied; from the host it comes without."""
    if ranks == 1:
        return 0.0
    return min(_gathered_parameters(size, precision, stage, ranks), stage.ahead * precision.weights)


def _buckets(size: Size, precision: Precision, stage: Stage, *, on_cuda: bool) -> float:
    """Buffers of a fixed size, one for each dtype that gradients travel in, and a second of each to overlap.

    A CPU's memory is taken where it is written to: ZeRO-3's bucket stays when gradients have filled it.
    """
    if not on_cuda:
        return min(size.trained, stage.bucket) * precision.weights * (stage.stage == 3)
    if not stage.stage:
        return 0.0
    if stage.stage == 3:
        return stage.bucket * (2 + FLOAT if precision.autocast else precision.weights)
    return stage.bucket * precision.weights * (1 + precision.autocast) * (1 + stage.overlap)


def _flushed(size: Size, precision: Precision, stage: Stage) -> float:
    """ZeRO-3's copy of a full bucket, in the order of the ranks, while the backward pass goes on."""
    return stage.bucket * precision.weights * (stage.stage == 3 and size.trained > stage.bucket)


def _reduction(size: Size, precision: Precision, stage: Stage, ranks: int) -> float:
    """Copies beside the gradients while ranks add them up."""
    low = size.lowered * 2 if precision.autocast else 0
    flat = min(size.trained, stage.bucket if stage.stage else size.trained) * precision.weights
    own = size.trained / ranks * precision.weights
    if not stage.stage:
        return flat
    if stage.stage == 3:
        return flat + low
    return own + (flat + low if ranks > 1 else low)


def _stepping(size: Size, precision: Precision, stage: Stage, ranks: int) -> float:
    """Gradients of the share that this rank steps, flat, in float32, and the float64 copy that a norm is taken of."""
    own = size.trained / (ranks if stage.stage else 1)
    if stage.offloads_optimizer:
        return 2 * size.largest * precision.weights
    if not stage.stage:
        return own * (precision.weights + FLOAT * precision.is_half)
    flat = own * (FLOAT + precision.weights * precision.is_half)
    before = own * precision.weights * (stage.stage < 3)  # ZeRO-3's are in its states
    return before + max(flat, 8 * size.largest / ranks)


def _host(size: Size, precision: Precision, stage: Stage, ranks: int) -> float:
    if not stage.offloads_optimizer:
        return 0.0
    gradients_and_states = size.trained / ranks * (ADAM + 2 * FLOAT + precision.weights)
    return gradients_and_states + size.sharded(stage) / ranks * precision.weights * stage.offloads_parameters
