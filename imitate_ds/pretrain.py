"""Pre-training, the main entrance: `deepspeed --module imitate_ds.pretrain --config RUN.yaml [--set key=value ...]`."""

import argparse
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imitate_ds import hub
from imitate_ds.batch import Batch, Features
from imitate_ds.config import RunConfig, dump_run_config, load_run_config
from imitate_ds.data.loader import build_eval_loader, build_train_loader, build_train_plan
from imitate_ds.data.shards import ShardIndex, load_index
from imitate_ds.data.text_cache import text_width
from imitate_ds.distributed import broadcast_object, gather_rows, init_world, leave_world, training_device, world
from imitate_ds.metrics import recall_at_k
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.objective import imitate_loss
from imitate_ds.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from imitate_ds.training.engine import (
    average_batch_norm_statistics,
    batch_norm_policy,
    build_engine,
    full_state_dict,
    set_training_mode,
)
from imitate_ds.training.loop import LoopSettings, StepOutput, train_steps
from imitate_ds.training.monitor import Monitor
from imitate_ds.training.schedule import learning_rate, restart_period


class Horizon(NamedTuple):
    """How long a run is, in optimizer steps."""

    samples: int
    global_batch_size: int
    steps_per_epoch: int
    total_steps: int


def pretrain(config: RunConfig) -> dict[str, float]:
    """Train, validate, save and export as the run file says; returns the last validation metrics.

    Everything of the run lies in config.run_dir: config.yaml, checkpoints/, tensorboard/, metrics.jsonl, export/.
    """
    here = init_world()
    index = load_index(config.data.shards)
    horizon = plan_horizon(config, index)
    checkpoint = _open_run(config)

    torch.manual_seed(config.seed)
    model = ImitateModel(config.model, text_width(config.data.shards), input_size=config.data.input_size)
    engine = build_engine(model, config.train, config.optim)
    start_step = load_checkpoint(engine, checkpoint)["step"] if checkpoint else 0

    monitor = Monitor(config.run_dir, start_step=start_step, total_steps=horizon.total_steps, speaks=here.is_main)
    monitor.say(_describe(config, horizon, index, start_step))
    metrics: dict[str, float] = {}
    policy = batch_norm_policy(config.train, training_device())

    def after_step(done: int) -> None:
        last = done == horizon.total_steps
        saves = last or done % (config.train.save_every or horizon.steps_per_epoch) == 0
        validates = bool(config.data.val_split) and _validation_is_due(done, horizon, config.train.eval_every)
        if validates or saves:
            average_batch_norm_statistics(engine.module)
        if validates:
            metrics.update(validate(engine, config, index))
            monitor.scalars(done, metrics, split="val")
            monitor.say(f"step {done}: " + "  ".join(f"val {k} {v:.3f}" for k, v in metrics.items()))
            set_training_mode(engine.module, policy)
        if saves:
            state = {"step": done, "samples_seen": done * horizon.global_batch_size}
            save_checkpoint(engine, config.run_dir / "checkpoints", done, state, keep_last=config.train.keep_last)

    batches = build_train_loader(
        config, rank=here.rank, world_size=here.size, start_step=start_step, stop_step=horizon.total_steps
    )
    period = restart_period(horizon.samples, horizon.global_batch_size, config.optim.restart_epochs)
    settings = LoopSettings(
        seed=config.seed,
        total_steps=horizon.total_steps,
        batch_norm=policy,
        log_every=config.train.log_every,
        images_every=config.train.images_every,
    )
    rate = partial(learning_rate, total_steps=horizon.total_steps, optim=config.optim, period=period)
    try:
        train_steps(engine, batches, partial(_step, engine, config), rate, monitor, settings, after_step)
        export(engine, config, index, horizon)
        monitor.hyperparameters(_flat(config.model_dump(mode="json")), metrics)
        monitor.say(f"export: {config.run_dir / 'export'}")
    finally:
        monitor.close()
    return metrics


