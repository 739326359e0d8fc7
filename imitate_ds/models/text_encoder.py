"""Frozen text encoders: a report section in, one vector out. They run once, before training, and at inference.

Two kinds. A Hugging Face encoder, pooled at its first token, as IMITATE does with Bio_ClinicalBERT (Liu et al., 2023).
And latent semantic analysis ("Indexing by latent semantic analysis", Deerwester et al., 1990), fitted on the training
reports, for where no hub can be reached. Neither is ever pickled: a saved folder is JSON, safetensors and a tokenizer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from imitate_ds.models.text_encoder_folder import LSA, describe_text_encoder

DEFAULT_ENCODER = "emilyalsentzer/Bio_ClinicalBERT"


class TextEncoder(Protocol):
    """What both kinds have in common."""

    kind: str
    width: int  # of its vectors
    fingerprint: str  # equal for what gives equal vectors

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """float32 [n, width] on the CPU; a missing text is a zero row."""
        ...

    def save(self, folder: Path) -> None:
        """Write a folder that load_text_encoder reads."""
        ...


def load_text_encoder(name_or_folder: str, max_tokens: int = 0) -> TextEncoder:
    """A folder that `save` wrote, a folder with a Hugging Face model, or the name of one on the hub.

    max_tokens: that a Hugging Face encoder reads of a text; 0: as many as `save` noted, or 256. Raises FileNotFoundError
    where it is nowhere, ValueError where the folder is something else.
    """
    if name_or_folder == LSA:
        raise ValueError("text encoder = 'lsa': is fitted on the training reports; use 'imitate-ds shards embed'")
    folder = Path(name_or_folder)
    about = describe_text_encoder(folder)
    # Each kind has a package of its own that takes long to import.
    if about.get("kind") == LSA:
        from imitate_ds.models.lsa_encoder import LsaEncoder

        return LsaEncoder.load(folder)
    from imitate_ds.models.huggingface_encoder import MAX_TOKENS, HuggingFaceEncoder

    return HuggingFaceEncoder.load(name_or_folder, max_tokens or about.get("max_tokens", MAX_TOKENS))
