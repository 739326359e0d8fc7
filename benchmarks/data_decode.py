"""What a sample costs a CPU core: JPEG decoders, and two augmented views, each measured in turn in one run.

    OMP_NUM_THREADS=1 python benchmarks/data_decode.py --out benchmarks/results/data_decode_NAME.json

Pictures are phantoms, grey JPEGs of quality 95. Decoders are Pillow, torchvision and simplejpeg, and OpenCV and PyTurboJPEG
where they are installed. Views are ours in chunks of several sizes, from images decoded as small as they may be; the
published augmentations as torchvision has them, on tensors and on Pillow images, from whole images; and ours written with
OpenCV. On a GPU ours alone, whole batches (--device cuda).
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from common import installed_version, machine, provenance, table
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from imitate_ds.config import AugmentConfig, build_run_config
from imitate_ds.data import transforms
from imitate_ds.data.radiographs import decode_radiograph
from imitate_ds.data.shard_sample import JPEG_QUALITY
from imitate_ds.data.sources.phantom import render_radiograph
from imitate_ds.data.stored_images import decode_stored
from imitate_ds.data.transforms import TrainViews

INPUT_SIZE = 224
PUBLISHED = [
    *(v2.RandomCrop(INPUT_SIZE), v2.RandomHorizontalFlip(0.5), v2.RandomVerticalFlip(0.5)),
    *(v2.RandomRotation(30), v2.RandomPerspective(0.5, p=0.5), v2.RandomAutocontrast(0.5)),
]
Timings = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.device.type == "cpu":
        torch.set_num_threads(1)
    measured = {}
    for size in (256, 512):
        pictures = [render_radiograph(0, number, size) for number in range(arguments.samples)]
        if arguments.device.type == "cpu":
            measured[f"decode {size}"] = measure(decoders([jpeg(picture) for picture in pictures]), arguments)
        for name, config in {"default": AugmentConfig(), "paper": preset("paper")}.items():
            forms = view_forms(np.stack(pictures), config, arguments.device)
            measured[f"views {size} to {INPUT_SIZE}, {name}"] = measure(forms, arguments)
    for name, rows in measured.items():
        print(f"\n{name}: microseconds a sample\n{report(rows)}")
    if arguments.out:
        facts = {"machine": machine(arguments.device), **provenance(), "microseconds": measured}
        packages = ("simplejpeg", "pillow", "torchvision", "opencv-python-headless", "PyTurboJPEG")
        facts["packages"] = {package: installed_version(package) for package in packages}
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


def preset(name: str) -> AugmentConfig:
    return build_run_config({"name": "benchmark", "preset": name, "data": {"shards": "none"}}).data.augment


def jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def decoders(files: list[bytes]) -> dict[str, Callable[[], object]]:
    """Each decodes all files once; those of the whole image are first held to Pillow's pixels."""
    whole: dict[str, Callable[[bytes], object]] = {
        "Pillow (decode_radiograph)": decode_radiograph,
        "torchvision": _torchvision,
        "simplejpeg": lambda data: simplejpeg.decode_jpeg(data, "GRAY"),
        "decode_stored": decode_stored,
    }
    if find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        whole["OpenCV"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    if find_spec("turbojpeg"):
        from turbojpeg import TJPF_GRAY, TurboJPEG

        decoder = TurboJPEG()
        whole["PyTurboJPEG"] = lambda data: decoder.decode(data, pixel_format=TJPF_GRAY)
    for name, decode in whole.items():
        for data in files:
            if not np.array_equal(np.ravel(np.asarray(decode(data))), decode_radiograph(data).ravel()):
                raise RuntimeError(f"{name} decodes to other pixels than Pillow")
    half = decode_stored(files[0]).shape[-1] // 2
    scaled = {
        "half size: Pillow draft": _draft,
        "half size: decode_stored": lambda data: decode_stored(data, at_least=half),
    }
    return {name: lambda f=f: [f(data) for data in files] for name, f in {**whole, **scaled}.items()}


def _torchvision(data: bytes) -> object:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.GRAY)


