"""The run file of pre-training. Every setting is a documented field."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from imitate_ds.run_file import Folder, Section, check_settings, merged, read_settings

Floats = Annotated[tuple[float, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Pair = Annotated[tuple[float, float], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]

Tower = Literal["image_encoder", "findings_branch", "projections"]
Towers = Annotated[tuple[Tower, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


def _number_as(name: str) -> Callable[[Any], Any]:
    return lambda value: {name: value} if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _as_folders(value: Any) -> Any:
    """One location, or a list of {shards, weight}."""
    if isinstance(value, (str, Path)):
        value = [{"shards": str(value)}]
    return tuple(value) if isinstance(value, list) else value


def _text_as(name: str) -> Callable[[Any], Any]:
    return lambda value: {name: value} if isinstance(value, str) else value


class AugmentConfig(Section):
    """The two training views. Lengths are fractions of the input size, angles degrees."""

    crop_scale: Pair = (0.6, 1.0)  # share of the image's area a random crop keeps
    horizontal_flip: float = Field(default=0.0, ge=0, le=1)  # reports name sides, so off by default
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    rotation: float = Field(default=10.0, ge=0, le=180)
    perspective: float = Field(default=0.0, ge=0, le=1)  # distortion scale
    perspective_p: float = Field(default=0.5, ge=0, le=1)
    autocontrast: float = Field(default=0.5, ge=0, le=1)
    brightness: float = Field(default=0.2, ge=0, le=1)  # jitter; 0 switches it off
    contrast: float = Field(default=0.2, ge=0, le=1)

    @field_validator("crop_scale")
    @classmethod
    def _shares(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("must be two shares, 0 < low <= high <= 1")
        return value


def _without_secrets(value: str) -> str:
    """The run file is copied into the run's folder, TensorBoard and messages."""
    if "://" in value and re.search(r"[@?#]", value.partition("://")[2]):
        raise ValueError(
            "must be a URL without user, password, token or query; they go into ~/.netrc, or the environment of the AWS tools"
        )
    return value


# A folder of shards, or an http(s)://, s3://, ... location of one
Location = Annotated[str, Field(min_length=1), AfterValidator(_without_secrets)]


class ShardsConfig(Section):
    shards: Location
    weight: float = Field(default=1.0, gt=0, le=1000)  # passes over its training split in an epoch


class DataConfig(Section):
    # Made by `imitate-ds shards build`, with embeddings from `imitate-ds shards embed`. One location, or a mixture:
    # `shards: [{shards: shards/a}, {shards: s3://bucket/b, weight: 0.5}]`, embedded by the same text encoder.
    shards: Annotated[tuple[ShardsConfig, ...], BeforeValidator(_as_folders), Field(min_length=1)]
    train_split: str = "train"
    share: float = Field(
        default=1.0, gt=0, le=1
    )  # of the training patients, drawn by `seed`; a smaller one is in a larger
    val_split: str = "val"  # "" trains without validation
    input_size: int = Field(default=224, ge=16)  # pixels the encoder sees
    workers: int = Field(default=2, ge=0)  # decoding processes per rank; 0 decodes in the training process
    impression_text: Literal["impression", "report"] = "impression"  # what the highest level is aligned with
    apart: Literal["study", "patient"] = "study"  # no two radiographs of one study, or of one patient, meet in a batch
    max_skipped: int = Field(default=0, ge=0)  # damaged samples a rank tolerates in an epoch before the run stops
    verify: Literal["off", "sampled", "full"] = (
        "full"  # radiographs compared with their checksums: none, every 16th, all
    )
    augment_on: Literal["worker", "device"] = "worker"  # who makes the views; device: for GPUs that starve
    cache_dir: str = ""  # where remote shards are kept; "": $IMITATE_DS_CACHE, or ~/.cache/imitate_ds
    cache_gib: float = Field(default=100.0, gt=0)  # of a machine, and of each remote folder
    augment: AugmentConfig = AugmentConfig()


def _as_layers(value: Any) -> Any:
    """A number of layers, or all of them."""
    if value != "all" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError("must be a number of layers, 0 or more, or all")
    return value


