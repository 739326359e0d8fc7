"""The run file: strict, typed, frozen. Every setting is a documented field, checked once, here at the door."""

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

Folder = Annotated[Path, BeforeValidator(lambda v: Path(v) if isinstance(v, str) else v)]
Floats = Annotated[tuple[float, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Pair = Annotated[tuple[float, float], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


def _number_as(name: str) -> Callable[[Any], Any]:
    return lambda value: {name: value} if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _as_folders(value: Any) -> Any:
    """One location, or a list of {shards, weight}."""
    if isinstance(value, (str, Path)):
        value = [{"shards": str(value)}]
    return tuple(value) if isinstance(value, list) else value


def _text_as(name: str) -> Callable[[Any], Any]:
    return lambda value: {name: value} if isinstance(value, str) else value


NO_ACCUMULATION = (
    "a contrastive loss learns from the samples it sees together, and accumulated batches add none; for a larger batch "
    "raise train.micro_batch_size, and where memory ends set train.grad_cache_chunk: studies that pass the encoder together"
)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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


class ShardsConfig(Section):
    shards: str = Field(min_length=1)  # a folder, or an http(s)://, s3://, ... location of one
    weight: float = Field(default=1.0, gt=0, le=1000)  # passes over its training split in an epoch

    @field_validator("shards")
    @classmethod
    def _without_secrets(cls, value: str) -> str:
        """The run file is copied into the run's folder, TensorBoard and messages."""
        if "://" in value and re.search(r"[@?#]", value.partition("://")[2]):
            raise ValueError(
                "must be a URL without user, password, token or query; they go into ~/.netrc, or the environment of the AWS tools"
            )
        return value


class DataConfig(Section):
    # Made by `imitate-ds shards build`, with embeddings from `imitate-ds shards embed`. One location, or a mixture:
    # `shards: [{shards: shards/a}, {shards: s3://bucket/b, weight: 0.5}]`, embedded by the same text encoder.
    shards: Annotated[tuple[ShardsConfig, ...], BeforeValidator(_as_folders), Field(min_length=1)]
    train_split: str = "train"
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
    # depend on memory; must divide micro_batch_size. 0: all of them. BatchNorm then sees one chunk at a time.
    grad_cache_chunk: int = Field(default=0, ge=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
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


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 2e-4 as a string; people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_yaml(text: str) -> Any:
    """Parse YAML in which `2e-4` is a number. Never constructs Python objects. Raises ValueError where it is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None


def load_run_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file, lay `key.sub=value` overrides over it, and check every setting.

    Raises FileNotFoundError or ValueError naming the key, the value and the rule.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file; run files that ship are in launch/runs/")
    try:
        values = load_yaml(path.read_text()) or {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a mapping of settings, found {type(values).__name__}")
    for override in overrides or []:
        _apply_override(values, override)
    return build_run_config(values)


def build_run_config(values: dict[str, Any]) -> RunConfig:
    """Check plain values (as parsed from YAML) laid over their preset."""
    preset = values.get("preset", "default")
    base = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    try:
        return RunConfig.model_validate(_merged(base, values))
    except ValidationError as error:
        raise ValueError("\n".join(_explain(e) for e in error.errors())) from None


def build_data_config(values: dict[str, Any]) -> DataConfig:
    """The data section alone, for what reads shards without a run."""
    try:
        return DataConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain({**e, "loc": ("data", *e["loc"])}) for e in error.errors())) from None


def dump_run_config(config: RunConfig) -> str:
    """The run file that reproduces this run: every setting written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys: {"train.epochs": 20, ...}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def setting_names(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key a run file may hold."""
    names: list[str] = []
    for name, info in model.model_fields.items():
        section = _section_of(info.annotation)
        names += setting_names(section, f"{prefix}{name}.") if section else [prefix + name]
    return names


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ValueError(f"--set {override}: must be key=value, as in --set optim.lr=1e-4")
    *parents, leaf = key.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if child is not None and not isinstance(child, dict):
            raise ValueError(
                f"--set {override}: {parent} is a value, not a section; write it out, as in {parent}: {{...}}"
            )
        node[parent] = node = dict(child or {})
    node[leaf] = load_yaml(text) if text else ""


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in over.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _section_at(path: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for part in path:
        if not part.isdigit():  # the number of an entry in a list
            annotation = section.model_fields[part].annotation
            section = _section_of(annotation) or _section_of(next(iter(get_args(annotation)), None)) or section
    return section


def _explain(error: Any) -> str:
    """One pydantic error as `key = value: rule`, with the nearest name for a misspelt key."""
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden" and "accum" in path[-1]:
        return f"{key} is not a setting: {NO_ACCUMULATION}"
    if error["type"] == "extra_forbidden":
        known = list(_section_at(path[:-1]).model_fields)
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{key} is not a setting{hint}; {'.'.join(path[:-1]) or 'a run file'} has: {', '.join(known)}"
    shown = _shown(error["input"])
    if error["type"] == "model_type" and key:
        return f"{key} = {shown}: must be a section of {', '.join(_section_at(path).model_fields)}"
    if error["type"] == "missing" and any(part.isdigit() for part in path):
        return f"{key}: must be given; add it to the run file"
    if error["type"] == "missing":
        return f"{key}: must be given; add it to the run file or pass --set {key}=..."
    rule = (
        error["msg"].removeprefix("Value error, ").replace("Input should be", "must be").replace("valid tuple", "list")
    )
    return f"{key} = {shown}: {rule}" if key else rule


def _shown(value: Any) -> str:
    """A value as a message may show it: what a URL holds besides its place may be a secret."""
    text = repr(value)
    return (
        re.sub(r"(://)[^'\"\s]*@|[?#][^'\"\s]*", lambda found: f"{found[1] or ''}***", text) if "://" in text else text
    )
