import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

from imitate_ds.data.radiographs import decode_radiograph
from imitate_ds.data.sources.phantom import render_radiograph
from imitate_ds.data.stored_images import MAX_SCANS, MAX_STORED_SIDE, decode_stored


def encoded(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **{"quality": 95, **options})
    return buffer.getvalue()


def picture(height: int, width: int) -> np.ndarray:
    """A smooth picture with some grain, uint8 [height, width]."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse) + rng.normal(0, 4, (height, width)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def radiograph() -> bytes:
    return encoded(render_radiograph(0, 1, 256))


def claiming(data: bytes, height: int, width: int) -> bytes:
    """The JPEG with another size in its header."""
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[place + 4 :]


def test_pixels_are_those_of_pillow(radiograph):
    for data in (radiograph, encoded(picture(301, 517)), encoded(picture(17, 9)), encoded(picture(1, 1))):
        image = decode_stored(data)
        assert image.dtype == torch.uint8
        assert image.is_contiguous()
        np.testing.assert_array_equal(image[0].numpy(), decode_radiograph(data))
    np.testing.assert_array_equal(
        decode_stored(encoded(picture(64, 80), progressive=True))[0], decode_stored(encoded(picture(64, 80)))[0]
    )


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_colour_becomes_grey(mode):
    grey = picture(64, 80)
    buffer = io.BytesIO()
    Image.fromarray(grey).convert("RGB").convert(mode).save(buffer, "JPEG", quality=95)
    image = decode_stored(buffer.getvalue())
    assert image.shape == (1, 64, 80)
    assert np.abs(image[0].numpy().astype(int) - grey).mean() < 3


@pytest.mark.parametrize(
    ("shape", "at_least"),
    [
        ((38, 65), (1, 38)),
        ((76, 130), (39, 76)),
        ((113, 194), (77, 113)),
        ((151, 259), (114, 151)),
        ((189, 324), (152, 189)),
        ((301, 517), (0, 190, 301, 302, 5000)),
    ],
)
def test_at_least_is_about_the_shorter_side(shape, at_least):
    wide, tall = encoded(picture(301, 517)), encoded(picture(517, 301))
    for side in at_least:
        assert decode_stored(wide, at_least=side).shape == (1, *shape)
        assert decode_stored(tall, at_least=side).shape == (1, *shape[::-1])


@pytest.mark.parametrize("side", [32, 64, 96, 128, 160])
def test_a_smaller_decode_is_the_average_of_the_larger(radiograph, side):
    whole, small = decode_stored(radiograph), decode_stored(radiograph, at_least=side)
    assert small.shape == (1, side, side)
    averaged = resize(whole, [side, side], antialias=True)
    assert (small.int() - averaged.int()).abs().double().mean() < 2


def test_every_truncation_is_refused(radiograph):
    rng = random.Random(0)
    ends = {*range(len(radiograph) - 40, len(radiograph)), *rng.sample(range(len(radiograph)), 100), 0, 1, 2, 3}
    for end in ends:
        with pytest.raises(ValueError, match=r"^(damaged|not a) JPEG image$"):
            decode_stored(radiograph[:end])
        with pytest.raises(ValueError, match=r"^(damaged|not a) JPEG image$"):
            decode_stored(radiograph[:end], at_least=64)


def test_a_hole_is_refused(radiograph):
    for start in range(800, len(radiograph) - 600, 500):
        with pytest.raises(ValueError, match=r"^damaged JPEG image$"):
            decode_stored(radiograph[:start] + bytes(512) + radiograph[start + 512 :])


def test_random_damage_is_refused_in_our_words_or_decodes(radiograph):
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        data = bytearray(radiograph)
        for _ in range(rng.choice((1, 4))):
            data[rng.randrange(3, 700 if rng.random() < 0.7 else len(data))] = rng.randrange(256)
        try:
            assert decode_stored(bytes(data)).dtype == torch.uint8
        except ValueError as error:
            refused += 1
            assert str(error).partition(":")[0] in ("damaged JPEG image", "JPEG image too large")  # noqa: PT017
            assert error.__suppress_context__ or error.__context__ is None, "the decoder's words stay inside"  # noqa: PT017
    assert refused > 100


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + bytes(60), bytes(1000)])
def test_what_is_no_jpeg_is_refused(data):
    with pytest.raises(ValueError, match=r"^not a JPEG image$"):
        decode_stored(data)


def test_a_large_image_is_refused_before_its_pixels_are_read(radiograph):
    for height, width in ((65_000, 65_000), (MAX_STORED_SIDE + 1, 8), (8, MAX_STORED_SIDE + 1)):
        with pytest.raises(ValueError, match="too large: a side of more than 4,096 pixels"):
            decode_stored(claiming(radiograph, height, width))
    assert decode_stored(encoded(np.zeros((MAX_STORED_SIDE, 16), np.uint8))).shape == (1, MAX_STORED_SIDE, 16)


def test_a_small_file_of_many_scans_is_refused():
    data = encoded(np.zeros((512, 512), np.uint8), progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(ValueError, match=f"too large: more than {MAX_SCANS} scans"):
        decode_stored(data[:-2] + scan * MAX_SCANS + data[-2:])
