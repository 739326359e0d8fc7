"""What a plan is about: the run's model, traced, and what its data say, or are said to be."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from imitate_ds.batch import Batch, Tokens
from imitate_ds.config import RunConfig
from imitate_ds.data.text_cache import TEXT_INDEX, text_info
from imitate_ds.data.train_plan import build_train_plan
from imitate_ds.planning.assumptions import Machine
from imitate_ds.planning.loss import FLOAT
from imitate_ds.planning.memory import Precision, Size, model_size, precision_of
from imitate_ds.planning.text import PlannedText, PlannedTower, folders_here, read_text
from imitate_ds.planning.trace import CrowdedTraces, Traces, trace_pair
from imitate_ds.recipe import Inputs, build_model
from imitate_ds.training.batch_norm import batch_norm_policy, freeze_batch_norm, has_batch_norm, set_training_mode
from imitate_ds.training.course import Horizon

USUAL_TEXT_WIDTH = 768  # of BERT-base


class Data(NamedTuple):
    """What a run reads. Steps are None where nobody knows how many studies there are."""

    studies: int | None  # of an epoch
    steps_per_epoch: int | None
    total_steps: int | None
    text_width: int
    source: str  # where this comes from, for people


class Subject(NamedTuple):
    config: RunConfig
    data: Data
    traces: Traces
    crowded: Traces | CrowdedTraces  # the same where reports are as long as they may meet in one micro batch
    size: Size
    precision: Precision
    studies: int  # of one rank and step
    batch_bytes: float  # of one study on the device
    features_bytes: float  # of one study's embeddings
    text: str  # what a text encoder in the step was taken for, for people; "" where there is none


def read_data(config: RunConfig, ranks: int, studies: int | None) -> Data:
    """From the index where all shards lie on this machine, else from `studies`; raises what opening the shards raises."""
    batch = config.train.studies_of(ranks)
    places = [part.shards for part in config.data.shards]
    if folders := folders_here(config.data):
        if studies is not None:
            raise ValueError(
                f"--studies {studies}: the index of {', '.join(places)} says how many there are; leave it out"
            )
        plan = build_train_plan(config.data, folders, seed=config.seed, global_batch_size=batch)
        steps, embedded = plan.steps_per_epoch, (folders[0].root / TEXT_INDEX).is_file()
        width = text_info(folders[0])["width"] if embedded else USUAL_TEXT_WIDTH
        return Data(plan.samples, steps, _total_steps(config, steps), width, f"the index of {', '.join(places)}")
    steps = None if studies is None else studies // batch
    if steps == 0:
        raise ValueError(f"--studies {studies}: fewer than one global batch of {batch}; lower train.micro_batch_size")
    source = (
        f"--studies; {USUAL_TEXT_WIDTH} wide texts assumed"
        if studies
        else "nobody: the shards are not here, and no --studies"
    )
    return Data(studies, steps, _total_steps(config, steps), USUAL_TEXT_WIDTH, source)


def _total_steps(config: RunConfig, steps_per_epoch: int | None) -> int | None:
    train = config.train
    if steps_per_epoch is None:
        return train.max_steps or None
    total = steps_per_epoch * train.epochs
    return min(total, train.max_steps or total)


def study_run(config: RunConfig, machine: Machine, data: Data) -> Subject:
    """Trace the run's model. Its weights are neither read nor fetched. Raises ValueError as building it does."""
    batch = config.train.studies_of(machine.ranks)
    if batch < 2 * machine.ranks:
        raise ValueError(
            f"train.global_batch_size = {batch}: must be at least 2 for each of {machine.ranks} ranks; raise it, or use fewer"
        )
    studies = -(-batch // machine.ranks)
    text = read_text(config) if config.text.mode == "online" else None
    model = _model(config, machine, data.text_width, text)
    precision = precision_of(config.train, has_batch_norm=has_batch_norm(model))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
    if precision.is_half:
        model = model.to(dtype)
    size = model_size(model)
    step = partial(_step, size=config.data.input_size, text_width=data.text_width)
    sizes = (studies // 2, studies) if studies >= 8 else (studies, 2 * studies)
    trace = partial(
        trace_pair, model, step, sizes, autocast=dtype if precision.autocast else None, as_cuda=machine.on_cuda
    )
    traces = trace()
    crowded = _crowded(model, traces, trace, studies) if text else traces
    embeddings = 4 + 4 * config.model.aggregation.enabled  # of both views and both texts, at each level
    return Subject(
        config,
        data,
        traces,
        crowded,
        size,
        precision,
        studies,
        2 * config.data.input_size**2 + 2 * data.text_width * FLOAT + 2,
        embeddings * config.model.joint_dim * FLOAT,
        text.source if text else "",
    )


def _model(config: RunConfig, machine: Machine, text_width: int, text: PlannedText | None) -> nn.Module:
    """On the meta device: shapes without numbers."""
    policy = batch_norm_policy(config.train, torch.device("cuda" if machine.on_cuda else "cpu"))
    model, train = (
        config.model.model_copy(update={"weights": "none"}),
        config.train.model_copy(update={"compile": ()}),
    )
    bare = config.model_copy(update={"model": model, "train": train})
    # SyncBatchNorm keeps what BatchNorm keeps, and runs on CUDA only: "mean" leaves the layers as they are.
    tower = PlannedTower(text, config.text.trainable_layers, on_cuda=machine.on_cuda) if text else None
    width = tower.width if tower else text_width
    with torch.device("meta"):
        model = build_model(bare, Inputs([], "", width, Horizon(0, 0, 0, 0), "mean", machine.nodes))
    model.text_tower = tower
    if policy == "freeze":
        freeze_batch_norm(model)
    set_training_mode(model, policy)
    return model


def _crowded(model: nn.Module, usual: Traces, trace: Callable[[], Traces], studies: int) -> CrowdedTraces:
    """At the lengths of the mean, of the wanted micro batch, and of the smallest one."""
    tower = model.text_tower
    assert isinstance(tower, PlannedTower)
    length_of = partial(tower.row_length, with_findings=model.findings_branch is not None)
    by_length = {length_of(None): usual}
    for met in (studies, 2):
        tower.met = met
        if length_of(met) not in by_length:
            by_length[length_of(met)] = trace()
    return CrowdedTraces(by_length, length_of)


def _step(model: nn.Module, studies: int, *, size: int, text_width: int) -> Tensor:
    """The forward pass, and a scalar that every embedding has a part in, as in GradCache; the loss is planned apart."""
    texts, there = torch.empty(studies, text_width), torch.ones(studies, dtype=torch.bool)
    images = torch.empty(studies, 2, 1, size, size, dtype=torch.uint8)
    tokens = Tokens(torch.empty(0), torch.empty(studies, 2))  # a planned tower asks only of how many studies
    features = model(Batch([""] * studies, images, texts, texts.clone(), there, there, 0, tokens=tokens))
    return torch.stack([rows.sum() for rows in features if rows is not None]).sum()
