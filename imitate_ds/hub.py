"""What leaves the house: a folder of safetensors and JSON that others can load, and the model that comes back from it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from imitate_ds.config import ModelConfig, RunConfig
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
from imitate_ds.model_card import CARD_FIELDS, pretrained_card
from imitate_ds.models.grounding import grounding_maps, sum_levels
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.models.text_encoder import TextEncoder, load_text_encoder
from imitate_ds.models.text_encoder_folder import describe_text_encoder

FORMAT = "imitate_ds.model/1"
BACKBONE, TEXT_ENCODER = "image_encoder.safetensors", "text_encoder"
# what the two files must hold; build_id, train_split and text_encoder are missing in older exports
SETTINGS = {"preset": str, "impression_text": str, "temperature": float | int, "text_width": int, "input_size": int}
SETTINGS |= {"data": str, "synthetic": bool, "model": dict}
HOW = "a run exports at its end to runs/NAME/export (finish it with --set train.resume=true)"

Branch = Literal["impression", "findings", "pooled"]
Section = Literal["impression", "findings"]
Prompts = Mapping[str, tuple[Sequence[str], Sequence[str]]]  # label -> (texts that affirm it, texts that deny it)


class ImageEmbeddings(NamedTuple):
    """Float32 on the CPU: unit rows of both branches, and the pooled last level as it is."""

    impression: Tensor  # [n, D]
    findings: Tensor | None  # [n, D]; None where the model has no findings branch
    pooled: Tensor  # [n, C]


class PretrainedImitate:
    """A trained model in evaluation mode, with the preprocessing and the text encoder it was trained with."""

    def __init__(self, model: ImitateModel, settings: dict[str, Any], preprocessing: dict[str, Any], folder: Path):
        self.model = model.eval()
        self.settings = settings  # config.json
        self.preprocessing = preprocessing  # preprocessor_config.json
        self.folder = folder
        self._text_encoder: TextEncoder | None = None

    @property
    def input_size(self) -> int:
        return self.preprocessing["input_size"]

    @property
    def text_encoder(self) -> TextEncoder:
        """The frozen text encoder of the training run, loaded at first use."""
        if self._text_encoder is None:
            if not (self.folder / TEXT_ENCODER).is_dir():
                raise FileNotFoundError(
                    f"{self.folder}: no {TEXT_ENCODER}/ folder, so text cannot be encoded; copy the export again"
                )
            encoder = load_text_encoder(str(self.folder / TEXT_ENCODER))
            wanted = (self.settings.get("text_encoder") or {}).get("fingerprint")  # older exports do not say
            if wanted and encoder.fingerprint != wanted:
                raise ValueError(
                    f"{self.folder / TEXT_ENCODER}: text encoder {encoder.fingerprint}, but the model was trained with "
                    f"{wanted}; copy the export again"
                )
            self._text_encoder = encoder
        return self._text_encoder

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> "PretrainedImitate":
        self.model.to(device)
        return self

    def encode_image(
        self, images: Sequence[str | Path] | Tensor, branch: Branch = "impression", batch_size: int = 64
    ) -> Tensor:
        """Embed radiographs: files of any format the shards are built from, or grey uint8 [B, 1, H, W].

        Returns float32 [B, D] with unit rows, or for "pooled" the features [B, C] before any head.
        """
        if branch not in ("impression", "findings", "pooled"):
            raise ValueError(f"branch = {branch!r}: must be 'impression', 'findings' or 'pooled'")
        starts = range(0, len(images), batch_size)
        if not starts:
            raise ValueError("images: must hold at least one radiograph")
        batches = (self.prepare(images[start : start + batch_size], first=start) for start in starts)
        rows = [getattr(self.embed_images(batch), branch) for batch in batches]
        if rows[0] is None:
            raise ValueError("branch = 'findings': this model has no findings branch; it has 'impression' and 'pooled'")
        return torch.cat(rows)

    def prepare(self, images: Sequence[str | Path] | Tensor, first: int = 0) -> Tensor:
        """Files, or uint8 [B, 1, H, W], to what the encoder was trained on: uint8 [B, 1, input_size, input_size].

        Raises OSError or ValueError naming the place in the list of a file that cannot be read, never the file, for its
        name may hold a patient id; `first` is the place of images[0] in the caller's list.
        """
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
                found = f"{images.dtype} {list(images.shape)}"
                raise ValueError(f"images: a tensor must be grey uint8 [B, 1, H, W], found {found}")
            return torch.stack([eval_view(image, self.input_size) for image in images])
        if isinstance(images, (str, Path)):
            raise ValueError("images: must be a list of files, not one; write [file]")
        size = self.preprocessing["image_size"]
        squares = [load_square(path, size, place) for place, path in enumerate(images, start=first)]
        return torch.stack([eval_view(square[None], self.input_size) for square in squares])

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> ImageEmbeddings:
        """All three embeddings of one prepared batch, uint8 [B, 1, input_size, input_size], in a single pass."""
        impression, findings, pooled = self.model.encode_image(images.to(self.device))
        return ImageEmbeddings(
            normalize(impression.float()).cpu(),
            None if findings is None else normalize(findings.float()).cpu(),
            pooled.float().cpu(),
        )

    def encode_text(self, texts: Sequence[str], section: Section = "impression") -> Tensor:
        """Embed report text into the space of the image branch of that name: float32 [n, D] with unit rows.

        Both sections share one text projection in this method, so the same words give the same row for either.
        """
        if section not in ("impression", "findings"):
            raise ValueError(f"section = {section!r}: must be 'impression' or 'findings'")
        if isinstance(texts, str):
            raise ValueError("texts: must be a list of texts, not one; write [text]")
        return self.project_text(self.text_encoder.encode(texts))

    @torch.no_grad()
    def project_text(self, embeddings: Tensor) -> Tensor:
        """Frozen text embeddings [n, E] of this model's text encoder to unit rows [n, D], float32 on the CPU."""
        rows = [self.model.encode_text(part.to(self.device).float()) for part in embeddings.split(4096)]
        return normalize(torch.cat(rows).float()).cpu()

    def encode_ensemble(self, texts: Sequence[str]) -> Tensor:
        """One unit row float64 [D] for texts that say the same: the mean of their unit rows, normalised again."""
        return normalize(self.encode_text(texts).double().mean(0), dim=0)

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosine similarities [n, m] of image rows [n, D] and text rows [m, D]."""
        return images @ texts.T

    def zero_shot(
        self, images: Sequence[str | Path] | Tensor, prompts: Prompts, branch: Section = "impression"
    ) -> dict[str, Tensor]:
        """For each label the margin P(affirming) - P(denying) per image, in (-1, 1); 0 is undecided.

        `prompts` maps a label to (texts that affirm it, texts that deny it); see imitate_ds.evaluation.prompts for ready ones.
        Ask the impression branch for a diagnosis, the findings branch for what is seen.
        """
        _check_branch(branch)
        return self.zero_shot_scores(self.encode_image(images, branch), prompts)

    def zero_shot_scores(self, images: Tensor, prompts: Prompts) -> dict[str, Tensor]:
        """Like zero_shot, from rows [n, D] of either branch. No image's score depends on the others."""
        shares = {label: self.class_shares(images, sides) for label, sides in prompts.items()}
        return {label: share[:, 0] - share[:, 1] for label, share in shares.items()}

    def class_shares(self, images: Tensor, classes: Sequence[Sequence[str]]) -> Tensor:
        """Of rows [n, D], the share of each of K classes that exclude each other: float64 [n, K], summing to 1.

        classes: the texts of each. float64 so that sure images do not tie at 1.
        """
        rows = torch.stack([self.encode_ensemble(texts) for texts in classes], dim=1)
        return (images.double() @ rows / self.settings["temperature"]).softmax(dim=1)

    def usual_levels(self, images: Sequence[str | Path] | Tensor, batch_size: int = 64) -> list[Tensor]:
        """What is usual in radiographs, for grounding to compare with: the mean features of each level [C_s, H_s, W_s].

        A few dozen radiographs of any kind serve, if they are taken as those that are asked about.
        """
        starts = range(0, len(images), batch_size)
        if not starts:
            raise ValueError("images: must hold at least one radiograph")
        batches = (self.prepare(images[start : start + batch_size], first=start) for start in starts)
        sums = (sum_levels(self.model, batch.to(self.device)) for batch in batches)
        return [torch.stack(parts).sum(dim=0) / len(images) for parts in zip(*sums, strict=True)]

    def grounding(
        self,
        images: Sequence[str | Path] | Tensor,
        texts: Sequence[str],
        branch: Section = "impression",
        usual: Sequence[Tensor] | None = None,
        batch_size: int = 32,
    ) -> Tensor:
        """Which pixels answer a phrase, one for each radiograph: maps float32 [n, H, W] on the CPU, H = W = input_size.

        A map is in the frame of the square that the encoder sees: borders cropped, padded to a square, resized
        (`prepare`), not in that of the file. A value is a pixel's part in the cosine of image and text above what is
        `usual` (see usual_levels; without it, above nothing), negative parts cut off; imitate_ds.models.grounding has the
        definition. Compare values within a map. It shows what moves the model, and no finding follows from it.
        """
        _check_branch(branch)
        if isinstance(texts, str) or len(texts) != len(images):
            raise ValueError("texts: must be a list of one text for each image")
        if not len(texts):
            raise ValueError("images: must hold at least one radiograph")
        rows = self.encode_text(texts, branch)
        parts = []
        for start in range(0, len(rows), batch_size):
            batch = self.prepare(images[start : start + batch_size], first=start)
            parts.append(self.ground_rows(batch, rows[start : start + batch_size], branch, usual))
        return torch.cat(parts)

    def ground_rows(
        self, images: Tensor, rows: Tensor, branch: Section = "impression", usual: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Like grounding, of one prepared batch and unit rows of text [B, D]."""
        images, rows = images.to(self.device), rows.float().to(self.device)
        return grounding_maps(self.model, images, rows, branch, usual).cpu()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the same folder again, with the weights as they are now."""
        text_encoder = self.folder / TEXT_ENCODER
        _write_export(
            Path(folder),
            self.model,
            self.settings,
            self.preprocessing,
            text_encoder if text_encoder.is_dir() else None,
            (self.folder / CARD).read_text() if (self.folder / CARD).is_file() else "",
        )


def save_pretrained(
    model: ImitateModel,
    folder: str | Path,
    *,
    config: RunConfig,
    text_encoder_folder: Path | None,
    card: Mapping[str, Any],
) -> None:
    """Write the export folder: config, weights, preprocessing, text encoder, model card; whole or not at all.

    `card` says what the model was trained on: data (name), synthetic (bool) and image_size (of the shards) must be
    there; whatever else it holds (build_id, licence, steps, figures) is listed in the model card. With build_id,
    evaluation can tell when it is asked to score what the model was trained on.
    """
    missing = [name for name in CARD_FIELDS if name not in card]
    if missing:
        raise ValueError(f"card: {', '.join(missing)} missing; it must hold {', '.join(CARD_FIELDS)}")
    settings = {
        "format": FORMAT,
        "preset": config.preset,
        "impression_text": config.data.impression_text,  # what the highest level was aligned with
        "temperature": _temperature(model, config),
        "text_width": model.text_width,
        "input_size": config.data.input_size,
        "data": card["data"],
        "synthetic": bool(card["synthetic"]),
        "build_id": card.get("build_id"),
        "train_split": config.data.train_split,
        "text_encoder": _text_encoder_settings(text_encoder_folder),
        "model": config.model.model_dump(mode="json"),
    }
    preprocessing = {
        "image_size": card["image_size"],
        "input_size": config.data.input_size,
        "image_mean": config.model.image_mean,  # of pixels scaled to [0, 1]
        "image_std": config.model.image_std,
        "fit": "crop constant borders, pad to a square with black, resize by area to image_size, then to input_size",
        "channels": "grey",
    }
    _write_export(Path(folder), model, settings, preprocessing, text_encoder_folder, pretrained_card(settings, card))


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> PretrainedImitate:
    """Load an export: a local folder first, else a model id at the Hugging Face hub.

    Raises FileNotFoundError when there is no such export, ValueError when it is not one that this version reads.
    """
    root = find_export(folder, how=HOW)
    settings, preprocessing = read_settings(root, FORMAT, SETTINGS)
    try:
        config = ModelConfig.model_validate(settings["model"])
        weights = load_file(root / WEIGHTS)
        # the export brings all weights: nothing is to be fetched for the backbone again, and nothing to be kept from learning
        plain = config.model_copy(update={"weights": "none", "freeze": ()})
        model = ImitateModel(plain, settings["text_width"], input_size=settings["input_size"])
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{root}: damaged export, or one of another version: {error}; {AGAIN}") from error
    return PretrainedImitate(model, settings, preprocessing, root).to(device)


def _check_branch(branch: str) -> None:
    """Of the branches that meet text."""
    if branch not in get_args(Section):
        raise ValueError(f"branch = {branch!r}: must be 'impression' or 'findings'")


@torch.no_grad()
def _temperature(model: ImitateModel, config: RunConfig) -> float:
    return config.objective.temperature.init if model.temperature is None else model.temperature().item()


def _text_encoder_settings(folder: Path | None) -> dict[str, Any] | None:
    if folder is None:
        return None
    about = describe_text_encoder(folder)
    return {name: about.get(name) for name in ("kind", "fingerprint")}


def _write_export(
    folder: Path,
    model: ImitateModel,
    settings: dict[str, Any],
    preprocessing: dict[str, Any],
    text_encoder_folder: Path | None,
    card: str,
) -> None:
    # one entry: safetensors writes several in random order, and equal models are to be equal files
    metadata = {"synthetic": str(settings["synthetic"]).lower()}
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("temperature.")  # a number in CONFIG, learned or not
    }
    with new_export(folder) as part:
        save_file(state, part / WEIGHTS, metadata=metadata)
        save_file(_timm_state(model), part / BACKBONE, metadata={"format": "pt"})
        write_settings(part, settings, preprocessing)
        (part / CARD).write_text(card)
        if text_encoder_folder is not None:
            shutil.copytree(text_encoder_folder, part / TEXT_ENCODER)


def _timm_state(model: ImitateModel) -> dict[str, Tensor]:
    """The backbone's weights under the names of timm.create_model(name), which has no idea of features_only."""
    state = model.image_encoder.state_by_timm_name()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
