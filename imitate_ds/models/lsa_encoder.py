"""Latent semantic analysis of reports, for where no hub can be reached."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from imitate_ds.batch import is_missing
from imitate_ds.models.text_encoder_folder import LSA, describe, describe_text_encoder, encode_present, fingerprint_of

# Words of two letters or more ("no" counts); `XXXX` and `___` are de-identification blanks and say nothing.
WORD = r"\b(?!x{3,}\b)[^\W\d_]{2,}\b"
MAX_TERMS = 30_000  # words and pairs of words; 30 MB of weights at dim = 256


class LsaEncoder:
    """TF-IDF of words and pairs of words, projected on the leading directions of the training reports; unit rows.

    Make one with `LsaEncoder.fit` or `models.text_encoder.load_text_encoder`. A text without one known word becomes a zero row.
    """

    kind = LSA

    def __init__(self, terms: Sequence[str], idf: Tensor, components: Tensor):
        """terms, in column order; idf float32 [T]; components float32 [E, T]."""
        self._terms, self._idf, self._components = list(terms), idf, components
        self._vectorizer = _vectorizer(vocabulary={term: column for column, term in enumerate(terms)})
        self._vectorizer.idf_ = idf.double().numpy()
        self.width = components.shape[0]
        self.fingerprint = fingerprint_of(
            {"kind": self.kind, "terms": self._terms}, {"idf": idf, "components": components}
        )

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int = 256, seed: int = 0) -> "LsaEncoder":
        """Fit on report sections, each a document; a text that is given twice counts twice.

        `width` is dim, or the number of texts or of terms where that is smaller. A term is a word or a pair of words; from
        100 texts on, one that occurs in at least two of them. Raises ValueError where dim < 2, where fewer than two
        different texts are given, and where they hold no words, or fewer than two terms.
        """
        if dim < 2:
            raise ValueError(f"dim = {dim}: must be at least 2")
        known = [text for text in texts if not is_missing(text)]
        if len(set(known)) < 2:
            raise ValueError(f"lsa: {len(set(known))} different texts to fit on; must be at least 2")
        # A term seen once says nothing about likeness, but a handful of reports has few terms seen twice.
        vectorizer = _vectorizer(min_df=2 if len(known) >= 100 else 1, max_features=MAX_TERMS)
        if not any(map(vectorizer.build_analyzer(), known)):
            raise ValueError("lsa: the texts to fit on hold no words")
        rows = vectorizer.fit_transform(known)
        svd = TruncatedSVD(min(dim, *rows.shape), random_state=seed).fit(rows)
        components = torch.from_numpy(np.ascontiguousarray(svd.components_, dtype=np.float32))
        return cls(vectorizer.get_feature_names_out().tolist(), torch.from_numpy(vectorizer.idf_).float(), components)

    @classmethod
    def load(cls, folder: Path) -> "LsaEncoder":
        """Read what `save` wrote. Raises ValueError where a file is missing, damaged, or of another encoder."""
        again = "copy it again, or run 'imitate-ds shards embed'"
        try:
            tensors = load_file(folder / "lsa.safetensors")
            terms = json.loads((folder / "terms.json").read_text(encoding="utf-8"))
            encoder = cls(terms, tensors["idf"], tensors["components"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            name = type(error).__name__  # its message may hold words of reports
            raise ValueError(f"{folder}: text encoder with missing or damaged files ({name}); {again}") from None
        if encoder.fingerprint != describe_text_encoder(folder).get("fingerprint"):
            raise ValueError(f"{folder}: text encoder with files that do not belong together; {again}")
        return encoder

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """float32 [n, E]; a missing text is a zero row."""
        return encode_present(self._encode, self.width, texts, batch_size)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "terms.json").write_text(json.dumps(self._terms, ensure_ascii=False), encoding="utf-8")
        save_file({"idf": self._idf, "components": self._components}, folder / "lsa.safetensors")
        describe(folder, {"kind": self.kind, "width": self.width, "fingerprint": self.fingerprint})

    def _encode(self, texts: Sequence[str]) -> Tensor:
        rows = self._vectorizer.transform(texts) @ self._components.double().numpy().T
        return torch.nn.functional.normalize(torch.from_numpy(rows), dim=1).float()


def _vectorizer(**options: Any) -> TfidfVectorizer:
    return TfidfVectorizer(token_pattern=WORD, ngram_range=(1, 2), sublinear_tf=True, **options)
