"""Pre-training, the main entrance: `deepspeed --module imitate_ds.pretrain --config RUN.yaml [--set key=value ...]`."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imitate_ds import hub
from imitate_ds.batch import Batch, Features, Losses
from imitate_ds.config import RunConfig, dump_run_config, load_run_config
from imitate_ds.data.loader import build_train_loader, build_train_plan, open_train_folders
from imitate_ds.data.shard_index import ShardIndex
from imitate_ds.data.shard_plan import PLAN
from imitate_ds.data.text_cache import fetch_encoder, text_info
from imitate_ds.data.transforms import TrainViews
from imitate_ds.distributed import broadcast_object, gather_objects, init_world, leave_world, training_device, world
from imitate_ds.evaluation.validation import validate
from imitate_ds.models.image_encoder import synchronise_batch_norm
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.objective import exchange_texts, imitate_loss
from imitate_ds.ops.contrastive import choose_backend
from imitate_ds.training.checkpoint import find_checkpoint, load_checkpoint, read_state, save_checkpoint
from imitate_ds.training.engine import (
    average_batch_norm_statistics,
    batch_norm_policy,
    build_engine,
    full_state_dict,
    set_training_mode,
)
from imitate_ds.training.grad_cache import backward_in_chunks
from imitate_ds.training.loop import LoopSettings, StepOutput, train_steps
from imitate_ds.training.monitor import Monitor
from imitate_ds.training.schedule import learning_rate, restart_period

# Settings that may change when a run goes on; all others must be those it was begun with.
FREE_SETTINGS = {
    "name",
    "output_dir",
    "data.shards",  # folders may move; their builds, weights and embeddings may not change
    "data.val_split",
    "data.workers",
    "data.max_skipped",
    "data.verify",
    "data.augment_on",
    "data.cache_dir",
    "data.cache_gib",
    "train.resume",
    "train.save_every",
    "train.keep_last",
    "train.eval_every",
    "train.log_every",
    "train.images_every",
}
# Settings that may differ between the ranks of one run: each machine may have its own disk, and its own processors.
RANKS_OWN = {"data.shards", "data.workers", "data.cache_dir", "data.cache_gib"}


class Horizon(NamedTuple):
    """How long a run is, in optimizer steps."""

    samples: int
    global_batch_size: int
    steps_per_epoch: int
    total_steps: int


class Inputs(NamedTuple):
    """What a run is made from, opened and checked before anything is built."""

    folders: list[ShardIndex]
    text_encoder: str  # fingerprint
    text_width: int
    horizon: Horizon
    batch_norm: str  # resolved policy


def pretrain(config: RunConfig) -> dict[str, float]:
    """Train, validate, save and export as the run file says; returns the last validation metrics.

    Everything of the run lies in config.run_dir: config.yaml, checkpoints/, tensorboard/, metrics.jsonl, export/.
    """
    here = init_world()
    config = _with_operands(config)
    inputs = _open_inputs(config)
    checkpoint = _open_run(config, inputs)
    engine = build_engine(_build_model(config, inputs), config.train, config.optim)
    start_step = load_checkpoint(engine, checkpoint)["step"] if checkpoint else 0
    if here.is_main:
        _write_atomically(config.run_dir / "config.yaml", dump_run_config(config))

    horizon = inputs.horizon
    monitor = Monitor(config.run_dir, start_step=start_step, total_steps=horizon.total_steps, speaks=here.is_main)
    monitor.say(_describe(config, inputs, start_step))
    metrics: dict[str, float] = {}
    settings = LoopSettings(
        seed=config.seed,
        total_steps=horizon.total_steps,
        batch_norm=inputs.batch_norm,
        skips_overflow=config.train.precision == "fp16",
        log_every=config.train.log_every,
        images_every=config.train.images_every,
        pauses_at=lambda done: _saves_at(done, config, horizon) or _validates_at(done, config, horizon),
    )
    batches = build_train_loader(
        config,
        rank=here.rank,
        world_size=here.size,
        start_step=start_step,
        stop_step=horizon.total_steps,
        folders=inputs.folders,
        record=config.run_dir / f"skipped.rank{here.rank}.jsonl",
    )
    period = restart_period(horizon.samples, horizon.global_batch_size, config.optim.restart_epochs)
    rate = partial(learning_rate, total_steps=horizon.total_steps, optim=config.optim, period=period)
    pause = partial(_pause, engine, config, inputs, monitor, metrics)
    try:
        views = TrainViews(config.data.augment, config.data.input_size)
        train_steps(engine, batches, partial(_step, engine, config, views), rate, monitor, settings, pause)
        if not metrics and start_step and _validates_at(horizon.total_steps, config, horizon):
            metrics.update(
                validate(engine, config, inputs.folders, inputs.text_encoder)
            )  # the run had ended; say again how it stands
        export(engine, config, inputs)
        monitor.hyperparameters(_flat(config.model_dump(mode="json")), metrics)
        monitor.say(f"export: {config.run_dir / 'export'}")
    finally:
        monitor.close()
    return metrics


def export(engine: Any, config: RunConfig, inputs: Inputs) -> None:
    """Write run_dir/export: weights and configuration that `imitate_ds.load_model` reads. A collective."""
    average_batch_norm_statistics(engine.module)
    state = full_state_dict(engine)
    if not world().is_main:
        return
    first = inputs.folders[0]
    if (now := text_info(first)["encoder"]) != inputs.text_encoder:
        raise RuntimeError(
            f"data.shards = '{first.root}': embedded anew during the run (encoder {now}, the run began with "
            f"{inputs.text_encoder}); embed with the first one again and go on with --set train.resume=true"
        )
    empty = config.model.model_copy(update={"weights": "none"})  # all of them are in `state`
    model = _model(config.model_copy(update={"model": empty}), inputs)
    model.load_state_dict(state)
    horizon = inputs.horizon
    card = {
        "data": _sources(inputs),
        "synthetic": all(folder.synthetic for folder in inputs.folders),
        "image_size": first.image_size,
        "build_id": " ".join(folder.build_id for folder in inputs.folders),
        "train_split": config.data.train_split,
        "samples": horizon.samples,
        "steps": horizon.total_steps,
        "global_batch_size": horizon.global_batch_size,
    }
    encoder = fetch_encoder(first)
    hub.save_pretrained(model, config.run_dir / "export", config=config, text_encoder_folder=encoder, card=card)


def _sources(inputs: Inputs) -> str:
    return " + ".join(dict.fromkeys(folder.source for folder in inputs.folders))


def _with_operands(config: RunConfig) -> RunConfig:
    """objective.operands with `auto` resolved: float16 where that is faster and the run does not insist on float32.

    Raises ValueError for an objective.backend that this device has not, before anything is opened.
    """
    try:
        choose_backend(config.objective.backend, training_device(), samples=1)
    except ValueError as error:
        raise ValueError(f"objective.{error}") from None
    if config.objective.operands != "auto":
        return config
    half = training_device().type == "cuda" and config.train.precision != "fp32"
    objective = config.objective.model_copy(update={"operands": "fp16" if half else "fp32"})
    return config.model_copy(update={"objective": objective})


def _open_inputs(config: RunConfig) -> Inputs:
    folders = open_train_folders(config.data)
    if config.data.val_split and config.train.eval_every:
        _check_val_split(config, folders)
    info = text_info(folders[0])
    global_batch_size = config.train.micro_batch_size * world().size
    plan = build_train_plan(config.data, folders, seed=config.seed, global_batch_size=global_batch_size)
    total = plan.steps_per_epoch * config.train.epochs
    total = min(total, config.train.max_steps or total)
    horizon = Horizon(plan.samples, global_batch_size, plan.steps_per_epoch, total)
    return Inputs(folders, info["encoder"], info["width"], horizon, batch_norm_policy(config.train, training_device()))


def _check_val_split(config: RunConfig, folders: list[ShardIndex]) -> None:
    splits = sorted({split for folder in folders for split in folder.splits})
    if config.data.val_split not in splits:
        where = ", ".join(part.shards for part in config.data.shards)
        raise ValueError(
            f"data.val_split = {config.data.val_split!r}: '{where}' has {', '.join(splits)}; name one of "
            "them, or train without validation: --set data.val_split="
        )


def _build_model(config: RunConfig, inputs: Inputs) -> ImitateModel:
    torch.manual_seed(config.seed)
    model = _model(config, inputs)
    return synchronise_batch_norm(model) if inputs.batch_norm == "sync" else model


def _model(config: RunConfig, inputs: Inputs) -> ImitateModel:
    size, temperature = config.data.input_size, config.objective.temperature
    return ImitateModel(config.model, inputs.text_width, input_size=size, temperature=temperature)


def _open_run(config: RunConfig, inputs: Inputs) -> Path | None:
    """The checkpoint to resume from, if any; the same answer, or refusal, on all ranks."""
    _check_ranks_agree(config, inputs)
    folder = config.run_dir / "checkpoints"
    problem: str | None = None
    if world().is_main and not config.train.resume and any(folder.glob("step-*")):
        problem = (
            f"name = {config.name!r}: {config.run_dir} already holds checkpoints; go on with "
            "--set train.resume=true, or choose another name"
        )
    if problem := broadcast_object(problem):
        raise ValueError(problem)
    checkpoint = find_checkpoint(folder) if config.train.resume else None
    if checkpoint:
        _check_same_run(_identity(config, inputs), read_state(checkpoint)["identity"], checkpoint)
    return checkpoint


def _check_ranks_agree(config: RunConfig, inputs: Inputs) -> None:
    """Raise the same ValueError on every rank where one was given another run: they would wait for each other for ever."""
    settings = _flat(json.loads(config.model_dump_json())) | _identity(config, inputs)
    first, *others = gather_objects({key: value for key, value in settings.items() if key not in RANKS_OWN})
    for rank, other in enumerate(others, start=1):
        for key in first:
            if other[key] != first[key]:
                raise ValueError(
                    f"{key} = {other[key]!r} on rank {rank}: must be {first[key]!r}, as on rank 0; start every rank with "
                    "the same run file, overrides and shards"
                )


def _identity(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """What must be the same when a run goes on, as JSON values."""
    settings = _flat(json.loads(config.model_dump_json()))
    fixed = {key: value for key, value in settings.items() if key not in FREE_SETTINGS}
    data = {
        "shards": " ".join(folder.build_id for folder in inputs.folders),
        "weights of shards": [part.weight for part in config.data.shards],
        "version of the plan": PLAN,
        "text encoder": inputs.text_encoder,
    }
    return {**fixed, **data, "ranks": world().size}


def _check_same_run(now: dict[str, Any], then: dict[str, Any], checkpoint: Path) -> None:
    for key in now:
        if now[key] != then.get(key):
            raise ValueError(
                f"{key} = {now[key]!r}: {checkpoint.name} was made with {then.get(key)!r}, and a run goes on as it "
                "began; set it back, or choose another name"
            )


def _saves_at(done: int, config: RunConfig, horizon: Horizon) -> bool:
    return done == horizon.total_steps or done % (config.train.save_every or horizon.steps_per_epoch) == 0


def _validates_at(done: int, config: RunConfig, horizon: Horizon) -> bool:
    """At the end of every eval_every-th epoch and of the run."""
    if not config.data.val_split or not config.train.eval_every:
        return False
    epochs, rest = divmod(done, horizon.steps_per_epoch)
    return done == horizon.total_steps or (rest == 0 and epochs % config.train.eval_every == 0)


def _pause(
    engine: Any, config: RunConfig, inputs: Inputs, monitor: Monitor, metrics: dict[str, float], done: int
) -> None:
    """Validate and save, where `done` steps are the time for it."""
    average_batch_norm_statistics(engine.module)
    if _validates_at(done, config, inputs.horizon):
        metrics.update(validate(engine, config, inputs.folders, inputs.text_encoder))
        monitor.scalars(done, metrics, split="val")
        monitor.say(f"step {done}: " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items() if k.endswith("R@5")))
        set_training_mode(engine.module, inputs.batch_norm)
    if _saves_at(done, config, inputs.horizon):
        seen = done * inputs.horizon.global_batch_size
        state = {"step": done, "samples_seen": seen, "identity": _identity(config, inputs)}
        save_checkpoint(engine, config.run_dir / "checkpoints", done, state, keep_last=config.train.keep_last)


def _step(engine: Any, config: RunConfig, views: TrainViews, batch: Batch) -> StepOutput:
    """Forward and backward of one step, and how well the micro-batch retrieves itself."""
    if batch.draws is not None:
        batch = batch._replace(images=views(batch.images[:, 0], batch.draws), draws=None)
    features, losses = _forward_and_backward(engine, config, batch)
    scalars = {"loss": losses.total, **{k: v for k, v in losses._asdict().items() if k != "total"}}
    learned, constant = features.temperature, losses.total.new_full((), config.objective.temperature.init)
    scalars["temperature"] = constant if learned is None else learned.squeeze()
    similarity = _similarities(features)
    for level, matrix in similarity.items():
        hits = matrix.argmax(dim=1) == torch.arange(len(matrix), device=matrix.device)
        scalars[f"in_batch_accuracy/{level}"] = hits.float().mean()
    scalars = {name: value.detach() for name, value in scalars.items()}
    return StepOutput(scalars["loss"], scalars, partial(_pictures, batch, similarity))


def _forward_and_backward(engine: Any, config: RunConfig, batch: Batch) -> tuple[Features, Losses]:
    """The whole batch at once, or in chunks (train.grad_cache_chunk) to the same loss."""
    texts = exchange_texts(batch, config.objective)  # on their way while the encoder runs

    def loss_of(features: Features) -> tuple[Tensor, Losses]:
        losses = imitate_loss(features, batch, config.objective, texts)
        return losses.total, losses

    chunks = batch.split(config.train.grad_cache_chunk or len(batch.keys))
    if len(chunks) > 1:
        return backward_in_chunks(engine, chunks, Features.join, loss_of)
    features = engine(batch)
    total, losses = loss_of(features)
    engine.backward(total)
    return features, losses


def _similarities(features: Features) -> dict[str, Tensor]:
    """Cosine of every image (first view) with every text of the micro-batch, by level, [B, B]."""
    pairs = {"impression": (features.image_impression, features.text_impression)}
    if features.image_findings is not None:
        pairs["findings"] = (features.image_findings, features.text_findings)
    return {level: image[:, 0].detach() @ text.detach().T for level, (image, text) in pairs.items()}


def _pictures(batch: Batch, similarity: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Similarity matrices, and the two views of the first eight studies one above the other."""
    pictures = {f"similarity/{level}": (matrix[None] + 1) / 2 for level, matrix in similarity.items()}
    views = batch.images[:8]  # [8, V, 1, H, W]
    pictures["views"] = torch.cat([torch.cat(list(study), dim=-2) for study in views], dim=-1)
    return pictures


