"""Pre-training, the main entrance: `deepspeed --module imitate_ds.pretrain --config RUN.yaml [--set key=value ...]`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from imitate_ds.batch import Batch
from imitate_ds.config import RunConfig, load_run_config
from imitate_ds.data.loader import Tokenize, TrainBatches, build_train_loader
from imitate_ds.data.shard_plan import rank_rows
from imitate_ds.data.transforms import VIEWS, TrainViews
from imitate_ds.distributed import world
from imitate_ds.evaluation.validation import validate
from imitate_ds.objective import loss_flops
from imitate_ds.recipe import (
    Inputs,
    build_model,
    export,
    open_inputs,
    rate_share,
    run_identity,
    sources_of,
    train_step,
    with_operands,
)
from imitate_ds.training.course import Plan, take_course
from imitate_ds.training.drain import Drain
from imitate_ds.training.entrance import run_entrance
from imitate_ds.training.loop import StepOutput
from imitate_ds.training.schedule import learning_rate, restart_period


def pretrain(config: RunConfig, drain: Drain | None = None) -> dict[str, float]:
    """Train, validate, save and export as the run file says; returns the last validation metrics.

    Everything of the run lies in config.run_dir: config.yaml, state.json, checkpoints/, tensorboard/, metrics.jsonl, export/.
    Where a rank was asked to end (drain), all stop after the same step, with a checkpoint of it and nothing exported.
    """
    return take_course(config, open_plan, drain)


def open_plan(config: RunConfig, checkpoint: Path | None) -> "Pretraining":
    """Raises ValueError or FileNotFoundError naming the setting. A collective."""
    config = with_operands(config)
    inputs = open_inputs(config, checkpoint)
    temperature = config.objective.temperature
    return Pretraining(
        config=config,
        inputs=inputs,
        horizon=inputs.horizon,
        batch_norm=inputs.batch_norm,
        nodes=inputs.nodes,
        validates=bool(config.data.val_split),
        best_metric=config.train.best_metric,
        lowest_temperature=temperature.min if temperature.learnable else 0.0,
    )


@dataclass(frozen=True, kw_only=True)
class Pretraining(Plan):
    config: RunConfig
    inputs: Inputs

    def identity(self) -> dict[str, Any]:
        return run_identity(self.config, self.inputs)

    def describe(self) -> str:
        config, horizon = self.config, self.horizon
        kind = " (synthetic)" if all(folder.synthetic for folder in self.inputs.folders) else ""
        return (
            f"{config.name}: {horizon.samples} studies of {sources_of(self.inputs)}{kind}, {config.model.image_encoder}, "
            f"{world().size} rank(s) on {self.nodes} node(s), batch {horizon.global_batch_size}, "
            f"{horizon.total_steps} steps of {config.train.epochs} epoch(s)"
        )

    def build_model(self) -> nn.Module:
        return build_model(self.config, self.inputs)

    @cached_property
    def rate_share(self) -> Callable[[str], float]:  # type: ignore[override]
        return rate_share(self.config)

    def batches(self, start_step: int) -> TrainBatches:
        here, horizon = world(), self.horizon
        return build_train_loader(
            self.config,
            rank=here.rank,
            world_size=here.size,
            start_step=start_step,
            stop_step=horizon.total_steps,
            global_batch_size=horizon.global_batch_size,
            folders=self.inputs.folders,
            record=self.config.run_dir / f"skipped.rank{here.rank}.jsonl",
            tokenize=self.tokenize,
        )

    def step(self, engine: Any, batch: Batch) -> StepOutput:
        return train_step(engine, self.config, self._views, batch)

    @property
    def tokenize(self) -> Tokenize | None:
        return self.inputs.online.tokenize if self.inputs.online else None

    @cached_property
    def _views(self) -> TrainViews:
        return TrainViews(self.config.data.augment, self.config.data.input_size)

    def loss_flops(self) -> float:
        objective, compared = self.config.objective, self.horizon.global_batch_size
        if objective.negatives.scope == "local":
            compared //= world().size
        joint, text = self.config.model.joint_dim, self.inputs.text_width
        return loss_flops(objective, compared=compared, views=VIEWS, joint=joint, text=text)

    def learning_rate(self, step: int) -> float:
        horizon, optim = self.horizon, self.config.optim
        period = restart_period(horizon.samples, horizon.global_batch_size, optim.restart_epochs)
        return learning_rate(step, horizon.total_steps, optim, period=period)

    def validate(self, engine: Any, stop: Callable[[], bool]) -> dict[str, float] | None:
        rows = len(rank_rows(self.horizon.global_batch_size, 0, world().size))
        return validate(
            engine,
            self.config,
            self.inputs.folders,
            self.inputs.text_encoder,
            batch_size=rows,
            tokenize=self.tokenize,
            stop=stop,
        )

    def finish(self, engine: Any, checkpoints: Path) -> dict[str, float]:
        export(engine, self.config, self.inputs)
        return {}


def main(arguments: list[str] | None = None) -> None:
    run_entrance("pretrain", __doc__, load_run_config, pretrain, arguments)


if __name__ == "__main__":
    main()
