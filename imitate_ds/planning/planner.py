"""From a run file and a machine to a plan: what every ZeRO stage would need and take, and which one to use."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from imitate_ds.config import RunConfig
from imitate_ds.planning.assumptions import GIB, UNSEEN, Machine, assumed
from imitate_ds.planning.loss import LossCost, loss_cost
from imitate_ds.planning.memory import Placed, Stage, Work, place, read_stage
from imitate_ds.planning.step_time import StepTime, step_time
from imitate_ds.planning.subject import Subject, read_data, study_run
from imitate_ds.training.engine import deepspeed_config

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")  # files of ds_configs/
ENDS = ("low", "likely", "high")
MOST_STUDIES = 2**16  # of a rank
ALIKE = 1.10  # times that differ by less are not told apart: the constants are not known as well as that


class Option(NamedTuple):
    """The run under one ZeRO stage."""

    stage: Stage
    refused: str  # why DeepSpeed, or this program, would not run it; "" otherwise
    largest: int  # micro batch that fits without GradCache; below 2: none
    chunk: int  # of GradCache for the wanted micro batch; 0: it fits as a whole; -1: nothing fits
    placed: Placed  # at the wanted micro batch
    times: dict[str, StepTime]  # by end of the assumptions


class Plan(NamedTuple):
    config: RunConfig
    machine: Machine
    subject: Subject
    loss: LossCost
    options: list[Option]
    choice: Option
    why: str

    @property
    def settings(self) -> list[str]:
        """What to `--set`."""
        chosen = {
            "deepspeed": self.choice.stage.name,
            "grad_cache_chunk": max(0, self.choice.chunk),
            "micro_batch_size": self.subject.studies,  # beside a global_batch_size for its chunks to divide
        }
        return [f"train.{name}={value}" for name, value in chosen.items()]


def make_plan(
    config: RunConfig, machine: Machine, *, studies: int | None = None, stages: tuple[str, ...] = STAGES
) -> Plan:
    """studies: of an epoch, where the shards are not here. Raises ValueError where nothing fits, and for what cannot run."""
    data = read_data(config, machine.ranks, studies)
    subject = study_run(config, machine, data)
    options = [_option(subject, machine, read_stage(name)) for name in _with_own(config, stages)]
    possible = [option for option in options if not option.refused and option.chunk >= 0]
    if not possible:
        raise ValueError(_nothing_fits(config, machine, options))
    choice = _choose(possible, config)
    loss = _loss_at(subject, machine, subject.studies)
    return Plan(config, machine, subject, loss, options, choice, _why(subject, machine, options, choice, loss))


def _with_own(config: RunConfig, stages: tuple[str, ...]) -> list[str]:
    """The run's own file too, where it is another one than those that ship."""
    return list(dict.fromkeys([*stages, config.train.deepspeed]))


def _option(subject: Subject, machine: Machine, stage: Stage) -> Option:
    refused = _refusal(subject, machine, stage)
    cautious = partial(placed_at, subject, machine, stage, end="low")

    def fits(studies: int, chunk: int) -> bool:
        return UNSEEN * cautious(studies=studies, chunk=chunk).total <= machine.memory

    wanted = subject.studies
    largest = _largest(lambda count: fits(count, count))
    chunk = 0 if largest >= wanted else next((part for part in _parts(subject) if fits(wanted, part)), -1)
    used = chunk if chunk > 0 else wanted
    times = {end: timed_at(subject, machine, stage, chunk=used, end=end) for end in ENDS}
    return Option(stage, refused, largest, chunk, placed_at(subject, machine, stage, studies=wanted, chunk=used), times)


def _refusal(subject: Subject, machine: Machine, stage: Stage) -> str:
    """What the engine would say of this combination."""
    train = subject.config.train.model_copy(update={"deepspeed": stage.name})
    try:
        deepspeed_config(train, subject.config.optim, has_batch_norm=bool(subject.size.batch_norms))
    except ValueError as error:
        return str(error)
    if stage.offloads_optimizer and not machine.on_cuda:
        return "nothing to offload to"
    return ""