class TextConfig(Section):
    """The text encoder in training. Whatever learns, the clinical prior (soft targets) is of the embeddings in the shards,
    those of a frozen encoder: targets that drifted with what is trained on them would agree with anything.
    """

    # cached: texts are the embeddings in the shards, and the encoder never runs. online: it runs in every step, and learns.
    mode: Literal["cached", "online"] = "cached"
    encoder: str = ""  # a Hugging Face encoder, a folder or a name at the hub; "": the one that embedded the shards
    # How many of its transformer layers learn, from the last; 0: none, its embeddings are computed anew in every step;
    # all: those, and what lies below and above them.
    trainable_layers: Annotated[int | Literal["all"], BeforeValidator(_as_layers)] = "all"
    max_tokens: int = Field(default=0, ge=0)  # that are read of a section; 0: as many as its folder says, or 256
    lr_share: float = Field(default=0.1, gt=0)  # of optim.lr, for what learns of it

    @field_validator("max_tokens")
    @classmethod
    def _room_for_a_word(cls, value: int) -> int:
        if 0 < value < 3:
            raise ValueError("must be 0, or at least 3: a word between two marks")
        return value


class AggregationConfig(Section):
    """The hierarchical aggregation block: channels of every level become tokens (method.md, section 2)."""

    enabled: bool = True  # False: no findings branch at all
    keep: Floats = (0.25, 0.15, 0.10, 0.10)  # share of each level's channels kept, one number per level
    pool: int = Field(default=16, ge=1)  # a kept channel is pooled to pool x pool; a token is pool^2 wide
    heads: int = Field(default=4, ge=1)
    slots: int = Field(default=512, ge=1)  # learned positions for tokens, besides the one of the CLS token
    with_replacement: bool = False  # as published: True
    mask_padding: bool = True  # False attends to the zero tokens that fill up to `slots`, as published
    eval_draws: int = Field(default=4, ge=1)  # fixed channel draws whose embeddings are averaged outside training


class ModelConfig(Section):
    image_encoder: str = "resnet50"  # any timm backbone with features_only
    weights: str = "none"  # "none", "timm" (downloads), or a local file
    in_chans: Literal[1, 3] = (
        3  # channels that grey pixels go in as; 1: pretrained weights are summed up, to the same result
    )
    # Shell patterns over timm's names of the encoder's weights, "*" matching dots: [patch_embed.*, "blocks.[0-5].*"]. What
    # they match does not learn, and norms and dropout in it stay in evaluation mode.
    freeze: Names = ()
    image_mean: float = 0.5  # of pixels scaled to [0, 1]; saved with the model
    image_std: float = Field(default=0.25, gt=0)
    joint_dim: int = Field(default=512, ge=2)
    image_hidden: int = Field(default=0, ge=0)  # hidden width of the impression head; 0: as wide as the last level
    text_hidden: int = Field(default=1024, ge=1)
    projection_norm: Literal["batch", "layer"] = "batch"  # "layer" needs no statistics, so fits bf16 and tiny batches
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    aggregation: AggregationConfig = AggregationConfig()


class TermWeights(Section):
    image_impression: float = Field(default=1.0, ge=0)  # summed over the two views
    image_findings: float = Field(default=1.0, ge=0)
    views_impression: float = Field(default=2.0, ge=0)  # the published program computes it twice
    views_findings: float = Field(default=2.0, ge=0)


class TemperatureConfig(Section):
    """Of images against texts. A run file may write the number alone: `temperature: 0.07`."""

    init: float = Field(default=0.07, ge=0.01)
    learnable: bool = False
    min: float = Field(default=0.01, ge=0.01)  # a learned temperature stays above; float32 logits lose digits below

    @model_validator(mode="after")
    def _above_its_floor(self) -> "TemperatureConfig":
        if self.learnable and not self.init > self.min:
            raise ValueError(
                f"init = {self.init}: must be above min = {self.min} to be learned; lower min or raise init"
            )
        return self


class NegativesConfig(Section):
    """Whom a study is compared with. A run file may write the scope alone: `negatives: local`."""

    scope: Literal["global", "local"] = "global"  # the samples of every rank, or this rank's own, as published
    # How ranks meet under the strip-mined backends, to the same result: reduce_scatter gathers the keys, four matrix
    # products a pair; owner gathers both sides, five products but no gradient on the wire. auto: by the number of nodes.
    exchange: Literal["auto", "reduce_scatter", "owner"] = "auto"


