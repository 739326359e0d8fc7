"""A model for a task: an encoder with a head, the folder it leaves as, and the predictor that comes back from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from imitate_ds.batch import LabeledBatch
from imitate_ds.config import ModelConfig
from imitate_ds.data.transforms import eval_view
from imitate_ds.export_folder import (
    AGAIN,
    CARD,
    WEIGHTS,
    find_export,
    load_square,
    new_export,
    read_settings,
    write_settings,
)
from imitate_ds.finetune_config import EncoderConfig, TaskConfig
from imitate_ds.heads.classification import ClassificationHead
from imitate_ds.heads.detection import DetectionHead, Found
from imitate_ds.heads.segmentation import SegmentationHead
from imitate_ds.heads.yolo import YoloHead
from imitate_ds.hub import load_model
from imitate_ds.model_card import predictor_card
from imitate_ds.models.adaptation import TaskModel, merge_updates
from imitate_ds.models.image_encoder import ImageEncoder

FORMAT = "imitate_ds.task/1"
HOW = "a fine-tuning run exports at its end to runs/NAME/export"
DEFAULT_SIZE = 224  # pixels, of an encoder that was not pre-trained here
SETTINGS = {"task": dict, "targets": list, "model": dict, "input_size": int}


class Origin(NamedTuple):
    """Where an encoder comes from: its configuration, what it was fed with, and what is known of it."""

    model: ModelConfig
    input_size: int
    weights: dict[str, Tensor] | None  # None: as `model` says
    about: dict[str, Any]


def read_origin(config: EncoderConfig) -> Origin:
    """An export of pre-training, or a backbone by its name. Raises what load_model raises."""
    if config.model is not None:
        about = {"image_encoder": config.model.image_encoder, "weights": config.model.weights}
        return Origin(config.model, DEFAULT_SIZE, None, about)
    found = load_model(config.init)
    # what did not learn in pre-training may learn now
    model = ModelConfig.model_validate(found.settings["model"]).model_copy(update={"freeze": ()})
    about = {"path": config.init, "image_encoder": model.image_encoder, "preset": found.settings["preset"]}
    about |= {"trained_on": found.settings["data"], "synthetic": found.settings["synthetic"]}
    return Origin(model, found.input_size, found.model.image_encoder.state_dict(), about)


def build_task_model(
    origin: Origin, config: EncoderConfig, task: TaskConfig, targets: int, *, input_size: int
) -> TaskModel:
    """An encoder with a new head, its positions interpolated where it was pre-trained at another input size. Raises ValueError
    where that cannot be.
    """
    model = origin.model if origin.weights is None else origin.model.model_copy(update={"weights": "none"})
    encoder = ImageEncoder(model, input_size)
    if origin.weights is not None:
        told = f"data.input_size = {input_size}: {origin.model.image_encoder}, pre-trained at {origin.input_size}"
        encoder.take_weights(origin.weights, given_by=told)
    return TaskModel(encoder, build_head(task, encoder, targets), config)


def build_head(task: TaskConfig, encoder: ImageEncoder, targets: int) -> nn.Module:
    channels, reductions, name = encoder.channels, encoder.reductions, task.head_name
    if task.kind == "classification":
        hidden = task.hidden if name == "mlp" else 0
        return ClassificationHead(channels, targets, hidden=hidden, exclusive=task.exclusive)
    if task.kind == "segmentation":
        return SegmentationHead(channels, reductions, targets, decoder=name)
    if name == "yolov3":
        return YoloHead(channels, reductions, targets)
    return DetectionHead(channels, reductions, targets, kind=name)


class Predictor:
    """A fine-tuned model in evaluation mode, with the preprocessing it was trained with."""

    def __init__(self, model: TaskModel, settings: dict[str, Any], preprocessing: dict[str, Any], folder: Path):
        self.model = model.eval()
        self.settings, self.preprocessing, self.folder = settings, preprocessing, folder
        self.task = TaskConfig.model_validate(settings["task"])
        self.targets: tuple[str, ...] = tuple(settings["targets"])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "Predictor":
        self.model.to(device)
        return self

    def predict(self, images: Sequence[str | Path] | Tensor, batch_size: int = 32) -> Tensor | list[Found]:
        """Radiographs, as files or grey uint8 [n, 1, H, W] -> what the head says of each, on the CPU.

        classification: probabilities [n, L]. segmentation: probabilities [n, M, s, s]. detection: n times Found. Pixels are
        those of the square that the encoder sees, s = input_size: constant borders cropped, padded with black. Raises OSError
        or ValueError naming the place in the list of a file that cannot be read.
        """
        if not len(images):
            raise ValueError("images: must hold at least one radiograph")
        parts = []
        for start in range(0, len(images), batch_size):
            batch = self._batch(images[start : start + batch_size], start)
            with torch.no_grad():
                parts.append(self.model.head.predict(self.model(batch.to(self.device))))  # type: ignore[operator]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts).cpu()
        return [Found(*(value.cpu() for value in found)) for part in parts for found in part]

    def _batch(self, images: Sequence[str | Path] | Tensor, start: int) -> LabeledBatch:
        size = self.preprocessing["image_size"]
        if isinstance(images, Tensor):
            squares = list(images)
        else:
            squares = [load_square(path, size, place)[None] for place, path in enumerate(images, start=start)]
        pixels = torch.stack([eval_view(square, self.preprocessing["input_size"]) for square in squares])
        nothing = torch.zeros(len(pixels), 0, dtype=torch.int8)
        return LabeledBatch([""] * len(pixels), pixels, nothing, nothing.byte(), [], [], 0)


def save_predictor(
    model: TaskModel, folder: Path, *, settings: Mapping[str, Any], image_size: int, card: Mapping[str, Any]
) -> None:
    """Write the export folder, whole or not at all. settings: SETTINGS and whatever else is to be known of the run.

    Low-rank updates become part of the weights of `model`.
    """
    merge_updates(model.encoder)
    encoder = settings["model"]
    preprocessing = {
        "image_size": image_size,
        "input_size": settings["input_size"],
        "image_mean": encoder["image_mean"],
        "image_std": encoder["image_std"],
        "fit": "crop constant borders, pad to a square with black, resize by area to image_size, then to input_size",
        "channels": "grey",
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with new_export(folder) as part:
        save_file(state, part / WEIGHTS, metadata={"synthetic": str(settings["synthetic"]).lower()})
        write_settings(part, {"format": FORMAT, **settings}, preprocessing)
        (part / CARD).write_text(predictor_card(settings, card))


def load_predictor(folder: str | Path, device: torch.device | str = "cpu") -> Predictor:
    """Load an export of fine-tuning: a local folder first, else a model id at the Hugging Face hub.

    Raises FileNotFoundError when there is no such export, ValueError when it is not one that this version reads.
    """
    root = find_export(folder, how=HOW)
    settings, preprocessing = read_settings(root, FORMAT, SETTINGS)
    try:
        task = TaskConfig.model_validate({**settings["task"], "targets": tuple(settings["targets"])})
        plain = ModelConfig.model_validate(settings["model"]).model_copy(update={"weights": "none"})
        origin = Origin(plain, settings["input_size"], None, {})
        ready = EncoderConfig(model=plain, train="full")  # nothing of it is to be prepared for training
        model = build_task_model(origin, ready, task, len(settings["targets"]), input_size=settings["input_size"])
        model.load_state_dict(load_file(root / WEIGHTS))
    except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{root}: damaged export, or one of another version: {error}; {AGAIN}") from error
    return Predictor(model, settings, preprocessing, root).to(device)