def _describe(config: RunConfig, inputs: Inputs, start_step: int) -> str:
    horizon = inputs.horizon
    kind = " (synthetic)" if all(folder.synthetic for folder in inputs.folders) else ""
    start = f", resuming at step {start_step}" if start_step else ""
    return (
        f"{config.name}: {horizon.samples} studies of {_sources(inputs)}{kind}, {config.model.image_encoder}, "
        f"{world().size} rank(s) x {config.train.micro_batch_size} = batch {horizon.global_batch_size}, "
        f"{horizon.total_steps} steps of {config.train.epochs} epoch(s){start}"
    )


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".tmp")
    partial_path.write_text(text)
    partial_path.rename(path)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def main(arguments: list[str] | None = None) -> None:
    """Entrance of every rank. What is wrong with the input is one clear message and status 2; a bug is a traceback.

    Either way the process ends at once: a rank that lingers would leave the others waiting in a collective.
    """
    parser = argparse.ArgumentParser(prog="imitate_ds.pretrain", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="run file (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    given = parser.parse_args(arguments)
    rank, status = os.environ.get("RANK", "0"), 1
    try:
        pretrain(load_run_config(given.config, given.set))
        status = 0
    except (ValueError, OSError, FloatingPointError) as error:
        if type(error) in _EXPECTED and not os.environ.get("IMITATE_DS_TRACEBACK"):
            status = 2
            print(f"imitate_ds.pretrain: rank {rank}: {error}\n(IMITATE_DS_TRACEBACK=1 shows where)", file=sys.stderr)
        else:
            raise
    finally:
        if status == 1:
            traceback.print_exc()
        leave_world(status)


# Raised by ourselves at the door and in the loop; their subclasses come from libraries, and get their traceback.
_EXPECTED = {ValueError, FileNotFoundError, FileExistsError, PermissionError, OSError, FloatingPointError}


if __name__ == "__main__":
    main()
