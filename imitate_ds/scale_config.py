"""The file of a scaling sweep: one run of pre-training for every combination of what its axes name."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from imitate_ds.config import RunConfig, build_run_config
from imitate_ds.run_file import Folder, Section, check_settings, merged, read_settings

Named = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_encoders(value: Any) -> Any:
    """Names of timm's alone, or names of ours with the settings that each lays over the run file."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return value
    return {name: {"model": {"image_encoder": name}} for name in _distinct(tuple(value))}


def _named(encoders: dict[str, Any]) -> dict[str, Any]:
    _distinct(tuple(encoders))
    return encoders


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("must name at least one; leave the axis out to have what `run` says")
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"names {twice[0]} twice; each run is done once")
    return values


Axis = (BeforeValidator(_as_tuple), AfterValidator(_distinct))


class ScaleAxes(Section):
    """What is swept, every value with every other. An axis that is left out has the one value that `run` says."""

    # [resnet18, resnet50], or with settings of each laid over `run`: {resnet18: {}, resnet50: {optim: {lr: 5e-4}}}. A name is
    # timm's, unless `run` or the settings say model.image_encoder: {small: {model: {image_encoder: resnet18}}}.
    encoders: Annotated[dict[Named, dict[str, Any]], BeforeValidator(_as_encoders), AfterValidator(_named)]
    batch_sizes: Annotated[
        tuple[Annotated[int, Field(ge=2)], ...], *Axis
    ] = ()  # train.global_batch_size; the learning rate stays as it is
    negatives: Annotated[tuple[Literal["global", "local"], ...], *Axis] = ()  # objective.negatives.scope
    shares: Annotated[tuple[float, ...], *Axis] = ()  # data.share, of the training patients
    studies: Annotated[
        tuple[Annotated[int, Field(gt=0)], ...], *Axis
    ] = ()  # that a run sees, in as many steps and epochs as that takes
    seeds: Annotated[
        tuple[int, ...], *Axis
    ] = ()  # of weights, order, views and drawn patients; two and more give intervals


class ScaleProbe(Section):
    """The linear probe of every run, on the labels of the first shard folder."""

    split: str = "val"
    train_split: str = "train"

    @property
    def splits(self) -> tuple[str, str]:
        return self.split, self.train_split


class ScaleConfig(Section):
    name: Named
    output_dir: Folder = Path("runs")  # everything of the sweep lies in output_dir/name
    share: Literal["private", "group"] = "private"  # who else may read it
    run: dict[str, Any]  # a run file of pre-training, without what the axes say
    axes: ScaleAxes
    probe: ScaleProbe | None = None  # null: no linear probe

    @property
    def folder(self) -> Path:
        return self.output_dir / self.name

    def run_of(self, encoder: str, name: str = "run", **settings: Any) -> RunConfig:
        """The run file of one encoder with further settings. Raises ValueError naming the key, below axes.encoders.ENCODER."""
        ours = {"name": name, "output_dir": str(self.folder / "runs"), "share": self.share}
        try:
            run = merged({"model": {"image_encoder": encoder}}, self.run)
            return build_run_config(merged(merged(merged(run, self.axes.encoders[encoder]), ours), settings))
        except ValueError as error:
            raise ValueError(f"run, axes.encoders.{encoder}: {error}") from None


def load_scale_config(path: Path, overrides: list[str] | None = None) -> ScaleConfig:
    """Read and check a sweep, and the run file of every encoder. Raises FileNotFoundError or ValueError naming the key."""
    config = check_settings(ScaleConfig, read_settings(path, overrides))
    for encoder in config.axes.encoders:
        config.run_of(encoder)
    return config
