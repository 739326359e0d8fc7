"""Fine-tuning, an entrance: `deepspeed --module imitate_ds.finetune --config RUN.yaml [--set key=value ...]`."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imitate_ds.batch import LabeledBatch
from imitate_ds.data.labeled import (
    LabeledBatches,
    LabeledSplit,
    Order,
    build_labeled_loader,
    build_scoring_loader,
    open_labeled,
)
from imitate_ds.data.shard_index import ShardIndex, open_index
from imitate_ds.data.shard_plan import rank_rows
from imitate_ds.data.split_lists import read_split_list
from imitate_ds.distributed import (
    from_main,
    node_count,
    sum_over_ranks_keep_gradient,
    training_device,
    world,
)
from imitate_ds.evaluation.overlays import draw_overlays
from imitate_ds.evaluation.predictions import write_predictions
from imitate_ds.evaluation.report import write_result
from imitate_ds.evaluation.task_curves import WORST, Worst, task_curves, worst_samples
from imitate_ds.evaluation.task_scores import answers_of, figures_of, measure
from imitate_ds.finetune_config import FinetuneConfig, load_finetune_config
from imitate_ds.flight import flight
from imitate_ds.metrics import DRAWS, SEED, Figures
from imitate_ds.models.adaptation import TaskModel
from imitate_ds.models.image_encoder import synchronise_batch_norm
from imitate_ds.predictor import Origin, build_task_model, read_origin, save_predictor
from imitate_ds.recipe import global_batch_size, save_memory
from imitate_ds.training.batch_norm import average_batch_norm_statistics, batch_norm_policy
from imitate_ds.training.checkpoint import find_best_checkpoint, load_checkpoint
from imitate_ds.training.course import Horizon, Plan, take_course
from imitate_ds.training.drain import Drain
from imitate_ds.training.engine import full_state_dict
from imitate_ds.training.entrance import run_entrance
from imitate_ds.training.identity import identity
from imitate_ds.training.loop import StepOutput
from imitate_ds.training.schedule import learning_rate, restart_period


def finetune(config: FinetuneConfig, drain: Drain | None = None) -> dict[str, float]:
    """Train a head, and as much of the encoder as the run file says; score the test split with the best checkpoint; export.

    Returns the last figures. Beside what take_course writes there come results.json, report.html, predictions.TEST.parquet,
    export/, and with report_images overlays/.
    """
    return take_course(config, _open, drain)


def _open(config: FinetuneConfig, checkpoint: Path | None) -> "Finetuning":
    """Raises ValueError or FileNotFoundError naming the setting. A collective."""
    origin = read_origin(config.encoder)
    index = open_index(config.data.shards)
    train = _split(config, index, "train")
    if train is None:
        raise ValueError("data.train_split = '': must name the split to train on")
    val, test = (_split(config, index, part) for part in ("val", "test"))
    _check_apart(config, {"train": train, "val": val, "test": test})
    order = Order(len(train), global_batch_size(config.train, checkpoint), config.seed)
    total = order.steps_per_epoch * config.train.epochs
    horizon = Horizon(
        len(train), order.global_batch_size, order.steps_per_epoch, min(total, config.train.max_steps or total)
    )
    return Finetuning(
        config=_resolved(config, origin),
        origin=origin,
        order=order,
        train=train,
        val=val,
        test=test,
        horizon=horizon,
        batch_norm=batch_norm_policy(config.train, training_device()),
        nodes=node_count(),
        validates=val is not None,
        best_metric=config.task.metric,
        patience=config.train.patience,
    )


def _split(config: FinetuneConfig, index: ShardIndex, part: str) -> LabeledSplit | None:
    """The samples of one part of the run; None where it has none."""
    name, listed = (getattr(config.data, f"{part}_{what}") for what in ("split", "list"))
    if not name:
        return None
    try:
        split = open_labeled(index, name, config.task, config.data)
    except ValueError as error:
        raise ValueError(f"data.{part}_split = {name!r}: {error}") from None
    if not listed:
        return split
    keys = read_split_list(Path(listed), build_id=index.build_id, split=name)
    chosen = split.only(keys)
    if not len(chosen):
        raise ValueError(f"data.{part}_list = {listed!r}: none of its {len(keys)} samples is annotated for this task")
    return chosen


def _check_apart(config: FinetuneConfig, parts: dict[str, LabeledSplit | None]) -> None:
    """Raises ValueError where a sample, or under `strict` a patient, is in two parts."""
    there = {name: split for name, split in parts.items() if split is not None}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if first not in there or second not in there:
            continue
        samples = len(set(there[first].keys) & set(there[second].keys))
        patients = len(np.intersect1d(there[first].patients, there[second].patients))
        if samples or (patients and config.protocol == "strict"):
            raise ValueError(
                f"data.{first}_split, data.{second}_split: {samples} samples and {patients} patients are in both; take splits "
                "that are apart by patient, or make lists with 'imitate-ds splits make'"
                + ("" if samples else ", or ask for protocol: reference")
            )


def _resolved(config: FinetuneConfig, origin: Origin) -> FinetuneConfig:
    data = config.data.model_copy(update={"input_size": config.data.input_size or origin.input_size})
    return config.model_copy(update={"data": data})


@dataclass(frozen=True, kw_only=True)
class Finetuning(Plan):
    config: FinetuneConfig
    origin: Origin
    order: Order
    train: LabeledSplit
    val: LabeledSplit | None
    test: LabeledSplit | None

    def identity(self) -> dict[str, Any]:
        data = {
            "global batch size": self.horizon.global_batch_size,
            "shards": self.train.index.build_id,
            "targets": list(self.train.targets),
            "training samples": self.train.describe()["split_hash"],
            "encoder": _fingerprint(self.origin.weights),
        }
        return identity(self.config, data)

    def describe(self) -> str:
        config, task = self.config, self.config.task
        kind = " (synthetic)" if self.train.index.synthetic else ""
        encoder = config.encoder.init or self.origin.model.image_encoder
        passed = f", {self.train.not_annotated} more say nothing about it" if self.train.not_annotated else ""
        return (
            f"{config.name}: {task.kind} ({task.head_name}) of {', '.join(self.train.targets)}, {len(self.train)} radiographs "
            f"of {self.train.index.source}{kind}{passed}; {encoder}, {config.encoder.train}; {world().size} rank(s) on "
            f"{self.nodes} node(s), batch {self.horizon.global_batch_size}, {self.horizon.total_steps} steps of "
            f"{config.train.epochs} epoch(s)"
        )

    def build_model(self) -> nn.Module:
        torch.manual_seed(self.config.seed)
        model = self._task_model()
        if world().is_main and model.encoder.remark:
            print(model.encoder.remark, flush=True)
        save_memory(model.encoder, self.config.train)
        return synchronise_batch_norm(model) if self.batch_norm == "sync" else model

    def _task_model(self, origin: Origin | None = None) -> TaskModel:
        config, count = self.config, len(self.train.targets)
        size = config.data.input_size
        return build_task_model(origin or self.origin, config.encoder, config.task, count, input_size=size)

    def _empty_model(self) -> TaskModel:
        """The same, without looking for any weights."""
        plain = self.origin.model.model_copy(update={"weights": "none"})
        return self._task_model(self.origin._replace(model=plain, weights=None))

    @cached_property
    def rate_share(self) -> Callable[[str], float]:  # type: ignore[override]
        with torch.device("meta"):
            return self._empty_model().rate_share

    def batches(self, start_step: int) -> LabeledBatches:
        here, data = world(), self.config.data
        return build_labeled_loader(
            self.train,
            self.order,
            data.augment,
            input_size=data.input_size,
            workers=data.workers,
            seed=self.config.seed,
            rank=here.rank,
            world_size=here.size,
            steps=range(start_step, self.horizon.total_steps),
        )

    def step(self, engine: Any, batch: LabeledBatch) -> StepOutput:
        head = engine.module.head
        outputs = engine(batch)
        flight.begin("loss")
        losses = head.combine(_over_ranks(head.sums(outputs, batch)))
        flight.begin("backward")
        engine.backward(losses["loss"])
        scalars = {name: value.detach() for name, value in losses.items()}
        return StepOutput(scalars["loss"], scalars, dict)

    def learning_rate(self, step: int) -> float:
        horizon, optim = self.horizon, self.config.optim
        period = restart_period(horizon.samples, horizon.global_batch_size, optim.restart_epochs)
        return learning_rate(step, horizon.total_steps, optim, period=period)

    def validate(self, engine: Any, stop: Callable[[], bool]) -> dict[str, float] | None:
        assert self.val is not None
        answers = self._answers(engine, self.val, stop)
        if answers is None:
            return None
        figures = self._figures(self.val, answers, draws=0)
        return {name: figure["value"] for name, figure in figures.items() if figure["value"] is not None}

    def finish(self, engine: Any, checkpoints: Path) -> dict[str, float]:
        chooses = self.validates and self.config.train.keep_best
        best = find_best_checkpoint(checkpoints, self.best_metric) if chooses else None
        if chooses and best is None and world().is_main:
            print(f"no validation gave {self.best_metric}, so the last checkpoint is taken", flush=True)
        step = load_checkpoint(engine, best)["step"] if best else self.horizon.total_steps
        average_batch_norm_statistics(engine.module)
        found: Figures = {}
        if self.test is not None:
            answers = self._answers(engine, self.test, lambda: False)
            assert answers is not None
            # Every rank has all answers and measures them itself: none waits for minutes in a collective.
            found = self._figures(self.test, answers, draws=DRAWS)
            from_main(lambda: self._report(self.test, answers, found, step))  # type: ignore[arg-type]
            if self.config.report_images:
                self._draw(engine, self.test, answers)
        self._export(engine, step, found)
        return {f"test/{name}": figure["value"] for name, figure in found.items() if figure["value"] is not None}

    def _answers(self, engine: Any, split: LabeledSplit, stop: Callable[[], bool]) -> np.ndarray | None:
        engine.module.eval()
        here, data = world(), self.config.data
        batches = build_scoring_loader(
            split,
            input_size=data.input_size,
            batch_size=len(rank_rows(self.horizon.global_batch_size, 0, here.size)),
            workers=data.workers,
            rank=here.rank,
            world_size=here.size,
        )
        return answers_of(engine, engine.module.head.predict, split, batches, stop)

    def _figures(self, split: LabeledSplit, answers: np.ndarray, *, draws: int) -> Figures:
        config = self.config
        reference = self.horizon.global_batch_size if config.protocol == "reference" else 0
        measured = measure(config.task.kind, split, answers, exclusive=config.task.exclusive, reference=reference)
        return figures_of(measured, split, draws=draws)

    def _report(self, split: LabeledSplit, answers: np.ndarray, figures: Figures, step: int) -> None:
        """results.json, report.html and predictions in the folder of the run."""
        config = self.config
        flight.begin("report")
        worst = self._worst(split, answers, WORST)
        write_predictions(config.run_dir / f"predictions.{split.split}.parquet", config.task.kind, split, answers)
        settings = {
            "targets": list(split.targets),
            "train": self.train.describe(),
            "val": self.val.describe() if self.val else None,
            "step": step,
            "global_batch_size": self.horizon.global_batch_size,
            "run": config.model_dump(mode="json"),
            "bootstrap": {"draws": DRAWS, "seed": SEED, "unit": "patient", "interval": "95 % percentile"},
        }
        result = {
            "task": config.task.kind,
            "protocol": config.protocol,
            "model": {**self.origin.about, "tuned": config.encoder.train, "head": config.task.head_name},
            "data": split.describe(),
            "settings": settings,
            "metrics": figures,
            "curves": task_curves(config.task.kind, split, answers, exclusive=config.task.exclusive),
            "worst": worst._asdict(),
        }
        write_result(config.run_dir, result)

    def _worst(self, split: LabeledSplit, answers: np.ndarray, most: int) -> Worst:
        return worst_samples(self.config.task.kind, split, answers, exclusive=self.config.task.exclusive, most=most)

    def _draw(self, engine: Any, split: LabeledSplit, answers: np.ndarray) -> None:
        """The worst samples as pictures. A collective, of the same batches on all ranks."""
        config = self.config
        keys = from_main(lambda: self._worst(split, answers, config.report_images).keys)
        batches = build_scoring_loader(
            split.only(keys),
            input_size=config.data.input_size,
            batch_size=len(rank_rows(self.horizon.global_batch_size, 0, world().size)),
            workers=0,
        )
        draw_overlays(config.run_dir / "overlays", engine, engine.module.head.predict, batches)

    def _export(self, engine: Any, step: int, figures: Figures) -> None:
        state = full_state_dict(engine)
        if not world().is_main:
            return
        config, index = self.config, self.train.index
        model = self._empty_model()
        model.load_state_dict(state)
        settings = {
            "task": config.task.model_dump(mode="json"),
            "targets": list(self.train.targets),
            "model": self.origin.model.model_dump(mode="json"),
            "input_size": config.data.input_size,
            "data": index.source,
            "synthetic": index.synthetic or bool(self.origin.about.get("synthetic")),
            "build_id": index.build_id,
            "train_split": config.data.train_split,
        }
        card = {"encoder": config.encoder.init or self.origin.model.image_encoder, "tuned": config.encoder.train}
        card |= {"training samples": len(self.train), "step": step, "protocol": config.protocol}
        card |= {name: figure["value"] for name, figure in figures.items()}
        save_predictor(model, config.run_dir / "export", settings=settings, image_size=index.image_size, card=card)


def _over_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each summed over ranks, in one collective; its gradient reaches what this rank added."""
    whole = sum_over_ranks_keep_gradient(torch.cat([value.flatten() for value in sums.values()]))
    parts = whole.split([value.numel() for value in sums.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(sums.items(), parts, strict=True)}


def _fingerprint(weights: dict[str, Tensor] | None) -> str:
    if weights is None:
        return ""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def main(arguments: list[str] | None = None) -> None:
    run_entrance("finetune", __doc__, load_finetune_config, finetune, arguments)


if __name__ == "__main__":
    main()
