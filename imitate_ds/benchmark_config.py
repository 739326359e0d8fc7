"""The file of a benchmark: encoders, each tuned for the same tasks, with the same budget, at several label shares and seeds."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from imitate_ds.finetune_config import EncoderConfig, FinetuneConfig, build_finetune_config
from imitate_ds.run_file import Folder, Section, check_settings, merged, read_settings

Shares = Annotated[tuple[float, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Seeds = Annotated[tuple[int, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Named = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Evaluation = Literal["retrieval", "zero-shot", "grounding"]


class BenchmarkTask(Section):
    """One row of the table for each encoder. `run` is a run file of fine-tuning, without what the benchmark says itself."""

    run: dict[str, Any]
    train: Names = ("frozen",)  # encoder.train of each row: frozen, last_n, lora, full
    shares: Shares = (1.0,)  # of the training patients (protocol reference: samples) that are labelled
    seeds: Seeds = ()  # (): those of the benchmark
    val_share: float = Field(default=0.0, ge=0, lt=1)  # taken from the training split where there is none to choose on

    @field_validator("shares")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not all(0 < share <= 1 for share in value):
            raise ValueError("must be shares, 0 < share <= 1, as in [0.01, 0.1, 1]")
        return value


class BenchmarkEvaluation(Section):
    """What `imitate-ds evaluate` measures without training, of every encoder that is an export of pre-training."""

    task: Evaluation
    shards: str = Field(min_length=1)  # a folder on this machine
    split: str = "val"
    branch: Literal["impression", "findings"] = "impression"  # of zero-shot and grounding


class BenchmarkConfig(Section):
    name: Named
    output_dir: Folder = Path("runs")  # everything of the benchmark lies in output_dir/name
    share: Literal["private", "group"] = "private"
    protocol: Literal["strict", "reference"] = "strict"
    seeds: Seeds = (0, 1, 2)  # of head, order, views and drawn labels
    encoders: dict[Named, dict[str, Any]]  # as `encoder` of a run file: {init: EXPORT}, or {model: {...}}
    tasks: dict[Named, BenchmarkTask] = Field(default_factory=dict)
    evaluations: dict[Named, BenchmarkEvaluation] = Field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.output_dir / self.name

    def run_of(self, task: str, encoder: str, train: str, seed: int, **more: Any) -> FinetuneConfig:
        """The run file of one cell of the table. Raises ValueError naming the key, below tasks.TASK.run."""
        plan = self.tasks[task]
        ours = {
            "name": task,
            "output_dir": str(self.folder / "runs"),
            "share": self.share,
            "protocol": self.protocol,
            "seed": seed,
            "encoder": {**plan.run.get("encoder", {}), **self.encoders[encoder], "train": train},
        }
        try:
            return build_finetune_config(merged(merged(plan.run, ours), more))
        except ValueError as error:
            raise ValueError(f"tasks.{task}, encoders.{encoder}: {error}") from None


def load_benchmark_config(path: Path, overrides: list[str] | None = None) -> BenchmarkConfig:
    """Read and check a benchmark file, and the run file of every cell. Raises FileNotFoundError or ValueError naming the key."""
    config = check_settings(BenchmarkConfig, read_settings(path, overrides))
    if not config.tasks and not config.evaluations:
        raise ValueError("tasks: must name at least one task, or evaluations one of them")
    for encoder, settings in config.encoders.items():
        check_settings(EncoderConfig, settings)
        for task, plan in config.tasks.items():
            for train in plan.train:
                config.run_of(task, encoder, train, seed=0)
    return config
