"""The run file of fine-tuning: which encoder, which task, on which labelled shards. Every setting is a documented field."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from imitate_ds.config import Location, ModelConfig, Names, OptimConfig, TrainConfig
from imitate_ds.run_file import Folder, Section, check_settings, read_settings

Uncertain = Literal["ignore", "ones", "zeros"]

HEADS = {
    "classification": ("linear", "mlp"),
    "segmentation": ("unet", "fpn"),
    "detection": ("retinanet", "fcos", "yolov3"),
}
# of validation, more is better; by it the best checkpoint is chosen, and patience ends
METRICS = {"classification": "auroc_macro", "segmentation": "dice_macro", "detection": "ap_macro"}


class EncoderConfig(Section):
    """Where the encoder comes from, and how much of it learns."""

    init: str = ""  # an export of a pre-training run, or a model id at the hub; "" takes `model` and its weights
    model: ModelConfig | None = None  # without init: image_encoder, weights (none, timm or a file), ...
    # frozen: evaluation mode, no statistics move, nothing reaches the optimizer. last_n: so many of the last levels learn.
    # lora: low-rank updates of its linear layers and convolutions. full: all of it learns.
    train: Literal["frozen", "last_n", "lora", "full"] = "frozen"
    last_n: int = Field(default=1, ge=1)  # levels, from the last
    lora_rank: int = Field(default=8, ge=1)
    lr_share: float = Field(default=0.1, gt=0)  # of optim.lr, for the last level of the encoder (lora: for all updates)
    layer_decay: float = Field(default=0.75, gt=0, le=1)  # and so much less for each level before it

    @model_validator(mode="after")
    def _one_origin(self) -> "EncoderConfig":
        if bool(self.init) == (self.model is not None):
            raise ValueError(
                "must have init (an export folder) or model (a timm backbone), one of them; "
                "model: {image_encoder: resnet50, weights: none} is random initialisation"
            )
        if self.model and self.model.freeze:
            raise ValueError(
                f"model.freeze = {list(self.model.freeze)}: is for pre-training; must be [] here, where train says what learns"
            )
        return self


class LabeledAugmentConfig(Section):
    """What happens to a training image, its masks and its boxes alike."""

    rotation: float = Field(default=5.0, ge=0, le=180)  # degrees, both ways; a rotated box is the box around it
    translation: float = Field(default=0.05, ge=0, le=1)  # share of the side
    scale: float = Field(default=0.1, ge=0, lt=1)  # 1 - scale .. 1 + scale
    horizontal_flip: float = Field(default=0.0, ge=0, le=1)  # the heart is on the left, so off by default
    brightness: float = Field(default=0.1, ge=0, le=1)
    contrast: float = Field(default=0.1, ge=0, le=1)


class LabeledDataConfig(Section):
    shards: Location  # a folder, or a URL, made by `imitate-ds shards build`; no text embeddings are needed
    train_split: str = "train"
    val_split: str = "val"  # chooses the checkpoint; "": the last one is taken
    test_split: str = "test"  # measured once, at the end; "": not at all
    # Lists of samples, by `imitate-ds splits make`: of a split only those on its list; "": all of it
    train_list: str = ""
    val_list: str = ""
    test_list: str = ""
    input_size: int = Field(default=0, ge=0)  # pixels the encoder sees; 0: as it was pre-trained
    workers: int = Field(default=2, ge=0)  # reading processes per rank
    # What an uncertain label (-1) counts as: for all labels, or by name. As MGCA: {Atelectasis: ones, ...}
    uncertain: Uncertain | dict[str, Uncertain] = "ignore"
    # A label that a study does not say anything about: left out, or absent. CheXpert's protocol: zeros
    blank: Literal["ignore", "zeros"] = "ignore"
    augment: LabeledAugmentConfig = LabeledAugmentConfig()


class TaskConfig(Section):
    kind: Literal["classification", "segmentation", "detection"]
    targets: Names = ()  # names of labels, of masks, or of the objects in boxes; (): all that the shards have
    exclusive: bool = False  # classification: of the targets one holds, as in normal / bacterial / viral
    head: str = ""  # "": linear, unet, retinanet
    hidden: int = Field(default=512, ge=1)  # width of the mlp

    @model_validator(mode="after")
    def _head_of_kind(self) -> "TaskConfig":
        if self.head and self.head not in HEADS[self.kind]:
            raise ValueError(
                f"head = {self.head!r}: must be one of {', '.join(HEADS[self.kind])} for {self.kind}, or be left out"
            )
        if self.exclusive and self.kind != "classification":
            raise ValueError(f"exclusive = True: is for classification; {self.kind} must do without")
        return self

    @property
    def head_name(self) -> str:
        return self.head or HEADS[self.kind][0]

    @property
    def metric(self) -> str:
        return METRICS[self.kind]


class FinetuneTrainConfig(TrainConfig):
    """As in pre-training; patience besides."""

    epochs: int = Field(default=50, ge=0)
    micro_batch_size: int = Field(default=48, ge=2)
    keep_best: int = Field(default=1, ge=0)  # the best is scored and exported; 0: the last is
    best_metric: str = ""  # that of the task
    patience: int = Field(default=10, ge=0)  # validations without a better one, after which training ends; 0: never


class FinetuneConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output_dir: Folder = Path("runs")  # the run lives in output_dir/name
    share: Literal["private", "group"] = "private"  # who else may read what the run writes
    seed: int = Field(default=42, ge=0, lt=2**32)
    # strict: every image is scored, no patient on both sides, 95 % intervals by patient. reference: as papers did.
    protocol: Literal["strict", "reference"] = "strict"
    encoder: EncoderConfig
    data: LabeledDataConfig
    task: TaskConfig
    optim: OptimConfig = OptimConfig(lr=5e-4, weight_decay=1e-6)
    train: FinetuneTrainConfig = FinetuneTrainConfig()
    # How many test samples, the worst first, are drawn with true and predicted outlines or boxes into RUN/overlays/KEY.png.
    # These are patient data: nobody but the owner may look into that folder. 0: none.
    report_images: int = Field(default=0, ge=0)

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name

    @model_validator(mode="after")
    def _sections_agree(self) -> "FinetuneConfig":
        if self.train.grad_cache_chunk:
            raise ValueError(
                f"train.grad_cache_chunk = {self.train.grad_cache_chunk}: is for contrastive pre-training; must be 0"
            )
        if self.train.compile:
            raise ValueError(f"train.compile = {list(self.train.compile)}: is for contrastive pre-training; must be []")
        if self.train.fp8:
            raise ValueError("train.fp8 = True: is for contrastive pre-training; must be false")
        if self.optim.layer_decay < 1:
            raise ValueError(
                f"optim.layer_decay = {self.optim.layer_decay}: is for pre-training; must be 1 here, where encoder.layer_decay "
                "says it by level"
            )
        if self.train.keep_best and not (self.data.val_split and self.train.eval_every):
            raise ValueError(
                f"train.keep_best = {self.train.keep_best}: needs validation; set data.val_split and train.eval_every, or "
                "train.keep_best: 0 and train.patience: 0"
            )
        if self.report_images and (self.task.kind == "classification" or not self.data.test_split):
            raise ValueError(
                f"report_images = {self.report_images}: draws masks or boxes of the test split; must be 0 for classification, "
                "and without data.test_split"
            )
        return self


def load_finetune_config(path: Path, overrides: list[str] | None = None) -> FinetuneConfig:
    """Read a run file, lay `key.sub=value` overrides over it, and check every setting.

    Raises FileNotFoundError or ValueError naming the key, the value and the rule.
    """
    return build_finetune_config(read_settings(path, overrides))


def build_finetune_config(values: dict[str, Any]) -> FinetuneConfig:
    """Check plain values (as parsed from YAML)."""
    return check_settings(FinetuneConfig, values)
