"""One sample from a shard folder: its radiograph by its offset in the tar, its embeddings by their row.

In any order, so a run starts anywhere without reading what came before. What is damaged is a ValueError or an OSError here;
what becomes of it is the loader's.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imitate_ds.data.shard_index import ShardEntry, ShardIndex, read_at
from imitate_ds.data.shard_plan import PlannedSample
from imitate_ds.data.shard_store import UnreachableError
from imitate_ds.data.stored_images import decode_stored
from imitate_ds.data.text_cache import load_text_cache, sections_of, sidecar_file, text_info

OPEN_SHARDS = 64  # tars a worker holds open; a batch of one rank lies in fewer
SAMPLED = 16  # data.verify = sampled compares every so-manieth sample


class Sample(NamedTuple):
    key: str
    image: Tensor  # uint8 [1, H, W]
    findings: Tensor  # float16 [E]
    impression: Tensor
    has_findings: bool
    has_impression: bool
    words: tuple[str, str] | None = None  # findings and impression, for a text encoder that runs in training


class _Texts(NamedTuple):
    """The embeddings of a shard that a run uses, what is there of them, and which rows are sound."""

    findings: Tensor  # float16 [n, E], mapped
    impression: Tensor
    has_findings: list[bool]
    has_impression: list[bool]
    finite: list[bool]


class _OpenShard(NamedTuple):
    file: BinaryIO
    texts: _Texts | None


class ShardReader:
    """Reads samples of one split in any order; holds the last few tars open and their embeddings mapped.

    Shards are counted over all folders. text_encoder: the fingerprint that embeddings must have, where it is known. verify:
    which radiographs are compared with their checksum, and whether embeddings are when their file is opened (data.verify).
    with_words: the texts themselves, besides their embeddings.
    """

    def __init__(
        self,
        folders: Sequence[ShardIndex],
        split: str,
        *,
        impression_text: str = "impression",
        with_text: bool = True,
        with_words: bool = False,
        text_encoder: str = "",
        verify: str = "full",
        may_lack_text: bool = False,
    ):
        self.impression_text = impression_text
        self.with_text, self.with_words = with_text, with_words
        self.verify = verify
        self._shards = [(folder, shard) for folder in folders for shard in folder.of_split(split)]
        self._starts = np.cumsum([0, *(shard.samples for _, shard in self._shards)])
        self.samples = int(self._starts[-1])
        self.remote = any(folder.store for folder in folders)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._failed: dict[int, Exception] = {}  # remote shards: asking again takes a minute, for every sample
        self._text_info = {folder.root: text_info(folder, fresh=False) for folder in folders} if with_text else {}
        if with_text:
            self._check_encoder(text_encoder)
        if with_text and not may_lack_text:
            self._check_embeddings()

    def row_of(self, sample: int) -> PlannedSample:
        """Where the n-th sample of the split lies."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return PlannedSample(shard, sample - int(self._starts[shard]), 0)

    def key(self, where: PlannedSample) -> str:
        return self._shards[where.shard][1].members.image(where.row)[0]

    def read(self, where: PlannedSample, *, at_least: int = 0) -> Sample:
        """One sample; at_least: a smaller decode will do, down to this side. ValueError or OSError where it is damaged."""
        (folder, shard), row = self._shards[where.shard], where.row
        opened = self._shard(where.shard)
        key, offset, size, crc = shard.members.image(row)
        data = read_at(opened.file, shard, offset, size, crc if self._verifies(where) else None)
        image = decode_stored(data, at_least=at_least, side=folder.image_size)
        if opened.texts is None:
            nothing = torch.empty(0)
            return Sample(key, image, nothing, nothing, False, False)
        if not opened.texts.finite[row]:
            raise ValueError("text embedding is not finite: run 'imitate-ds shards embed'")
        findings, impression, has_findings, has_impression, _ = opened.texts
        words = self._words(where, opened.file) if self.with_words else None
        return Sample(key, image, findings[row], impression[row], has_findings[row], has_impression[row], words)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Have the files of remote shards fetched in the background."""
        for folder, shard in (self._shards[number] for number in shards):
            texts = [sidecar_file(self._text_info[folder.root], shard)] if self.with_text else []
            folder.prefetch([shard.file, *texts])

    def _words(self, where: PlannedSample, file: BinaryIO) -> tuple[str, str]:
        _, shard = self._shards[where.shard]
        member = shard.members[where.row]
        crc = member.meta_crc if self._verifies(where) else None
        sections = sections_of(json.loads(read_at(file, shard, member.meta_offset, member.meta_size, crc)))
        return sections["findings"], sections[self.impression_text]

    def _verifies(self, where: PlannedSample) -> bool:
        return self.verify == "full" or (self.verify == "sampled" and (where.row + where.visit) % SAMPLED == 0)

    def _check_encoder(self, expected: str) -> None:
        encoders = {info["encoder"]: root for root, info in self._text_info.items()}
        if len(encoders) > 1:
            raise ValueError(
                f"data.shards: {', '.join(map(str, encoders.values()))} are embedded by different text encoders; embed "
                "the others with the first one: 'imitate-ds shards embed DIR --text-encoder FIRST/text_encoder'"
            )
        if expected and expected not in encoders:
            raise ValueError(
                f"data.shards: embedded anew during the run (encoder {', '.join(encoders)}; it began with {expected}); embed "
                "with the first one again, and go on with --set train.resume=true"
            )

    def _check_embeddings(self) -> None:
        """Embeddings of another build, and those that are missing, fail here and now."""
        for folder, shard in self._shards:
            if folder.store is None:
                load_text_cache(folder.root, shard, self._text_info[folder.root])  # maps the file only

    def _texts(self, folder: ShardIndex, shard: ShardEntry) -> _Texts:
        """The embeddings of both sections; looked through once, here, for numbers that are not finite."""
        info = self._text_info[folder.root]
        folder.fetch(sidecar_file(info, shard))
        text = load_text_cache(folder.root, shard, info, verify=self.verify != "off")
        impression, has_impression = text.impression, text.has_impression
        if self.impression_text == "report":
            impression, has_impression = text.report, text.has_findings | text.has_impression
        finite = text.findings.isfinite().all(dim=1) & impression.isfinite().all(dim=1)
        return _Texts(text.findings, impression, text.has_findings.tolist(), has_impression.tolist(), finite.tolist())

    def _shard(self, number: int) -> _OpenShard:
        if number in self._failed:
            raise self._failed[number]
        if number not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1].file.close()
            folder, shard = self._shards[number]
            try:
                self._open[number] = self._open_shard(folder, shard)
            except (ValueError, OSError) as error:
                if folder.store and not isinstance(error, (UnreachableError, PermissionError)):
                    self._failed[number] = error
                raise
        self._open.move_to_end(number)
        return self._open[number]

    def _open_shard(self, folder: ShardIndex, shard: ShardEntry) -> _OpenShard:
        texts = self._texts(folder, shard) if self.with_text else None
        file = folder.fetch(shard.file).open("rb")
        # Members are read in an order that no read-ahead can guess, and all of them within a window: have them brought, as
        # far as the device's own limit of reading ahead goes.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return _OpenShard(file, texts)