def _largest(fits: Any) -> int:
    """The largest micro batch that fits; 0 where not even two studies do."""
    if not fits(2):
        return 0
    low, high = 2, 4
    while high <= MOST_STUDIES and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _parts(subject: Subject) -> Iterator[int]:
    """Chunks that train.grad_cache_chunk may be, the largest first."""
    wanted = subject.studies
    return (wanted // parts for parts in range(2, wanted // 2 + 1) if wanted % parts == 0)


def _loss_at(subject: Subject, machine: Machine, studies: int) -> LossCost:
    return loss_cost(
        subject.config,
        studies=studies,
        ranks=machine.ranks,
        nodes=machine.nodes,
        text_width=subject.data.text_width,
        on_cuda=machine.on_cuda,
    )


def _work(subject: Subject, machine: Machine, stage: Stage, studies: int) -> Work:
    loss = _loss_at(subject, machine, studies)
    return Work(subject.traces, loss, subject.size, subject.precision, stage, machine)


def placed_at(
    subject: Subject, machine: Machine, stage: Stage, *, studies: int, chunk: int, end: str = "likely"
) -> Placed:
    sizes = {"batch_bytes": subject.batch_bytes, "features_bytes": subject.features_bytes}
    work = _work(subject, machine, stage, studies)._replace(traces=subject.crowded)
    return place(work, studies=studies, chunk=chunk, end=end, **sizes)


def timed_at(subject: Subject, machine: Machine, stage: Stage, *, chunk: int, end: str) -> StepTime:
    studies = subject.studies
    return step_time(_work(subject, machine, stage, studies), studies=studies, chunk=chunk, end=end)


def _choose(possible: list[Option], config: RunConfig) -> Option:
    """The fastest that holds the whole batch, else the fastest with GradCache; among alike, the run's own, then the simplest."""
    whole = [option for option in possible if not option.chunk] or possible
    best = min(option.times["likely"].total for option in whole)
    alike = [option for option in whole if option.times["likely"].total <= best * ALIKE]
    own = [option for option in alike if option.stage.name == config.train.deepspeed]
    return (own or alike)[0]


def _nothing_fits(config: RunConfig, machine: Machine, options: list[Option]) -> str:
    refused = [f"{option.stage.label}: {option.refused}" for option in options if option.refused]
    open_to = [option for option in options if not option.refused]
    if not open_to:
        return f"train.precision = {config.train.precision!r}: no ZeRO stage can run this: {'; '.join(refused)}"
    least = min(open_to, key=lambda option: option.placed.total)
    need = least.placed.kinds
    return (
        f"train.micro_batch_size = {config.train.micro_batch_size}: cannot be made to fit the {machine.memory / GIB:.0f} GiB of "
        f"a {machine.name}, with chunks of 2 studies neither: {least.stage.label} needs "
        + ", ".join(f"{size / GIB:.1f} GiB of {kind}" for kind, size in need.items() if size > 0.05 * GIB)
        + "; take a smaller model.image_encoder or data.input_size, a smaller batch, or a larger device"
    )


class Outlook(NamedTuple):
    """What the chosen option means for the whole run; days and energy are None where nobody knows how long it is."""

    seconds: float  # of a step
    studies_per_second: float
    days: float | None
    kwh: float | None


def outlook(plan: Plan, end: str = "likely") -> Outlook:
    seconds = plan.choice.times[end].total
    rate = plan.config.train.studies_of(plan.machine.ranks) / seconds
    steps = plan.subject.data.total_steps
    if steps is None:
        return Outlook(seconds, rate, None, None)
    hours = steps * seconds / 3600
    watts = plan.machine.watts * plan.machine.ranks
    if not watts:
        return Outlook(seconds, rate, hours / 24, None)
    used = watts * assumed("share of the device's watts", end) * assumed("watts of all over watts of devices", end)
    return Outlook(seconds, rate, hours / 24, used * hours / 1000)


def _why(subject: Subject, machine: Machine, options: list[Option], choice: Option, loss: LossCost) -> str:
    """One paragraph."""
    step, wanted = choice.times["likely"], subject.studies
    sentences = [_of_memory(subject, machine, choice), _of_the_others(options, choice), _of_time(step)]
    if choice.chunk:
        price = f"the price of a second forward pass ({step.recomputed / step.total:.0%} of the step)"
        norms = "; every BatchNorm then sees a chunk at a time" if subject.size.batch_norms else ""
        sentences.append(
            f"GradCache passes {choice.chunk} studies at a time, {wanted // choice.chunk} times, for {price}{norms}."
        )
    buckets = choice.placed.kinds["communication buckets"]
    if buckets > 0.05 * machine.memory:
        sentences.append(
            f"{buckets / GIB:.1f} GiB of it are DeepSpeed's buckets, of {choice.stage.bucket:.0e} elements for any model; "
            "zero_optimization.reduce_bucket_size, in a file of your own for train.deepspeed, makes them smaller."
        )
    columns = f"{wanted * machine.ranks:,}" if subject.config.objective.negatives.scope == "global" else f"{wanted:,}"
    sentences.append(f"The loss compares {columns} studies in the {loss.backend} form.")
    if subject.text:
        sentences.append(f"The text encoder in the step: {subject.text}.")
    return " ".join(filter(None, sentences))


def _of_memory(subject: Subject, machine: Machine, choice: Option) -> str:
    wanted, whole = subject.studies, choice.placed
    used = f"{whole.total / GIB:.1f} of {machine.memory / GIB:.0f} GiB"
    checked = f"({choice.largest:,} would be the most)" if choice.largest >= 2 else "(not even 2 would be whole)"
    if choice.chunk:
        chunks = f"in chunks of {choice.chunk} under {choice.stage.label} they take {used}"
        return f"{wanted:,} studies a rank do not fit {machine.name} at once {checked}; {chunks}."
    return f"{wanted:,} studies a rank fit {machine.name} as a whole under {choice.stage.label}, in {used} {checked}."


def _of_the_others(options: list[Option], choice: Option) -> str:
    """What the stages that were not taken would bring, or why they cannot be."""
    parts = []
    for option in options:
        if option is choice:
            continue
        slower = option.times["likely"].total / choice.times["likely"].total - 1
        saved = (choice.placed.total - option.placed.total) / GIB
        if option.refused:
            parts.append(f"{option.stage.label} cannot run this")
        elif option.chunk < 0:
            parts.append(f"{option.stage.label} does not fit")
        else:
            memory = f"{abs(saved):.1f} GiB {'less' if saved >= 0 else 'more'}"
            longer = f"{abs(slower):.0%} {'longer' if slower > 0 else 'shorter'}" if abs(slower) >= 0.005 else "as long"
            parts.append(f"{option.stage.label} would need {memory} and take {longer}")
    if not parts:
        return ""
    return f"Of the others, {', '.join(parts)}; times within {ALIKE - 1:.0%} are not told apart, and leave the stage as it is."


def _of_time(step: StepTime) -> str:
    names = {
        "compute": "arithmetic",
        "memory_bound": "reading and writing memory (norms, activations)",
        "launching": "launching operations",
        "recomputed": "GradCache's first pass",
        "loss": "the loss",
        "optimizer": "the optimizer",
        "gradients": "reducing gradients",
        "parameters": "gathering parameters",
        "embeddings": "gathering embeddings and statistics",
    }
    parts = sorted(step._asdict().items(), key=lambda part: -part[1])[:3]
    most = ", ".join(f"{names[name]} ({value / step.total:.0%})" for name, value in parts if value > 0.01 * step.total)
    return f"The step is mostly {most}."
