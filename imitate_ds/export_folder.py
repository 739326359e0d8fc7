"""A folder that a model leaves the house in: found, read and written the same for every kind of model."""

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from imitate_ds.data.radiographs import load_radiograph
from imitate_ds.data.square import prepare_radiograph

CONFIG, WEIGHTS, PREPROCESSOR, CARD = "config.json", "model.safetensors", "preprocessor_config.json", "README.md"
SIZES = {"image_size": int, "input_size": int}  # what PREPROCESSOR must hold
AGAIN = "copy the export again, or export the run again"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_export(folder: str | Path, *, how: str) -> Path:
    """A local folder first, else a model id at the Hugging Face hub. how: what to do where there is none.

    Raises FileNotFoundError.
    """
    root = Path(folder)
    if not root.is_dir():
        # a mistyped path below a folder that is here is no name at the hub
        if not HUB_ID.fullmatch(str(folder)) or Path(root.parts[0]).exists():
            raise FileNotFoundError(f"{root}: no such folder; {how}")
        root = _download(str(folder), how)
    for name in (CONFIG, WEIGHTS, PREPROCESSOR):
        if not (root / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}, so not an export; {how}")
    return root


def read_settings(root: Path, form: str, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """CONFIG and PREPROCESSOR of an export. Raises ValueError where it is not one of this form, or lacks what is wanted."""
    settings, preprocessing = _read_json(root / CONFIG), _read_json(root / PREPROCESSOR)
    if settings.get("format") != form:
        raise ValueError(f"{root / CONFIG}: format = {settings.get('format')!r}: must be {form!r}")
    for name, content, keys in ((CONFIG, settings, wanted), (PREPROCESSOR, preprocessing, SIZES)):
        if lacking := [key for key, kind in keys.items() if not isinstance(content.get(key), kind)]:
            raise ValueError(f"{root / name}: lacks {', '.join(lacking)}; {AGAIN}")
    return settings, preprocessing


def write_settings(folder: Path, settings: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    (folder / PREPROCESSOR).write_text(json.dumps(preprocessing, indent=2) + "\n")


@contextmanager
def new_export(folder: Path) -> Iterator[Path]:
    """An empty folder to write in, beside the target; it takes its place at the end, so that a killed export leaves the old
    one, or none.

    Raises ValueError where the target is something else.
    """
    folder = folder.resolve()  # "." has no name
    if folder.exists() and not (folder / CONFIG).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an export; name another folder, or remove it")
    scratch = secrets.token_hex(4)  # two nodes may write the same export
    part = folder.with_name(f".{folder.name}.part-{scratch}")
    part.mkdir(parents=True)
    try:
        yield part
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{scratch}")
            folder.rename(old)
            part.rename(folder)
            shutil.rmtree(old)
        else:
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_square(path: str | Path, size: int, place: int) -> Tensor:
    """A file as uint8 [size, size]; errors name its place in the list, never the file, for its name may hold a patient id."""
    try:
        return torch.from_numpy(prepare_radiograph(load_radiograph(path), size))
    except OSError as error:
        raise OSError(error.errno, f"images[{place}]: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"images[{place}]: {error}") from None


def _download(name: str, how: str) -> Path:
    try:
        safe = ["*.safetensors", "*.json", "*.txt", "*.md"]  # never a pickle
        return Path(snapshot_download(name, allow_patterns=safe))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name}: no such folder, and the hub gave no model of that name ({type(error).__name__}); {how}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}; {AGAIN}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object, found {type(content).__name__}; {AGAIN}")
    return content
