"""The text encoder of a run with text.mode online, as a plan needs it: its shape, not its weights, and how long reports are."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from imitate_ds.batch import Tokens, is_missing
from imitate_ds.config import RunConfig
from imitate_ds.data.shard_index import INDEX, ShardIndex, load_index, read_samples
from imitate_ds.data.shard_store import is_remote
from imitate_ds.data.text_cache import TEXT_INDEX
from imitate_ds.models.huggingface_encoder import TextShape, look_up_shape
from imitate_ds.models.text_encoder import DEFAULT_ENCODER
from imitate_ds.models.text_tower import Layers, TextTower, check_max_tokens
from imitate_ds.planning.assumptions import USUAL_TOKENS
from imitate_ds.recipe import online_encoder

MEASURED = 256  # studies whose reports are read to learn how long reports are


class PlannedText(NamedTuple):
    shape: TextShape
    tokens: tuple[int, int]  # of a study's findings and impression, in the mean
    longest: int  # tokens of the longest section
    source: str  # where this comes from, for people


def read_text(config: RunConfig) -> PlannedText:
    """From what lies on this machine, else assumed. Raises FileNotFoundError or ValueError where pre-training would."""
    place = config.data.shards[0].shards
    folder = load_index(Path(place)) if not is_remote(place) and (Path(place) / INDEX).is_file() else None
    embedded = folder is not None and (folder.root / TEXT_INDEX).is_file()
    encoder = online_encoder(config.text, folder) if folder and embedded else config.text.encoder or DEFAULT_ENCODER
    shape = look_up_shape(encoder, config.text.max_tokens)
    check_max_tokens(config.text, shape.max_tokens)
    said = encoder if shape.tokenize else f"{encoder} is not here, a BERT-base is assumed"
    if folder and shape.tokenize:
        tokens, longest = _tokens_of_reports(folder, shape.tokenize)
        return PlannedText(shape, tokens, longest, f"{said}; {sum(tokens)} tokens in a report of {folder.root}")
    findings, impression = (min(count, shape.max_tokens) for count in USUAL_TOKENS)
    said = f"{said}; {findings + impression} tokens in a report assumed"
    return PlannedText(shape, (findings, impression), shape.max_tokens, said)


def _tokens_of_reports(
    folder: ShardIndex, tokenize: Callable[[Sequence[str]], list[list[int]]]
) -> tuple[tuple[int, int], int]:
    """Of findings and impression of the first reports for training, in the mean over studies; and of the longest section."""
    reports = list(islice(_reports(folder), MEASURED))

    def lengths(section: int) -> list[int]:
        return [len(row) for row in tokenize([it[section] for it in reports if not is_missing(it[section])])]

    findings, impression = lengths(0), lengths(1)

    def mean(section: list[int]) -> int:
        return max(1, round(sum(section) / max(1, len(reports))))

    return (mean(findings), mean(impression)), max([*findings, *impression], default=1)


def _reports(folder: ShardIndex) -> Iterator[tuple[str, str]]:
    return ((meta["findings"], meta["impression"]) for _, _, meta in read_samples(folder, "train"))


class PlannedTower(TextTower):
    """Reads sections of one length, where the real one looks how long each is: tensors of a trace hold no numbers.

    Where sections share rows, a study is a row here. Real rows are as long as the longest section and hold several, which makes
    attention dearer: a twentieth of BERT-base's operations at 256 tokens. Where a section is a row, all are as long as the
    longest.
    """

    def __init__(self, text: PlannedText, trainable_layers: Layers, *, on_cuda: bool):
        # A GPU's fused attention drops out by itself; a CPU's gives way to one that writes all of it out.
        super().__init__(text.shape.build(attention_dropout=not on_cuda), trainable_layers)
        self._text = text

    def forward(self, tokens: Tokens, *, with_findings: bool = True) -> Tensor:
        studies, sections = len(tokens.lengths), 1 + with_findings
        findings, impression = self._text.tokens
        if self._packs:
            rows, length = studies, impression + findings * with_findings
            options = {"position_ids": torch.zeros(rows, length, dtype=torch.long)}
        else:
            rows, length, options = studies * sections, self._text.longest, {}
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool)  # of two dimensions it would be looked into
        ids = torch.zeros(rows, length, dtype=torch.long)
        states = self.model(input_ids=ids, attention_mask=mask, **options).last_hidden_state
        starts = torch.zeros(studies * sections, dtype=torch.long)
        vectors = states.flatten(0, 1)[starts].float()
        return vectors.new_zeros(2 * studies, self.width).index_copy(0, starts, vectors).view(studies, 2, self.width)
