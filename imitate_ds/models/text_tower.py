"""A text encoder that runs in training, and learns: tokens of report sections in, one vector each out.

The vector is that of the first token in the last layer, as models.text_encoder has it of a frozen one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from imitate_ds.batch import Tokens
from imitate_ds.config import TextConfig
from imitate_ds.models.text_encoder import HuggingFaceEncoder, load_text_encoder

TOWER = "text_tower."  # what the names of its parameters begin with, in the model that has one
MODEL = f"{TOWER}model."
Layers = int | Literal["all"]


class TextTower(nn.Module):
    """What does not learn has no gradient, is in evaluation mode whatever train() says, and keeps nothing for backward."""

    def __init__(self, model: PreTrainedModel, trainable_layers: Layers):
        """trainable_layers: how many layers learn, from the last, or "all": everything does that the vector depends on.

        Raises ValueError where the model has not so many, or where they cannot be told apart.
        """
        super().__init__()
        self.model = model
        self.width: int = model.config.hidden_size
        self._pad = getattr(model.config, "pad_token_id", None) or 0
        self._learns = _learning_modules(model, trainable_layers)
        of_vector = _parameters_of_vector(model)
        learning = {id(parameter) for module in self._learns for parameter in module.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in learning and id(parameter) in of_vector)

    def train(self, mode: bool = True) -> "TextTower":
        super().train(False)
        self.training = mode
        for module in self._learns:
            module.train(mode)
        return self

    def forward(self, tokens: Tokens, *, with_findings: bool = True) -> Tensor:
        """Findings and impression of all reports in one pass: float32 [B, 2, E]; rows of what is missing are zero.

        with_findings=False leaves findings out as if they were missing.
        """
        lengths, wanted = tokens.lengths, tokens.lengths > 0  # on the CPU: nothing of ours waits for the device
        wanted[:, 0] &= with_findings
        rows = wanted.flatten().nonzero().squeeze(1)
        vectors = self._vectors(tokens, rows if len(rows) else torch.zeros(1, dtype=torch.long))
        vectors = vectors[: len(rows)]  # of none there was one: other ranks wait for gradients, so something must pass
        whole = vectors.new_zeros(lengths.numel(), self.width)
        return whole.index_copy(0, rows.to(vectors.device), vectors).view(*lengths.shape, self.width)

    def _vectors(self, tokens: Tokens, rows: Tensor) -> Tensor:
        """Of these sections, in one batch that is as long as the longest: float32 [n, E]."""
        lengths, device = tokens.lengths.flatten(), tokens.ids.device
        inside = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]  # [2 B, longest]
        ids = torch.full(inside.shape, self._pad, device=device)
        ids = ids.masked_scatter(inside.to(device), tokens.ids.long())[rows.to(device)]
        mask = inside[rows].long()
        mask[:, 0] = 1  # an empty one would be attended to nowhere, which is not a number
        return self.model(input_ids=ids, attention_mask=mask.to(device)).last_hidden_state[:, 0].float()


class TextSource(NamedTuple):
    """Where the text encoder of a run comes from, looked at before anything is built."""

    name_or_folder: str
    max_tokens: int
    fingerprint: str  # before it learns
    width: int
    tokenize: Callable[[Sequence[str]], list[list[int]]]


def open_text_source(config: TextConfig, name_or_folder: str) -> TextSource:
    """Raises FileNotFoundError or ValueError where this is no Hugging Face encoder, or not one that can learn as config says."""
    disable_progress_bar()  # every rank would draw its own
    try:
        encoder = load_text_encoder(name_or_folder, config.max_tokens)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"text.encoder = {name_or_folder!r}: neither a folder with a Hugging Face model and tokenizer, nor the name of one "
            "that is here or at the hub; where there is a network run 'hf download NAME --local-dir DIR' and name DIR"
        ) from error
    if not isinstance(encoder, HuggingFaceEncoder):
        raise ValueError(
            f"text.encoder = {name_or_folder!r}: is of kind {encoder.kind}, which cannot learn; name a Hugging Face encoder"
        )
    if config.max_tokens > encoder.max_tokens:
        raise ValueError(
            f"text.max_tokens = {config.max_tokens}: this encoder reads {encoder.max_tokens} at most; lower it, or leave it out"
        )
    _learning_modules(encoder.model, config.trainable_layers)
    return TextSource(name_or_folder, encoder.max_tokens, encoder.fingerprint, encoder.width, encoder.tokenize)


def build_text_tower(config: TextConfig, source: TextSource) -> TextTower:
    encoder = HuggingFaceEncoder.load(source.name_or_folder, source.max_tokens)
    return TextTower(encoder.model, config.trainable_layers)


def trained_encoder(source: TextSource, weights: Mapping[str, Tensor]) -> HuggingFaceEncoder:
    """The encoder as it has become. weights: by their names in a model with a text tower; others are passed over."""
    own = {name.removeprefix(MODEL): tensor for name, tensor in weights.items() if name.startswith(MODEL)}
    return HuggingFaceEncoder.load(source.name_or_folder, source.max_tokens, own)


def _learning_modules(model: PreTrainedModel, count: Layers) -> list[nn.Module]:
    if count == "all":
        return [model]
    if count == 0:
        return []
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if not lists:
        raise ValueError(
            f"text.trainable_layers = {count}: the layers of this {type(model).__name__} cannot be told apart; take 0, or all"
        )
    if count > len(lists[0]):
        raise ValueError(f"text.trainable_layers = {count}: this encoder has {len(lists[0])}; name fewer, or all")
    return list(lists[0][-count:])


def _parameters_of_vector(model: PreTrainedModel) -> set[int]:
    """What the vector depends on. A pooler, say, would wait for its gradient for ever."""
    parameters = list(model.parameters())
    model.requires_grad_(True)
    ids = torch.zeros(1, 2, dtype=torch.long, device=parameters[0].device)
    vector = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
    found = torch.autograd.grad(vector.sum(), parameters, allow_unused=True)
    return {id(parameter) for parameter, gradient in zip(parameters, found, strict=True) if gradient is not None}
