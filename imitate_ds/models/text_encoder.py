"""Frozen text encoders: a report section in, one vector out. They run once, before training, and at inference.

Two kinds. A Hugging Face encoder, pooled at its first token, as IMITATE does with Bio_ClinicalBERT (Liu et al., 2023).
And latent semantic analysis ("Indexing by latent semantic analysis", Deerwester et al., 1990), fitted on the training
reports, for where no hub can be reached. Neither is ever pickled: a saved folder is JSON, safetensors and a tokenizer.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import imitate_ds.models.cxr_bert  # noqa: F401  # makes it known
from imitate_ds.batch import is_missing

DEFAULT_ENCODER = "emilyalsentzer/Bio_ClinicalBERT"
DESCRIPTION = "imitate_text_encoder.json"
MAX_TOKENS = 256
# Words of two letters or more ("no" counts); `XXXX` and `___` are de-identification blanks and say nothing.
WORD = r"\b(?!x{3,}\b)[^\W\d_]{2,}\b"
MAX_TERMS = 30_000  # words and pairs of words; 30 MB of weights at dim = 256
PROBE = "No acute Cardiopulmonary abnormality; XXXX ___ 2.5 cm."  # how a tokenizer cuts this is part of its fingerprint


class LsaEncoder:
    """TF-IDF of words and pairs of words, projected on the leading directions of the training reports; unit rows.

    Make one with `LsaEncoder.fit` or `load_text_encoder`. A text without one known word becomes a zero row.
    """

    kind: Literal["lsa"] = "lsa"

    def __init__(self, terms: Sequence[str], idf: Tensor, components: Tensor):
        """terms, in column order; idf float32 [T]; components float32 [E, T]."""
        self._terms, self._idf, self._components = list(terms), idf, components
        self._vectorizer = _vectorizer(vocabulary={term: column for column, term in enumerate(terms)})
        self._vectorizer.idf_ = idf.double().numpy()
        self.width = components.shape[0]
        self.fingerprint = _fingerprint(
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
        return _encode_present(self._encode, self.width, texts, batch_size)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "terms.json").write_text(json.dumps(self._terms, ensure_ascii=False), encoding="utf-8")
        save_file({"idf": self._idf, "components": self._components}, folder / "lsa.safetensors")
        _describe(folder, {"kind": self.kind, "width": self.width, "fingerprint": self.fingerprint})

    def _encode(self, texts: Sequence[str]) -> Tensor:
        rows = self._vectorizer.transform(texts) @ self._components.double().numpy().T
        return torch.nn.functional.normalize(torch.from_numpy(rows), dim=1).float()


class HuggingFaceEncoder:
    """A transformer of the hub, frozen, in eval mode and float32: the last layer's vector at the first token."""

    kind: Literal["huggingface"] = "huggingface"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int = MAX_TOKENS):
        self.model = model.eval().float().requires_grad_(False)
        self._tokenizer = tokenizer
        self.max_tokens = _readable_tokens(model.config, tokenizer, max_tokens)
        self.width: int = model.config.hidden_size
        about = {"kind": self.kind, "pooling": "cls", "max_tokens": self.max_tokens}
        about |= {"vocabulary": sorted(tokenizer.get_vocab().items()), "probe": tokenizer(PROBE)["input_ids"]}
        self.fingerprint = _fingerprint(about, model.state_dict())

    @classmethod
    def load(
        cls, name_or_folder: str, max_tokens: int = MAX_TOKENS, weights: Mapping[str, Tensor] | None = None
    ) -> "HuggingFaceEncoder":
        """Load from a local folder, the local cache, or the hub; onto the CUDA device where there is one.

        weights: the model's, instead of those found there. Code that lies beside them is never run. Raises FileNotFoundError
        where it is in none of them, ValueError where it is not whole, or nothing without its own code.
        """
        _, tokenizer = _config_and_tokenizer(name_or_folder)
        try:
            model, found = AutoModel.from_pretrained(
                name_or_folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise FileNotFoundError(_how_to_get(name_or_folder)) from error
        except SafetensorError as error:
            raise ValueError(f"text encoder = {name_or_folder!r}: damaged weights ({error}); copy it again") from error
        missing = set(found["missing_keys"])
        _drop_pooler(model, missing)
        if weights is not None:
            model.load_state_dict(weights)
        elif lacking := sorted(name for name in missing if not name.startswith("pooler.")):
            raise ValueError(
                f"text encoder = {name_or_folder!r}: {len(lacking)} weights are missing, {lacking[0]} among them; copy or "
                "download it again"
            )
        return cls(model.to(_device()), tokenizer, max_tokens)

    @property
    def tokenize(self) -> Callable[[Sequence[str]], list[list[int]]]:
        """Texts -> the ids of their tokens, as encode reads them. It holds no weights, so workers can have it."""
        return partial(_token_ids, self._tokenizer, self.max_tokens)

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """float32 [n, E] on the CPU; a missing text is a zero row."""
        return _encode_present(self._encode, self.width, texts, batch_size)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        about = {"kind": self.kind, "width": self.width, "max_tokens": self.max_tokens}
        _describe(folder, {**about, "fingerprint": self.fingerprint})

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(texts), truncation=True, max_length=self.max_tokens, padding=True, return_tensors="pt"
        )
        return self.model(**tokens.to(self.model.device)).last_hidden_state[:, 0].float().cpu()