def _draft(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.draft("L", (image.width // 2, image.height // 2))
        return np.asarray(image)


def view_forms(pictures: np.ndarray, config: AugmentConfig, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each makes two views of every picture."""
    ours = TrainViews(config, INPUT_SIZE)
    images = torch.stack([decode_stored(jpeg(picture), at_least=ours.decode_side) for picture in pictures]).to(device)
    draws = ours.draw(range(len(images)))
    forms: dict[str, Callable[[], object]] = {}
    for samples in (1, 2, 4, 8, 16) if device.type == "cpu" else (len(images),):
        forms[f"ours, {samples} samples at once"] = lambda n=samples: _in_chunks(n, lambda: ours(images, draws))
    if device.type == "cpu":
        on_tensor, on_pillow = v2.Compose(PUBLISHED), v2.Compose([*PUBLISHED, v2.PILToTensor()])
        whole, films = torch.from_numpy(pictures)[:, None], [Image.fromarray(picture) for picture in pictures]
        forms["published, torchvision on tensors"] = lambda: [on_tensor(image) for image in whole for _ in range(2)]
        forms["published, torchvision on Pillow"] = lambda: [on_pillow(film) for film in films for _ in range(2)]
        if find_spec("cv2"):
            forms["ours in OpenCV"] = lambda: opencv_views(ours, images[:, 0].numpy(), draws)
    return forms


def _in_chunks(samples: int, make: Callable[[], torch.Tensor]) -> None:
    transforms.CHUNK_PIXELS = samples * transforms.VIEWS * INPUT_SIZE**2
    if make().is_cuda:
        torch.cuda.synchronize()


def opencv_views(ours: TrainViews, pictures: np.ndarray, draws: torch.Tensor) -> np.ndarray:
    """The same views but for rounding: one warpPerspective and one table of 256 levels each."""
    import cv2

    height, width = pictures.shape[1:]
    plans = ours._plans(draws, height, width).transpose(1, 2).double().numpy()
    to_pixels = np.array([[width / 2, 0, (width - 1) / 2], [0, height / 2, (height - 1) / 2], [0, 0, 1]])
    from_pixels = np.array([[2, 0, 1 - INPUT_SIZE], [0, 2, 1 - INPUT_SIZE], [0, 0, INPUT_SIZE]]) / INPUT_SIZE
    matrices = to_pixels @ plans[..., :9].reshape(*plans.shape[:2], 3, 3) @ from_pixels
    views = np.empty((*plans.shape[:2], 1, INPUT_SIZE, INPUT_SIZE), np.uint8)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    for i, j in np.ndindex(*plans.shape[:2]):
        view = cv2.warpPerspective(pictures[i], matrices[i, j], (INPUT_SIZE, INPUT_SIZE), flags=flags)
        views[i, j, 0] = cv2.LUT(view, _levels(view, ours.config, *plans[i, j, 9:]))
    return views


def _levels(view: np.ndarray, config: AugmentConfig, stretch: float, brightness: float, contrast: float) -> np.ndarray:
    import cv2

    levels = np.arange(256, dtype=np.float32)
    low, high, _, _ = cv2.minMaxLoc(view)
    if stretch and high > low:
        levels = np.floor(np.clip((levels - low) / ((high - low) / 255), 0, 255))
    if config.brightness:
        levels = np.floor(np.minimum(levels * brightness, 255))
    if config.contrast:
        counts = cv2.calcHist([view], [0], None, [256], [0, 256]).ravel()
        levels = np.clip(levels * contrast + counts @ levels / view.size * (1 - contrast), 0, 255)
    return levels.astype(np.uint8)


def measure(forms: dict[str, Callable[[], object]], arguments: argparse.Namespace) -> Timings:
    """Microseconds a sample of every repeat; forms take turns, so that a busy machine slows all of them alike."""
    timings: Timings = {name: [] for name in forms}
    for repeat in range(arguments.repeats + 1):
        for name, run in forms.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first one warms up
                timings[name].append(round((time.perf_counter() - start) * 1e6 / arguments.samples, 1))
    return timings


def report(timings: Timings) -> str:
    medians = {name: statistics.median(values) for name, values in timings.items()}
    slowest = max(medians.values())
    rows = [
        [name, f"{min(timings[name]):.0f}", f"{median:.0f}", f"{slowest / median:.2f}"]
        for name, median in medians.items()
    ]
    return table(["", "minimum", "median", "times as fast as the slowest"], rows)


if __name__ == "__main__":
    main()