class ObjectiveConfig(Section):
    temperature: Annotated[TemperatureConfig, BeforeValidator(_number_as("init"))] = TemperatureConfig()
    views_temperature: float = Field(default=0.2, ge=0.01)
    prior_strength: float = Field(default=0.2, ge=0)  # lambda; 0 is plain InfoNCE
    target_norm: Literal["none", "row", "ref"] = "ref"
    negatives: Annotated[NegativesConfig, BeforeValidator(_text_as("scope"))] = NegativesConfig()
    # auto: dense where the batch is small, else triton on CUDA and strips elsewhere.
    backend: Literal["auto", "dense", "strips", "triton"] = "auto"
    # What the matrix products of strips and triton read (dense is fp32). auto: fp16 on CUDA unless train.precision is fp32.
    # fp16 gradients are within 0.5 % while the mean cosine of all embeddings is below .98; sums are always fp32.
    operands: Literal["auto", "fp32", "fp16"] = "auto"
    weights: TermWeights = TermWeights()


class OptimConfig(Section):
    name: Literal["auto", "adamw", "fused_adam", "apex_fused_adam", "apex_fused_lamb"] = "auto"
    lr: float = Field(default=2e-4, gt=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)  # of lr, from each layer of the image encoder to the one below
    weight_decay: float = Field(default=0.05, ge=0)
    betas: Pair = (0.9, 0.999)  # each in [0, 1)
    decay_norm_and_bias: bool = False  # as published: True
    schedule: Literal["cosine", "cosine_restarts"] = "cosine"
    warmup_share: float = Field(default=0.05, ge=0, lt=1)  # of all steps
    final_lr_share: float = Field(default=0.01, ge=0, le=1)  # the cosine ends at lr * this
    restart_epochs: int = Field(default=20, ge=1)  # period of cosine_restarts
    grad_clip: float = Field(default=1.0, ge=0)  # global norm; 0 switches it off

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("must be two numbers, 0 <= beta < 1")
        return value


