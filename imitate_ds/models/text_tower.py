"""A text encoder that runs in training, and learns: tokens of report sections in, one vector each out.

The vector is that of the first token in the last layer, as models.text_encoder has it of a frozen one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from imitate_ds.batch import Tokens
from imitate_ds.config import TextConfig
from imitate_ds.models.huggingface_encoder import HuggingFaceEncoder, cannot_learn
from imitate_ds.models.imitate import TEXT_TOWER
from imitate_ds.models.text_encoder import load_text_encoder

MODEL = f"{TEXT_TOWER}model."
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
        # Several texts in a row want a model that takes positions as they are, and a mask by pairs of tokens.
        self._packs = isinstance(model, BertModel) and model.config._attn_implementation == "sdpa"
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
        wanted = tokens.lengths > 0  # on the CPU, as all that shapes follow from
        wanted[:, 0] &= with_findings
        texts = wanted.flatten().nonzero().squeeze(1)
        vectors = self._vectors(tokens, texts)
        whole = vectors.new_zeros(wanted.numel(), self.width).index_copy(0, texts.to(vectors.device), vectors)
        return whole.view(*wanted.shape, self.width)

    def _vectors(self, tokens: Tokens, texts: Tensor) -> Tensor:
        """Of the sections with these numbers, float32 [n, E]. Of none, too, the model is asked: other ranks wait for it."""
        lengths, device = tokens.lengths.flatten(), tokens.ids.device
        laid = _laid_out(lengths[texts], together=self._packs)
        source = (lengths.cumsum(0) - lengths)[texts].repeat_interleave(lengths[texts]) + laid.positions
        read, place, positions = (
            index.to(device, non_blocking=True) for index in (source, laid.places, laid.positions)
        )
        shape, blank = laid.owners.shape, torch.full((laid.owners.numel(),), self._pad, device=device)
        ids = blank.index_copy(0, place, tokens.ids[read].long()).view(shape)
        owners = laid.owners.to(device, non_blocking=True)
        if self._packs:
            mask = owners[:, None, :, None] == owners[:, None, None, :]  # nobody attends to another text
            options = {"position_ids": torch.zeros_like(blank).index_copy(0, place, positions).view(shape)}
        else:
            mask, options = (
                (owners >= 0).long(),
                {},
            )  # transformers looks whether it is all ones: one wait for the device
            mask[:, 0] = 1  # attention to nothing at all is not a number
        states = self.model(input_ids=ids, attention_mask=mask, **options).last_hidden_state
        vectors = states.flatten(0, 1)[laid.starts.to(device)]
        return vectors if vectors.dtype == torch.float64 else vectors.float()


class _Layout(NamedTuple):
    """Where n texts, T tokens together, lie in rows of one length; on the CPU."""

    starts: Tensor  # int64 [n], of the first token of each, counted through all rows
    places: Tensor  # int64 [T], of every token
    positions: Tensor  # int64 [T], in its text
    owners: Tensor  # int64 [rows, longest]: the number of the text that lies there, -1 where none does


def _laid_out(lengths: Tensor, *, together: bool) -> _Layout:
    """Rows as long as the longest text: one for each, or as many together as have room, the longest first.

    Sections differ in length by a factor of ten: 128 reports of Open-i fill 27,600 places one to a row, and 6,350 together,
    of which 6,280 are tokens.
    """
    sizes = lengths.tolist()
    longest = max(sizes, default=1)
    starts, left = [0] * len(sizes), []  # left: room in every row
    for text in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        row = next((row for row, room in enumerate(left) if together and room >= sizes[text]), len(left))
        left += [longest] if row == len(left) else []
        starts[text] = (row + 1) * longest - left[row]
        left[row] -= sizes[text]
    first = torch.tensor(starts, dtype=torch.long)
    positions = torch.arange(sum(sizes)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    places = first.repeat_interleave(lengths) + positions
    owners = torch.full((max(1, len(left)) * longest,), -1)
    owners[places] = torch.arange(len(sizes)).repeat_interleave(lengths)
    return _Layout(first, places, positions, owners.view(-1, longest))


class TextSource(NamedTuple):
    """Where the text encoder of a run comes from, looked at before anything is built."""

    name_or_folder: str
    max_tokens: int
    fingerprint: str  # before it learns
    width: int
    tokenize: Callable[[Sequence[str]], list[list[int]]]

    def build_tower(self, trainable_layers: Layers) -> TextTower:
        """With the weights that it has before it learns."""
        return TextTower(HuggingFaceEncoder.load(self.name_or_folder, self.max_tokens).model, trainable_layers)

    def trained(self, weights: Mapping[str, Tensor]) -> HuggingFaceEncoder:
        """The encoder as it has become. weights: by their names in a model with a text tower; others are passed over."""
        own = {name.removeprefix(MODEL): tensor for name, tensor in weights.items() if name.startswith(MODEL)}
        return HuggingFaceEncoder.load(self.name_or_folder, self.max_tokens, own)


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
        raise ValueError(cannot_learn(name_or_folder, encoder.kind))
    check_max_tokens(config, encoder.max_tokens)
    _learning_modules(encoder.model, config.trainable_layers)
    return TextSource(name_or_folder, encoder.max_tokens, encoder.fingerprint, encoder.width, encoder.tokenize)


def check_max_tokens(config: TextConfig, read: int) -> None:
    """read: as many tokens as the encoder reads of a text. Raises ValueError naming text.max_tokens where it asks for more."""
    if config.max_tokens > read:
        raise ValueError(
            f"text.max_tokens = {config.max_tokens}: this encoder reads {read} at most; lower it, or leave it out"
        )


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