TextEncoder = LsaEncoder | HuggingFaceEncoder


def load_text_encoder(name_or_folder: str, max_tokens: int = 0) -> TextEncoder:
    """A folder that `save` wrote, a folder with a Hugging Face model, or the name of one on the hub.

    max_tokens: that a Hugging Face encoder reads of a text; 0: as many as `save` noted, or 256. Raises FileNotFoundError
    where it is nowhere, ValueError where the folder is something else.
    """
    if name_or_folder == LsaEncoder.kind:
        raise ValueError("text encoder = 'lsa': is fitted on the training reports; use 'imitate-ds shards embed'")
    folder = Path(name_or_folder)
    about = describe_text_encoder(folder)
    if not about:
        return HuggingFaceEncoder.load(name_or_folder, max_tokens or MAX_TOKENS)
    if about.get("kind") == LsaEncoder.kind:
        return LsaEncoder.load(folder)
    if about.get("kind") == HuggingFaceEncoder.kind:
        return HuggingFaceEncoder.load(name_or_folder, max_tokens or about.get("max_tokens", MAX_TOKENS))
    raise ValueError(f"{folder / DESCRIPTION}: kind = {about.get('kind')!r}: must be 'lsa' or 'huggingface'")


class TextShape(NamedTuple):
    """A Hugging Face encoder without its weights."""

    config: PretrainedConfig
    max_tokens: int  # that are read of a text
    # None: it is not here, and this is a BERT-base in its place
    tokenize: Callable[[Sequence[str]], list[list[int]]] | None

    def build(self, *, attention_dropout: bool = True) -> PreTrainedModel:
        """With random weights, in float32 as HuggingFaceEncoder loads it."""
        config = deepcopy(self.config)
        if not attention_dropout:
            for name in ("attention_probs_dropout_prob", "attention_dropout"):  # BERT's and DistilBERT's
                if hasattr(config, name):
                    setattr(config, name, 0.0)
        return AutoModel.from_config(config, dtype=torch.float32)


def look_up_shape(name_or_folder: str, max_tokens: int = 0) -> TextShape:
    """Of what lies on this machine; nothing is fetched. max_tokens: as load_text_encoder has it.

    Raises ValueError where it is a latent semantic analysis, or a folder that is not whole.
    """
    about = describe_text_encoder(Path(name_or_folder))
    if LsaEncoder.kind in (name_or_folder, about.get("kind")):
        raise ValueError(cannot_learn(name_or_folder, LsaEncoder.kind))
    wanted = max_tokens or about.get("max_tokens", MAX_TOKENS)
    try:
        config, tokenizer = _config_and_tokenizer(name_or_folder, local_files_only=True)
    except FileNotFoundError:
        if Path(name_or_folder).is_dir():
            raise
        assumed = BertConfig()
        return TextShape(assumed, min(wanted, assumed.max_position_embeddings), None)
    read = _readable_tokens(config, tokenizer, wanted)
    return TextShape(config, read, partial(_token_ids, tokenizer, read))