class TrainConfig(Section):
    epochs: int = Field(default=20, ge=0)  # 0 exports the initial weights
    max_steps: int = Field(default=0, ge=0)  # 0: epochs decide
    micro_batch_size: int = Field(default=128, ge=2)  # studies per rank and step, where global_batch_size is 0
    # Studies of a step on all ranks together, whatever their number; they share them as evenly as they can. 0:
    # micro_batch_size x ranks. A run that goes on keeps the number it began with, on other ranks too.
    global_batch_size: int = Field(default=0, ge=0)
    # Studies that pass the encoder together (GradCache), so that micro_batch_size, and with it the negatives, does not
    # depend on memory; must divide micro_batch_size. 0: all of them. BatchNorm then sees one chunk at a time. Where a rank
    # holds an odd number, a chunk may be a study or two larger, so that none is of a single one.
    grad_cache_chunk: int = Field(default=0, ge=0)
    # Parts of the image encoder whose activations are computed again in the backward pass instead of being kept: a quarter
    # to a third more work, for much less memory. block saves most; encoders of one grid (ViT) know no stages.
    activation_checkpointing: Literal["none", "stage", "block"] = "none"
    # Towers that torch.compile makes faster, after some minutes at the start; where it cannot, a warning says why. Not
    # with ZeRO-3, whose hooks it cannot follow; BatchNorm over all ranks (batch_norm: sync) it cannot either. The first
    # step is not compiled, so that it can be counted.
    compile: Towers = ()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # The linear layers of the image encoder multiply in 8 bits, on devices that can, with precision: bf16 and the extra fp8.
    # mfu stays a share of the bf16 peak. Faster only for large ViTs and ConvNeXts, and with train.compile.
    fp8: bool = False
    batch_norm: Literal["auto", "sync", "mean", "freeze"] = "auto"  # auto: sync on CUDA, mean elsewhere
    deepspeed: str = "zero1"  # a name in ds_configs/, or the path of a JSON file: ZeRO and communication only
    resume: bool = False  # go on from the last good checkpoint of this run, if there is one
    save_every: int = Field(default=0, ge=0)  # steps between checkpoints; 0: at the end of every epoch
    save_in_background: bool = False  # training waits for a copy of the state only, not for the disk
    keep_last: int = Field(default=2, ge=1)  # checkpoints
    keep_every: int = Field(default=0, ge=0)  # keep those of every so-many steps for good; 0: none
    keep_best: int = Field(
        default=0, ge=0
    )  # keep so many that validated best; checkpoints are then saved at validations
    best_metric: str = Field(  # of validation; more is better
        default="impression/image_to_text_R@5",
        pattern=r"^(impression|findings)/(image_to_text|text_to_image)_R@(1|5|10)$",
    )
    max_bad_steps: int = Field(default=10, ge=0)  # skipped for a gradient that is not finite, before the run stops
    timeout_s: float = Field(default=600, ge=5)  # a rank that is at the same thing for longer ends itself, with the run
    eval_every: int = Field(default=1, ge=0)  # epochs between validations; 0: never
    log_every: int = Field(default=10, ge=1)  # steps
    images_every: int = Field(default=500, ge=0)  # steps between pictures in TensorBoard; 0: never

    def studies_of(self, ranks: int) -> int:
        """Studies of a step on so many ranks together, where a run begins."""
        return self.global_batch_size or self.micro_batch_size * ranks


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output_dir: Folder = Path("runs")  # the run lives in output_dir/name
    preset: Literal["default", "paper"] = "default"
    share: Literal["private", "group"] = "private"  # who else may read what the run writes: nobody, or the user's group
    seed: int = Field(default=42, ge=0, lt=2**32)
    data: DataConfig
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        weights = self.objective.weights
        chunk, rows = self.train.grad_cache_chunk, self.train.micro_batch_size
        if chunk and (chunk < 2 or rows % chunk):
            raise ValueError(
                f"train.grad_cache_chunk = {chunk}: must be at least 2 and divide train.micro_batch_size = {rows}"
            )
        if self.text.mode == "cached" and self.text != TextConfig():
            name, value = next((n, v) for n, v in self.text if v != getattr(TextConfig(), n))
            raise ValueError(f"text.{name} = {value!r}: is for text.mode: online; set that too, or leave it out")
        if self.train.fp8 and self.train.precision != "bf16":
            raise ValueError(f"train.precision = {self.train.precision!r}: must be bf16 with train.fp8: true")
        if self.train.activation_checkpointing != "none" and "image_encoder" in self.train.compile:
            raise ValueError(
                f"train.activation_checkpointing = {self.train.activation_checkpointing!r}: a compiled image encoder has no "
                "parts; take image_encoder out of train.compile, or set train.activation_checkpointing: none"
            )
        if self.train.keep_best and not (self.data.val_split and self.train.eval_every):
            raise ValueError(
                f"train.keep_best = {self.train.keep_best}: needs validation; set data.val_split and train.eval_every, or "
                "train.keep_best: 0"
            )
        if not any(weights.model_dump().values()):
            raise ValueError("objective.weights: all are 0, so there is nothing to learn; make one of them positive")
        if not self.model.aggregation.enabled and (weights.image_findings or weights.views_findings):
            raise ValueError(
                "model.aggregation.enabled = False: without a findings branch, objective.weights.image_findings and "
                "objective.weights.views_findings must be 0"
            )
        return self


# What a preset changes; a run file is laid over it. `paper` is the published method with its crash fixed. What it does not
# copy: each view is normalised together with the other by the BatchNorms (they were four passes), pixels have mean .5
# and deviation .25 (ImageNet's there), and the period of the restarts follows the global batch (one process's there).
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "data": {
            "augment": {
                "crop_scale": [0.7656, 0.7656],  # a 224 crop of 256 pixels
                "horizontal_flip": 0.5,
                "vertical_flip": 0.5,
                "rotation": 30.0,
                "perspective": 0.5,
                "autocontrast": 0.5,
                "brightness": 0.0,
                "contrast": 0.0,
            }
        },
        "model": {"aggregation": {"with_replacement": True, "mask_padding": False}},
        "objective": {"negatives": {"scope": "local"}, "target_norm": "none"},
        "optim": {
            "schedule": "cosine_restarts",
            "warmup_share": 0.0,
            "final_lr_share": 0.0,
            "decay_norm_and_bias": True,
            "grad_clip": 0.0,
        },
    },
}


def load_run_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file, lay `key.sub=value` overrides over it, and check every setting.

    Raises FileNotFoundError or ValueError naming the key, the value and the rule.
    """
    return build_run_config(read_settings(path, overrides))


def build_run_config(values: dict[str, Any]) -> RunConfig:
    """Check plain values (as parsed from YAML) laid over their preset."""
    preset = values.get("preset", "default")
    base = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    return check_settings(RunConfig, merged(base, values))


def build_data_config(values: dict[str, Any]) -> DataConfig:
    """The data section alone, for what reads shards without a run."""
    return check_settings(DataConfig, values, within=("data",), root=RunConfig)
