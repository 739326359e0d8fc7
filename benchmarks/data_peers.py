"""The pipelines that benchmarks/data.py compares ours with, as their users write them: Pillow, torchvision, a DataLoader.

All give two uint8 views of a sample, uint8 [B, 2, 1, h, w]. What else a run needs they leave out, which makes them faster:
no text embeddings, no keys, no resume in mid-epoch, nothing that keeps a study from being its own negative, no checksums.
"""

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms as v1
from torchvision.transforms import v2
from webdataset.compat import FluidInterface, WebDataset, WebLoader

from imitate_ds.config import AugmentConfig
from imitate_ds.data.shard_index import ShardIndex, read_samples
from imitate_ds.data.stored_images import decode_stored
from imitate_ds.data.transforms import ASPECT, VIEWS, TrainViews

WORKERS = 2
SHUFFLE = 1000  # samples in the buffer of WebDataset, as its documentation has it
ENDLESS = 10**9  # samples: an epoch's end, where workers run dry, never comes
FORMS = {"v1 on Pillow": (v1, False), "v2 on Pillow": (v2, False), "v2 on uint8 tensors": (v2, True)}

Views = Callable[[Image.Image], Tensor]


def torchvision_views(config: AugmentConfig, input_size: int, form: str) -> Views:
    """Two views of a grey radiograph uint8 [V, 1, h, w], by the transforms that torchvision has for each setting."""
    kit, on_tensors = FORMS[form]
    steps = [kit.PILToTensor()] if on_tensors else []
    steps += _transforms(kit, config, input_size)
    steps += [] if on_tensors else [kit.PILToTensor()]
    transform = kit.Compose(steps)
    return lambda image: torch.stack([transform(image) for _ in range(VIEWS)])


def _transforms(kit, config: AugmentConfig, input_size: int) -> list:
    """In the published order, with torchvision's defaults: a rotation takes the nearest pixel, which is its fastest."""
    low, high = config.crop_scale
    crop = kit.RandomCrop(input_size) if low == high else kit.RandomResizedCrop(input_size, (low, high), ASPECT)
    settings = {
        kit.RandomHorizontalFlip: (config.horizontal_flip,),
        kit.RandomVerticalFlip: (config.vertical_flip,),
        kit.RandomRotation: (config.rotation,),
        kit.RandomPerspective: (config.perspective, config.perspective_p),
        kit.RandomAutocontrast: (config.autocontrast,),
        kit.ColorJitter: (config.brightness, config.contrast),
    }
    return [crop, *(transform(*values) for transform, values in settings.items() if any(values[:1]))]


def open_image(data: bytes) -> Image.Image:
    """As .decode("pill") of WebDataset does."""
    return Image.open(io.BytesIO(data)).convert("L")


def webdataset(urls: list[str], views: Views, batch: int) -> Iterator[Tensor]:
    """WebDataset: tars read from end to end, Pillow, a shuffle buffer in each worker."""
    pipeline = _stream(urls).decode("pill", only=["jpg"]).to_tuple("jpg").map_tuple(views).batched(batch, partial=False)
    return (images for (images,) in _web_loader(pipeline))


def webdataset_with_ours(urls: list[str], views: TrainViews, batch: int, *, at_once: bool) -> Iterator[Tensor]:
    """WebDataset with our decoder and views, sample by sample or a batch at once: what is left is its way of reading."""
    numbers = itertools.count()

    def decode(data: bytes) -> Tensor:
        return decode_stored(data, at_least=views.decode_side)

    def both_views(images: list[Tensor]) -> Tensor:
        return views(torch.stack(images), views.draw([next(numbers) for _ in images]))

    stream = _stream(urls).to_tuple("jpg").map_tuple(decode)
    if at_once:
        batches = stream.listed(batch, partial=False).map(lambda rows: both_views([image for (image,) in rows]))
        return iter(_web_loader(batches))
    pipeline = stream.map_tuple(lambda image: both_views([image])[0]).batched(batch, partial=False)
    return (images for (images,) in _web_loader(pipeline))


def loose_files(files: list[Path], views: Views, batch: int) -> Iterator[Tensor]:
    """A Dataset of JPEG files, opened by Pillow."""
    return iter(_loader(_Items(len(files), lambda place: views(Image.open(files[place]).convert("L"))), batch))


def memory_mapped(path: Path, views: Views, batch: int) -> Iterator[Tensor]:
    """The published layout: all radiographs in one .npy, decoded beforehand, mapped into memory."""
    pixels = np.load(path, mmap_mode="r")
    return iter(_loader(_Items(len(pixels), lambda place: views(Image.fromarray(pixels[place]))), batch))


def write_loose_files(index: ShardIndex, split: str, folder: Path) -> list[Path]:
    """The radiographs of a split as files of their own."""
    paths = []
    for member, data, _ in read_samples(index, split):
        paths.append(folder / f"{member.key}.jpg")
        paths[-1].write_bytes(data)
    return paths


def write_array(index: ShardIndex, split: str, path: Path) -> None:
    """The radiographs of a split as one array uint8 [N, H, W]."""
    samples = sum(shard.samples for shard in index.of_split(split))
    shape = (samples, index.image_size, index.image_size)
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    for row, (_, data, _) in enumerate(read_samples(index, split)):
        pixels[row] = np.asarray(open_image(data))
    pixels.flush()


class _Items(Dataset):
    """A map-style dataset from a function."""

    def __init__(self, samples: int, item: Callable[[int], Tensor]):
        self.samples, self.item = samples, item

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, place: int) -> Tensor:
        return self.item(place)


def _loader(items: _Items, batch: int) -> DataLoader:
    """shuffle=True, one epoch after another without the pause between them."""
    sampler = RandomSampler(items, num_samples=ENDLESS)
    return DataLoader(items, batch, sampler=sampler, num_workers=WORKERS, multiprocessing_context="fork")


def _stream(urls: list[str]) -> FluidInterface:
    """Tars drawn with replacement, as its users train: a worker's epoch never ends, and no batch is cut off there."""
    return WebDataset(urls, resampled=True, shardshuffle=False).shuffle(SHUFFLE)


def _web_loader(pipeline: FluidInterface) -> Iterable:
    return WebLoader(pipeline, batch_size=None, num_workers=WORKERS, multiprocessing_context="fork")