def plan_horizon(config: RunConfig, index: ShardIndex) -> Horizon:
    """Steps of an epoch and of the run; the last incomplete batch of an epoch is left out."""
    plan = build_train_plan(config, index, world_size=world().size)
    per_epoch = plan.steps_per_epoch
    total = per_epoch * config.train.epochs
    if config.train.max_steps:
        total = min(total, config.train.max_steps)
    return Horizon(plan.samples, config.train.micro_batch_size * world().size, per_epoch, total)


@torch.no_grad()
def validate(engine: Any, config: RunConfig, index: ShardIndex) -> dict[str, float]:
    """Retrieval on the validation split at both levels, duplicate texts grouped; the same on any number of ranks."""
    here = world()
    engine.module.eval()
    parts: dict[str, list[Tensor]] = {}
    keys: list[Tensor] = []
    loader = build_eval_loader(
        index,
        config.data.val_split,
        input_size=config.data.input_size,
        batch_size=config.train.micro_batch_size,
        workers=config.data.workers,
        impression_text=config.data.impression_text,
        rank=here.rank,
        world_size=here.size,
    )
    for batch in loader:
        features: Features = engine(batch.to(training_device()))
        rows = {
            "impression": (
                features.image_impression[:, 0],
                features.text_impression,
                batch.impression,
                batch.has_impression,
            ),
        }
        if features.image_findings is not None:
            rows["findings"] = (
                features.image_findings[:, 0],
                features.text_findings,
                batch.findings,
                batch.has_findings,
            )
        for level, tensors in rows.items():
            for name, tensor in zip(("image", "text", "prior", "valid"), tensors, strict=True):
                parts.setdefault(f"{level}/{name}", []).append(gather_rows(tensor.to(training_device())).cpu())
        keys.append(gather_rows(_key_numbers(batch.keys).to(training_device())).cpu())
    first = _first_of_each(torch.cat(keys))
    whole = {name: torch.cat(tensors)[first] for name, tensors in parts.items()}
    metrics: dict[str, float] = {}
    for level in sorted({name.split("/")[0] for name in whole}):
        valid = whole[f"{level}/valid"]
        image, text, prior = (whole[f"{level}/{name}"][valid].float() for name in ("image", "text", "prior"))
        _, groups = prior.unique(dim=0, return_inverse=True)  # equal texts have equal frozen embeddings
        similarity = image @ text.T
        for k in (1, 5, 10):
            metrics[f"{level}/image_to_text_R@{k}"] = recall_at_k(similarity, groups, groups, k=k)
            metrics[f"{level}/text_to_image_R@{k}"] = recall_at_k(similarity.T, groups, groups, k=k)
    return metrics


def _retrieval_rows(features: Features, batch: Batch) -> dict[str, Tensor]:
    """level/{image, text, prior, valid} -> rows [B, ...] of one validation batch."""
    image, text = features.image_impression[:, 0], features.text_impression
    rows = {"image": image, "text": text, "prior": batch.impression, "valid": batch.has_impression}
    named = {f"impression/{name}": tensor for name, tensor in rows.items()}
    if features.image_findings is not None:
        image, text = features.image_findings[:, 0], features.text_findings
        rows = {"image": image, "text": text, "prior": batch.findings, "valid": batch.has_findings}
        named |= {f"findings/{name}": tensor for name, tensor in rows.items()}
    return named


def export(engine: Any, config: RunConfig, index: ShardIndex, horizon: Horizon) -> None:
    """Write run_dir/export: weights and configuration that `imitate_ds.load_model` reads. A collective."""
    average_batch_norm_statistics(engine.module)
    state = full_state_dict(engine)
    if world().is_main:
        empty = config.model.model_copy(update={"weights": "none"})  # all of them are in `state`
        model = ImitateModel(empty, text_width(config.data.shards), input_size=config.data.input_size)
        model.load_state_dict(state)
        card = {
            "data": index.source,
            "synthetic": index.synthetic,
            "samples": horizon.samples,
            "steps": horizon.total_steps,
            "global_batch_size": horizon.global_batch_size,
            "image_size": index.image_size,
        }
        encoder = config.data.shards / "text_encoder"
        hub.save_pretrained(model, config.run_dir / "export", config=config, text_encoder_folder=encoder, card=card)