def cannot_learn(name_or_folder: str, kind: str) -> str:
    return f"text.encoder = {name_or_folder!r}: is of kind {kind}, which cannot learn; name a Hugging Face encoder"


def describe_text_encoder(folder: Path) -> dict[str, Any]:
    """What `save` noted in a folder: kind, width, fingerprint; empty where it wrote nothing there."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise ValueError(f"{path}: not a JSON object; copy the folder again, or run 'imitate-ds shards embed'")
    return about


def _vectorizer(**options: Any) -> TfidfVectorizer:
    return TfidfVectorizer(token_pattern=WORD, ngram_range=(1, 2), sublinear_tf=True, **options)


def _encode_present(
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


def _config_and_tokenizer(
    name_or_folder: str, *, local_files_only: bool = False
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Raises FileNotFoundError where they are nowhere, ValueError where they are damaged or run only with their own code."""
    own_code = {"trust_remote_code": False}  # else transformers asks at the keyboard, of every rank
    try:
        config = AutoConfig.from_pretrained(name_or_folder, local_files_only=local_files_only, **own_code)
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder, local_files_only=local_files_only, **own_code)
    except Exception as error:  # JSON of another form than transformers expects raises what it may
        if "trust_remote_code" in str(error):
            raise ValueError(_wants_own_code(name_or_folder)) from None
        if (Path(name_or_folder) / "config.json").is_file():
            raise ValueError(
                f"text encoder = {name_or_folder!r}: config.json or the tokenizer's files are missing or damaged "
                f"({type(error).__name__}: {' '.join(str(error).split())}); copy or download it again"
            ) from error
        if isinstance(error, (OSError, ValueError)):
            raise FileNotFoundError(_how_to_get(name_or_folder)) from error
        raise
    words = getattr(config, "vocab_size", 0)
    if 2 * len(tokenizer) < words:  # transformers makes up 5 tokens where the vocabulary is missing
        raise ValueError(
            f"text encoder = {name_or_folder!r}: its tokenizer knows {len(tokenizer)} tokens, its model {words}; the "
            "folder lacks tokenizer.json or vocab.txt"
        )
    return config, tokenizer


def _readable_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    return min(wanted, getattr(config, "max_position_embeddings", wanted), tokenizer.model_max_length)


def _token_ids(tokenizer: PreTrainedTokenizerBase, max_tokens: int, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"] if texts else []


def _fingerprint(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """16 hex characters over settings and weights: equal for what gives equal embeddings."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _describe(folder: Path, values: dict[str, Any]) -> None:
    (folder / DESCRIPTION).write_text(json.dumps(values, indent=2), encoding="utf-8")


def _drop_pooler(model: PreTrainedModel, missing: set[str]) -> None:
    """What transformers made up where the weights have none: nothing reads it, and its fingerprint would change each time."""
    if any(name.startswith("pooler.") for name in missing):
        model.pooler = None  # type: ignore[assignment]  # as add_pooling_layer=False has it


def _device() -> torch.device:
    wanted = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "") != "cpu"
    return torch.device("cuda" if wanted else "cpu")


def _how_to_get(name: str) -> str:
    return (
        f"text encoder = {name!r}: not a folder with a Hugging Face model and tokenizer, and the hub has no such model "
        f"or cannot be reached; where there is a network run 'hf download {name} --local-dir DIR' and pass DIR, or use "
        "'lsa', which needs no download"
    )


def _wants_own_code(name: str) -> str:
    return (
        f"text encoder = {name!r}: runs only with Python code that lies in its repository, which this program never "
        "executes; use an encoder that transformers knows itself (BERT and its kind, CXR-BERT among them)"
    )
