"""The text encoder of a run with text.mode online, as a plan needs it: its shape, not its weights, and how long reports are."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from imitate_ds.batch import Tokens
from imitate_ds.config import DataConfig, RunConfig
from imitate_ds.data.shard_index import INDEX, ShardIndex, read_metas
from imitate_ds.data.shard_urls import is_remote
from imitate_ds.data.text_cache import TEXT_INDEX, sections_of
from imitate_ds.data.train_plan import open_train_folders
from imitate_ds.models.huggingface_encoder import TextShape, look_up_shape
from imitate_ds.models.text_encoder import DEFAULT_ENCODER
from imitate_ds.models.text_tower import Layers, TextTower, check_max_tokens
from imitate_ds.planning.assumptions import USUAL_SPREAD, USUAL_TOKENS
from imitate_ds.recipe import online_encoder

MEASURED = 256  # studies of a folder whose reports are read to learn how long reports are
CROWDED = 3  # standard deviations above the mean: a run of ten thousand steps meets such a micro batch about ten times


class Lengths(NamedTuple):
    """Tokens of reports."""

    findings: float  # in the mean over studies
    impression: float  # likewise; of the text that the highest level is aligned with (data.impression_text)
    spread: float  # standard deviation of a study's sum
    longest: int  # of a section, of those that were counted
    most: int  # that the encoder reads of a section

    def of_a_study(self, met: float | None = None) -> tuple[int, int]:
        """Findings and impression: in the mean, or where long ones meet in a micro batch of so many studies."""
        mean = max(1.0, self.findings + self.impression)
        more = 1.0 if met is None else 1 + CROWDED * self.spread / met**0.5 / mean
        findings, impression = (max(1, min(self.most, round(part * more))) for part in (self.findings, self.impression))
        return findings, impression


class PlannedText(NamedTuple):
    shape: TextShape
    lengths: Lengths
    source: str  # where this comes from, for people


def folders_here(data: DataConfig) -> list[ShardIndex]:
    """The run's folders where all of them lie on this machine, else none. Their tars need not."""
    places = [part.shards for part in data.shards]
    here = all(not is_remote(place) and (Path(place) / INDEX).is_file() for place in places)
    return open_train_folders(data, check_files=False) if here else []


def read_text(config: RunConfig) -> PlannedText:
    """From what lies on this machine, else assumed. Raises FileNotFoundError or ValueError where pre-training would."""
    folders = folders_here(config.data)
    embedded = bool(folders) and (folders[0].root / TEXT_INDEX).is_file()
    encoder = online_encoder(config.text, folders[0]) if embedded else config.text.encoder or DEFAULT_ENCODER
    shape = look_up_shape(encoder, config.text.max_tokens)
    if shape.tokenize is None:
        said = f"{encoder} is not here, a BERT-base is assumed"
        return PlannedText(shape, *_usual(config.data, shape, said))
    check_max_tokens(config.text, shape.max_tokens)
    found = [_counted(folder, config.data, shape.tokenize) for folder in folders]
    if not found or not all(map(len, found)):
        return PlannedText(shape, *_usual(config.data, shape, encoder))
    # As many are counted of a large folder as of a small one, but an epoch passes so often over all of each.
    parts = zip(config.data.shards, folders, strict=True)
    weights = [part.weight * _studies(folder, config.data) for part, folder in parts]
    findings, impression = np.average([counts.mean(0) for counts in found], axis=0, weights=weights).tolist()
    mean = findings + impression
    sums = [counts.sum(1) for counts in found]
    square = np.average([(counts.astype(float) ** 2).mean() for counts in sums], weights=weights)
    spread = max(0.0, square - mean**2) ** 0.5
    longest = max(int(counts.max()) for counts in found)
    lengths = Lengths(findings, impression, float(spread), longest, shape.max_tokens)
    places = ", ".join(str(folder.root) for folder in folders)
    return PlannedText(shape, lengths, f"{encoder}; {mean:.0f} tokens in a report of {places}")