def _validation_is_due(done: int, horizon: Horizon, every: int) -> bool:
    """At the end of every `every`-th epoch and of the run; 0: never."""
    epochs, rest = divmod(done, horizon.steps_per_epoch)
    return every > 0 and (done == horizon.total_steps or (rest == 0 and epochs % every == 0))


def _step(engine: Any, config: RunConfig, batch: Batch) -> StepOutput:
    """Forward of one step: features, losses, and how well the micro-batch retrieves itself."""
    features: Features = engine(batch)
    losses = imitate_loss(features, batch, config.objective)
    scalars = {"loss": losses.total, **{k: v for k, v in losses._asdict().items() if k != "total"}}
    scalars["temperature"] = losses.total.new_tensor(config.objective.temperature)
    similarity = _similarities(features)
    for level, matrix in similarity.items():
        hits = matrix.argmax(dim=1) == torch.arange(len(matrix), device=matrix.device)
        scalars[f"in_batch_accuracy/{level}"] = hits.float().mean()
    return StepOutput(losses.total, {k: v.detach() for k, v in scalars.items()}, partial(_pictures, batch, similarity))


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


def _open_run(config: RunConfig) -> Path | None:
    """Make the run folder; the checkpoint to resume from, if any. The same answer on all ranks."""
    problem: str | None = None
    if world().is_main:
        has_checkpoints = any((config.run_dir / "checkpoints").glob("step-*"))
        if has_checkpoints and not config.train.resume:
            problem = (
                f"name = {config.name!r}: {config.run_dir} already holds checkpoints; go on with "
                "--set train.resume=true, or choose another name"
            )
        else:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            (config.run_dir / "config.yaml").write_text(dump_run_config(config))
    problem = broadcast_object(problem)  # type: ignore[assignment]
    if problem:
        raise ValueError(problem)
    return find_checkpoint(config.run_dir / "checkpoints") if config.train.resume else None


def _describe(config: RunConfig, horizon: Horizon, index: ShardIndex, start_step: int) -> str:
    kind = " (synthetic)" if index.synthetic else ""
    start = f", resuming at step {start_step}" if start_step else ""
    return (
        f"{config.name}: {horizon.samples} studies of {index.source}{kind}, {config.model.image_encoder}, "
        f"{world().size} rank(s) x {config.train.micro_batch_size} = batch {horizon.global_batch_size}, "
        f"{horizon.total_steps} steps of {config.train.epochs} epoch(s){start}"
    )


def _key_numbers(keys: list[str]) -> Tensor:
    """Keys are 16 hexadecimal digits: one signed 64-bit integer each, so that they can be gathered."""
    return torch.tensor([int(key, 16) - 2**63 for key in keys], dtype=torch.int64)


def _first_of_each(values: Tensor) -> Tensor:
    """Positions of the first occurrence of every value, ordered by value."""
    unique, inverse = values.unique(return_inverse=True)
    first = torch.full_like(unique, len(values))
    return first.scatter_reduce_(0, inverse, torch.arange(len(values)), reduce="amin")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def main(arguments: list[str] | None = None) -> None:
    """Entrance of every rank. Bad input ends with one clear message and status 2."""
    parser = argparse.ArgumentParser(prog="imitate_ds.pretrain", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="run file (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    given = parser.parse_args(arguments)
    try:
        pretrain(load_run_config(given.config, given.set))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if os.environ.get("IMITATE_DS_TRACEBACK"):
            raise
        here = world()
        print(f"imitate_ds.pretrain: rank {here.rank}: {error}\n(IMITATE_DS_TRACEBACK=1 shows where)", file=sys.stderr)
        leave_world(2)
    leave_world()


if __name__ == "__main__":
    main()
