"""What every kind of text encoder shares: how its folder describes it, its fingerprint, and which texts it is asked about."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imitate_ds.batch import is_missing

DESCRIPTION = "imitate_text_encoder.json"
AGAIN = "copy the folder again, or run 'imitate-ds shards embed'"
LSA, HUGGINGFACE = "lsa", "huggingface"  # the kinds


def describe_text_encoder(folder: Path) -> dict[str, Any]:
    """What `save` noted in a folder: kind, width, fingerprint; empty where it wrote nothing there.

    Raises ValueError where it is damaged, or of a kind that is not known.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise ValueError(f"{path}: not a JSON object; {AGAIN}")
    if about.get("kind") not in (LSA, HUGGINGFACE):
        raise ValueError(f"{path}: kind = {about.get('kind')!r}: must be '{LSA}' or '{HUGGINGFACE}'; {AGAIN}")
    if about["kind"] == HUGGINGFACE and type(about.get("max_tokens", 1)) is not int:
        raise ValueError(f"{path}: max_tokens = {about['max_tokens']!r}: must be a whole number; {AGAIN}")
    return about


def describe(folder: Path, values: dict[str, Any]) -> None:
    """Note kind, width and fingerprint in the folder of an encoder."""
    (folder / DESCRIPTION).write_text(json.dumps(values, indent=2), encoding="utf-8")


def fingerprint_of(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """16 hex characters over settings and weights: equal for what gives equal embeddings."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def encode_present(
    encode: Callable[[Sequence[str]], Tensor], width: int, texts: Sequence[str], batch_size: int
) -> Tensor:
    """Encode what is not missing, long texts first so that a batch holds texts of like length."""
    rows = torch.zeros(len(texts), width)
    present = [row for row, text in enumerate(texts) if not is_missing(text)]
    present.sort(key=lambda row: len(texts[row]), reverse=True)
    for start in range(0, len(present), batch_size):
        chosen = present[start : start + batch_size]
        rows[chosen] = encode([texts[row] for row in chosen])
    return rows