def _usual(data: DataConfig, shape: TextShape, said: str) -> tuple[Lengths, str]:
    findings, impression = USUAL_TOKENS
    second = impression if data.impression_text == "impression" else findings + impression
    first, second = min(findings, shape.max_tokens), min(second, shape.max_tokens)
    lengths = Lengths(first, second, USUAL_SPREAD * (first + second), shape.max_tokens, shape.max_tokens)
    return lengths, f"{said}; {first + second} tokens in a report assumed"


def _counted(folder: ShardIndex, data: DataConfig, tokenize: Callable[[Sequence[str]], list[list[int]]]) -> np.ndarray:
    """Tokens of both texts of the first studies for training, int [n, 2]; none where a tar is not here, or cut."""
    try:
        reports = list(islice(_reports(folder, data), MEASURED))
    except (OSError, ValueError):
        return np.zeros((0, 2), int)
    columns = [[len(row) for row in _present(tokenize, [texts[place] for texts in reports])] for place in (0, 1)]
    return np.array(columns, int).T


def _studies(folder: ShardIndex, data: DataConfig) -> int:
    return sum(shard.samples for shard in folder.of_split(data.train_split))


def _reports(folder: ShardIndex, data: DataConfig) -> Iterator[tuple[str, str]]:
    for shard in folder.of_split(data.train_split):
        for _, meta in read_metas(folder, shard):
            sections = sections_of(meta)
            yield sections["findings"], sections[data.impression_text]


def _present(tokenize: Callable[[Sequence[str]], list[list[int]]], texts: list[str]) -> list[list[int]]:
    """A missing text has no tokens, not even those that mark its ends."""
    rows = iter(tokenize([text for text in texts if text]))
    return [next(rows) if text else [] for text in texts]


class PlannedTower(TextTower):
    """Reads sections of one length, where the real one looks how long each is: tensors of a trace hold no numbers.

    Where sections share rows, a study is a row here. Real rows are as long as the longest section and hold several, which makes
    attention dearer: by 4 % of BERT-base's operations at 280 tokens a row, and on a CPU by a third of its memory. Where a
    section is a row, all are as long as the longest: one of full length is met sooner or later.
    """

    def __init__(self, text: PlannedText, trainable_layers: Layers, *, on_cuda: bool):
        # A GPU's fused attention drops out by itself; a CPU's gives way to one that writes all of it out.
        super().__init__(text.shape.build(attention_dropout=not on_cuda), trainable_layers)
        self._lengths = text.lengths
        self.met: float | None = None  # of how many studies long reports meet; None: those of the mean do

    def row_length(self, met: float | None, *, with_findings: bool) -> int:
        """Tokens of a row where long reports meet among `met` studies; None: where those of the mean do."""
        if not self._packs:
            return self._lengths.longest if met is None else self._lengths.most
        findings, impression = self._lengths.of_a_study(met)
        return impression + findings * with_findings

    def forward(self, tokens: Tokens, *, with_findings: bool = True) -> Tensor:
        studies, sections = len(tokens.lengths), 1 + with_findings
        length = self.row_length(self.met, with_findings=with_findings)
        if self._packs:
            rows = studies
            mask = torch.ones(rows, 1, length, length, dtype=torch.bool)  # of two dimensions it would be looked into
            options = {"position_ids": torch.zeros(rows, length, dtype=torch.long), "attention_mask": mask}
        else:
            rows, options = studies * sections, {}
        try:
            states = self.model(input_ids=torch.zeros(rows, length, dtype=torch.long), **options).last_hidden_state
        except RuntimeError as error:
            raise ValueError(
                f"text.encoder: what a {type(self.model).__name__} does depends on what it reads, so it cannot be planned "
                f"({error}); plan the rest with --set text.mode=cached"
            ) from error
        starts = torch.zeros(studies * sections, dtype=torch.long)
        vectors = states.flatten(0, 1)[starts].float()
        return vectors.new_zeros(2 * studies, self.width).index_copy(0, starts, vectors).view(studies, 2, self.width)
