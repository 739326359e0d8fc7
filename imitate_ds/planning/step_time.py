"""How long a step takes: a roofline over its operations, the loss, the messages, and what of them hides behind what."""

from typing import NamedTuple

import numpy as np

from imitate_ds.planning.assumptions import Machine, Rates
from imitate_ds.planning.loss import FLOAT
from imitate_ds.planning.memory import Precision, Size, Stage, Work
from imitate_ds.planning.trace import KINDS, Trace

# Bytes of an element that the optimizer passes over: Adam reads and writes weight and both moments and reads the
# gradient (28), the norm and clipping touch it three times (12).
ADAM_TRAFFIC = 40
# Passes over gradients, and copies of them in memory taken anew: they go flat, and back; ZeRO flattens them once more, and brings
# weights back. What ZeRO-3 gathers goes through a flat buffer.
PASSES, COPIES = {0: 4, 1: 7, 2: 7, 3: 7}, {0: 1, 1: 2, 2: 2, 3: 2}
GATHERED_PASSES, GATHERED_COPIES = 5, 2


class StepTime(NamedTuple):
    """Seconds of a step of one rank; parts add up to the total."""

    compute: float  # operations that arithmetic bounds
    memory_bound: float  # operations that memory bounds
    launching: float  # what the host is slower than the device
    recomputed: float  # GradCache's first pass
    loss: float
    optimizer: float
    gradients: float  # reduced over ranks, beyond what hides behind the backward pass
    parameters: float  # gathered over ranks, likewise
    embeddings: float  # gathered over ranks, and SyncBatchNorm's messages

    @property
    def total(self) -> float:
        return sum(self)


def step_time(work: Work, *, studies: int, chunk: int, end: str = "likely") -> StepTime:
    """studies: of this rank and step; chunk: of them pass the encoder together."""
    traces, loss, size, precision, stage, machine = work
    rates, chunks = machine.rates[end], studies / chunk
    trace = traces.at(chunk)
    seconds, bounded = _roofline(trace, rates)
    forward, backward = seconds[: trace.forward].sum() * chunks, seconds[trace.forward :].sum() * chunks
    compute = float(seconds[bounded].sum()) * chunks
    hooks = rates.hooks * size.modules if stage.stage == 3 else 0.0
    # A GPU computes while its host and its links go on; a CPU does one after the other.
    hidden = machine.on_cuda
    launching = max(0.0, rates.launch * len(seconds) + 2 * hooks - hidden * float(seconds.sum())) * chunks
    host = (rates.launch * trace.forward + hooks) * chunks
    again = (max(forward, host) if hidden else forward + host) if chunks > 1 else 0.0
    gather = _gathering_seconds(size, precision, stage, machine.ranks, rates, chunks=chunks)
    if hidden and stage.stage == 3 and stage.overlap:
        gather = max(0.0, gather - forward * (1 + (chunks > 1)))
    added_up = 3 * (chunks - 1) * size.trained * precision.weights / rates.bandwidth  # gradients of the chunks
    taken = trace.peak() * chunks * rates.pages
    texts = max(0.0, loss.hidden_wire / rates.link - forward * hidden)
    norms = (
        2 * size.batch_norms * (chunks + (chunks > 1)) * rates.meet if machine.on_cuda and machine.ranks > 1 else 0.0
    )
    return StepTime(
        compute,
        float(forward + backward - compute) + added_up + taken,
        launching,
        float(again),
        max(loss.flops / rates.matmul, loss.moved / rates.bandwidth),
        _optimizer_seconds(size, precision, stage, machine, rates),
        _reducing_seconds(size, precision, stage, machine.ranks, rates, behind=backward * hidden),
        gather,
        texts + loss.wire / rates.link + loss.messages * rates.meet * (machine.ranks > 1) + norms,
    )


def _roofline(trace: Trace, rates: Rates) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of every operation [n], and whether arithmetic bounds it."""
    speeds = np.array([rates.matmul, rates.convolution, rates.depthwise, rates.matmul])
    assert len(speeds) == len(KINDS)
    arithmetic, memory = trace.flops / speeds[trace.kind], trace.moved / rates.bandwidth
    return np.maximum(arithmetic, memory), arithmetic > memory


def _reducing_seconds(
    size: Size, precision: Precision, stage: Stage, ranks: int, rates: Rates, *, behind: float
) -> float:
    """Of adding up gradients, by rings. behind: seconds of computing that messages may hide behind.

    DeepSpeed's ZeRO-1 and 2 add up all of every gradient on every rank (use_multi_rank_bucket_allreduce), ZeRO-3 scatters it.
    Only whole buckets go out while the backward pass runs, and most models fit into one.
    """
    if ranks == 1:
        return 0.0
    sent = size.trained * precision.weights - (size.lowered * 2 if precision.autocast and stage.stage else 0)
    around = (ranks - 1) / ranks
    reduce = (1 if stage.stage == 3 else 2) * around * sent / rates.link + rates.meet
    early = max(0.0, 1 - stage.bucket / size.trained) if stage.overlap else 0.0
    return reduce - min(reduce * early, behind)


def _gathering_seconds(
    size: Size, precision: Precision, stage: Stage, ranks: int, rates: Rates, *, chunks: float
) -> float:
    """Of bringing weights together, by rings: at ZeRO-1 and 2 after the step.

    At ZeRO-3 in every forward pass, of which GradCache makes two a chunk, and again in the backward pass where a model has more
    elements than may stay gathered; from the host first, where a rank's part lies there.
    """
    sent = (size.sharded(stage) if stage.stage == 3 else size.trained) * precision.weights
    once = (ranks - 1) / ranks * sent / rates.link + rates.meet if ranks > 1 and stage.stage else 0.0
    if stage.stage < 3:
        return once
    if ranks > 1:
        once += sent * (GATHERED_PASSES / rates.bandwidth + GATHERED_COPIES * rates.pages)
    if stage.offloads_parameters:
        once += sent / ranks / rates.host_link
    forward, backward = (2 * chunks, chunks) if chunks > 1 else (1, 1)
    return once * (forward + backward * (size.sharded(stage) > stage.live))


def _optimizer_seconds(size: Size, precision: Precision, stage: Stage, machine: Machine, rates: Rates) -> float:
    """The step, and the copies around it."""
    own = size.trained / (machine.ranks if stage.stage else 1)
    kind = 0 if stage.stage == 3 and machine.ranks == 1 else stage.stage  # alone there is nothing to share out
    copies = size.trained * precision.weights * (PASSES[kind] / rates.bandwidth + COPIES[kind] * rates.pages)
    if not stage.offloads_optimizer:
        return own * ADAM_TRAFFIC / rates.bandwidth + copies
    there_and_back = own * 2 * FLOAT / rates.host_link
    return own * ADAM_TRAFFIC / rates.host_bandwidth + there_and_back + copies
