"""Transformers of the Hugging Face hub as text encoders, pooled at their first token; and their shapes without weights."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
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
from imitate_ds.models.text_encoder_folder import (
    HUGGINGFACE,
    LSA,
    describe,
    describe_text_encoder,
    encode_present,
    fingerprint_of,
)

MAX_TOKENS = 256
NO_CODE = {"trust_remote_code": False}  # else transformers asks at the keyboard, of every rank
PROBE = "No acute Cardiopulmonary abnormality; XXXX ___ 2.5 cm."  # how a tokenizer cuts this is part of its fingerprint


class HuggingFaceEncoder:
    """A transformer of the hub, frozen, in eval mode and float32: the last layer's vector at the first token."""

    kind = HUGGINGFACE

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int = MAX_TOKENS):
        self.model = model.eval().float().requires_grad_(False)
        self._tokenizer = tokenizer
        self.max_tokens = _readable_tokens(model.config, tokenizer, max_tokens)
        self.width: int = model.config.hidden_size
        about = {"kind": self.kind, "pooling": "cls", "max_tokens": self.max_tokens}
        about |= {"vocabulary": sorted(tokenizer.get_vocab().items()), "probe": tokenizer(PROBE)["input_ids"]}
        self.fingerprint = fingerprint_of(about, model.state_dict())

    @classmethod
    def load(
        cls, name_or_folder: str, max_tokens: int = MAX_TOKENS, weights: Mapping[str, Tensor] | None = None
    ) -> "HuggingFaceEncoder":
        """Load from a local folder, the local cache, or the hub; onto the CUDA device where there is one.

        weights: the model's, instead of those found there. Code that lies beside them is never run. Raises FileNotFoundError
        where it is in none of them, ValueError where it is not whole, or nothing without its own code.
        """
        _, tokenizer = _config_and_tokenizer(name_or_folder)
        with _said(name_or_folder):
            model, found = AutoModel.from_pretrained(
                name_or_folder, dtype=torch.float32, output_loading_info=True, **NO_CODE
            )
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
        return encode_present(self._encode, self.width, texts, batch_size)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        about = {"kind": self.kind, "width": self.width, "max_tokens": self.max_tokens}
        describe(folder, {**about, "fingerprint": self.fingerprint})

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(texts), truncation=True, max_length=self.max_tokens, padding=True, return_tensors="pt"
        )
        return self.model(**tokens.to(self.model.device)).last_hidden_state[:, 0].float().cpu()


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
        with _said(config.name_or_path or ""):
            return AutoModel.from_config(config, dtype=torch.float32)


def look_up_shape(name_or_folder: str, max_tokens: int = 0) -> TextShape:
    """Of what lies on this machine; nothing is fetched. max_tokens: as load_text_encoder has it.

    Raises ValueError where it is a latent semantic analysis, or a folder that is not whole.
    """
    about = describe_text_encoder(Path(name_or_folder))
    if LSA in (name_or_folder, about.get("kind")):
        raise ValueError(cannot_learn(name_or_folder, LSA))
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
    """The message of an encoder that was named to learn, and is of a kind that has no gradient."""
    return f"text.encoder = {name_or_folder!r}: is of kind {kind}, which cannot learn; name a Hugging Face encoder"


@contextmanager
def _said(name_or_folder: str) -> Iterator[None]:
    """What transformers raises, as FileNotFoundError where nothing is there, as ValueError where it cannot be read."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (
        Exception
    ) as error:  # of JSON of another form than it expects what may come, of tokenizers no other kind than this
        if "trust_remote_code" in str(error):
            raise ValueError(_wants_own_code(name_or_folder)) from None
        if isinstance(error, (OSError, ValueError)) and not _is_here(name_or_folder):
            raise FileNotFoundError(_how_to_get(name_or_folder)) from error
        raise ValueError(
            f"text encoder = {name_or_folder!r}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())}); "
            "copy or download it again, or install what it asks for"
        ) from error


def _is_here(name_or_folder: str) -> bool:
    """In a folder, or in the hub's cache."""
    if Path(name_or_folder).is_dir():
        return (Path(name_or_folder) / "config.json").is_file()
    try:
        return isinstance(try_to_load_from_cache(name_or_folder, "config.json"), str)
    except HFValidationError:  # such a name the hub cannot have
        return False


def _config_and_tokenizer(
    name_or_folder: str, *, local_files_only: bool = False
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    with _said(name_or_folder):
        config = AutoConfig.from_pretrained(name_or_folder, local_files_only=local_files_only, **NO_CODE)
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder, local_files_only=local_files_only, **NO_CODE)
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
