import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from imitate_ds.data import radiographs
from imitate_ds.data.radiographs import (
    content_box,
    decode_radiograph,
    fit_square,
    load_radiograph,
    prepare_radiograph,
)


def ramp(height=40, width=60, top=255):
    """Brighter from left to right, 0..top."""
    return np.tile(np.linspace(0, top, width).round().astype(np.uint16 if top > 255 else np.uint8), (height, 1))


def save(path, image, **options):
    image.save(path, **options)
    return path


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_jpeg_and_png_of_8_bits_come_back_as_they_are(tmp_path):
    pixels = ramp()
    png = load_radiograph(save(tmp_path / "a.png", Image.fromarray(pixels)))
    jpeg = load_radiograph(save(tmp_path / "a.jpg", Image.fromarray(pixels), quality=95))
    assert png.dtype == jpeg.dtype == np.uint8
    np.testing.assert_array_equal(png, pixels)
    assert np.abs(jpeg.astype(int) - pixels).max() <= 4


@pytest.mark.parametrize("top", [4095, 65535])
def test_16_bit_png_is_scaled_and_not_clipped_to_white(tmp_path, top):
    pixels = load_radiograph(save(tmp_path / "a.png", Image.fromarray(ramp(top=top))))
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - ramp()).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "P", "LA", "RGBA", "1"])
def test_every_mode_becomes_grey(tmp_path, mode):
    pixels = load_radiograph(save(tmp_path / "a.png", Image.fromarray(ramp()).convert(mode)))
    assert pixels.shape == (40, 60)
    assert pixels[:, 0].max() == 0
    assert pixels[:, -1].min() == 255


def test_what_is_transparent_is_black():
    image = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    image.paste((200, 200, 200, 255), (2, 2, 6, 6))
    pixels = decode_radiograph(encoded(image, "PNG"))
    assert pixels[0, 0] == 0
    assert pixels[3, 3] == 200


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg_is_refused(progressive):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG", progressive=progressive)
    with pytest.raises(ValueError, match=r"damaged image file \(OSError\)"):
        decode_radiograph(data[: len(data) // 2])


def test_damaged_png_and_other_files_are_refused():
    data = encoded(Image.fromarray(ramp()), "PNG")
    with pytest.raises(ValueError, match=r"damaged image file \(.*Error\)$"):
        decode_radiograph(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a JPEG, PNG, TIFF or DICOM image"):
        decode_radiograph(b"<html>404</html>")
    with pytest.raises(ValueError, match="not a JPEG, PNG, TIFF or DICOM image"):
        decode_radiograph(b"")


def png_that_claims(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    with pytest.raises(ValueError, match="image too large: more than 178,956,970 pixels"):
        decode_radiograph(png_that_claims(20_000, 20_000))
    monkeypatch.setattr(radiographs, "MAX_PIXELS", 1_000)
    with pytest.raises(ValueError, match="image too large: 2,400 pixels, more than 1,000"):
        decode_radiograph(encoded(Image.fromarray(ramp()), "PNG"))


def test_values_that_are_not_finite_are_refused():
    pixels = ramp().astype(np.float32)
    assert np.abs(decode_radiograph(encoded(Image.fromarray(pixels), "TIFF")).astype(int) - ramp()).max() <= 1
    pixels[3, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        decode_radiograph(encoded(Image.fromarray(pixels), "TIFF"))


def test_a_constant_16_bit_image_is_refused():
    with pytest.raises(ValueError, match="one pixel value"):
        decode_radiograph(encoded(Image.fromarray(np.full((8, 8), 900, np.uint16)), "PNG"))


def test_no_message_shows_the_path(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        load_radiograph(tmp_path / "patient17.png")
    (tmp_path / "patient17.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a JPEG") as damaged:
        load_radiograph(tmp_path / "patient17.jpg")
    assert "patient17" not in f"{missing.value}{damaged.value}"


# DICOM


def save_dicom(path, pixels, photometric="MONOCHROME2", bits=16, **tags):
    """A DX image written by pydicom, uncompressed; tags are DICOM keywords."""
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.PatientID = "patient17"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = pixels.itemsize * 8
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def distance(pixels, expected):
    return np.abs(pixels.astype(int) - expected).max()


@pytest.mark.parametrize(("bits", "top"), [(8, 255), (12, 4095), (16, 65535)])
def test_dicom_without_a_window_shows_its_whole_range(tmp_path, bits, top):
    pixels = load_radiograph(save_dicom(tmp_path / "a.dcm", ramp(top=top), bits=bits))
    assert pixels.dtype == np.uint8
    assert distance(pixels, ramp()) <= 1


def test_monochrome1_is_turned_over(tmp_path):
    pixels = load_radiograph(save_dicom(tmp_path / "a.dcm", ramp(top=4095), "MONOCHROME1", bits=12))
    assert distance(pixels, 255 - ramp()) <= 1


def test_monochrome1_is_turned_over_after_its_window(tmp_path):
    """A window on the lower quarter: above it white, in MONOCHROME1 black."""
    path = save_dicom(tmp_path / "a.dcm", ramp(top=4095), "MONOCHROME1", bits=12, WindowCenter=512, WindowWidth=1024)
    pixels = load_radiograph(path)
    assert pixels[0, 0] == 255
    assert pixels[0, 30:].max() == 0
    assert 100 < pixels[0, 7] < 160


def test_window_sets_the_contrast(tmp_path):
    path = save_dicom(
        tmp_path / "a.dcm", ramp(top=4095), bits=12, WindowCenter=["2048", "9"], WindowWidth=["1024", "9"]
    )
    pixels = load_radiograph(path)
    assert pixels[0, 20] == 0
    assert pixels[0, 40] == 255
    assert 100 < pixels[0, 30] < 160


@pytest.mark.parametrize(
    "window",
    [
        {"WindowCenter": 2048, "WindowWidth": 0},
        {"WindowCenter": "", "WindowWidth": ""},
        {"WindowCenter": [2048, 100], "WindowWidth": [0, 100]},
        {"WindowCenter": 63000, "WindowWidth": 10},
    ],
    ids=["width 0", "empty", "first of two has width 0", "beside the values"],
)
def test_a_window_that_shows_nothing_gives_way_to_percentiles(tmp_path, window):
    values = ramp(top=4095)
    values[0, 0] = 60_000  # a hot pixel must not darken the rest
    pixels = load_radiograph(save_dicom(tmp_path / "a.dcm", values, **window))
    assert distance(pixels[1:], ramp()[1:]) <= 1


def test_signed_values_with_rescale_and_a_window_around_zero(tmp_path):
    values = np.tile(np.linspace(-1000, 1000, 60).round().astype(np.int16), (40, 1))
    path = save_dicom(tmp_path / "a.dcm", values, RescaleSlope=2, RescaleIntercept=0, WindowCenter=0, WindowWidth=2000)
    pixels = load_radiograph(path)
    assert pixels[0, 14] == 0  # -525 * 2 is below the window
    assert pixels[0, 45] == 255
    assert 120 <= pixels[0, 29] <= 130


def test_colour_dicom_becomes_grey(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", np.repeat(ramp()[..., None], 3, axis=2), "RGB", bits=8)
    np.testing.assert_array_equal(load_radiograph(path), ramp())


def test_dicom_is_known_by_its_content_or_by_its_suffix(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    path = save_dicom(tmp_path / "IM-0001", ramp(), bits=8)
    dataset = pydicom.dcmread(path)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, pydicom.Dataset(dataset), implicit_vr=True, little_endian=True)
    (tmp_path / "bare.dcm").write_bytes(buffer.getvalue())  # no preamble, as old archives wrote them
    assert distance(load_radiograph(path), ramp()) <= 1
    assert distance(load_radiograph(tmp_path / "bare.dcm"), ramp()) <= 1


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"NumberOfFrames": 3}, "3 frames"),
        ({"Rows": 30_000, "Columns": 30_000}, "image too large"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR"),
        ({"Rows": 41}, r"damaged DICOM file \(ValueError\)"),
        ({"RescaleSlope": float("nan"), "RescaleIntercept": 0}, "not finite"),
        ({"PixelData": np.full((40, 60), 7, np.uint8).tobytes()}, "one pixel value"),
    ],
    ids=["frames", "size", "palette", "truncated", "not finite", "constant"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dicom_that_is_no_radiograph_is_refused(tmp_path, tags, message):
    path = save_dicom(tmp_path / "a.dcm", ramp(), bits=8, **tags)
    with pytest.raises(ValueError, match=message) as error:
        load_radiograph(path)
    assert "patient17" not in str(error.value)


def test_damaged_dicom_is_refused(tmp_path):
    data = save_dicom(tmp_path / "a.dcm", ramp(), bits=8).read_bytes()
    for part in (b"", b"nothing at all", data[:140], data[:400]):
        (tmp_path / "b.dcm").write_bytes(part)
        with pytest.raises(ValueError, match="damaged DICOM"):
            load_radiograph(tmp_path / "b.dcm")


def mutations(data, count, start=0):
    """Copies of data with bytes changed from `start` on, one in four also cut short; the same ones every time."""
    rng = np.random.default_rng(0)
    for number in range(count):
        copy = bytearray(data)
        for place in rng.integers(start, len(copy), rng.integers(1, 9)):
            copy[place] = rng.integers(256)
        yield bytes(copy[: rng.integers(start, len(copy))] if number % 4 == 3 else copy)


OWN_WORDS = (
    r"damaged (DICOM|image) file \(\w+\)|not a JPEG, PNG, TIFF or DICOM image|image too large: .*"
    r"|image has (one pixel value|values that are not finite)|DICOM file has -?\d+ frames; .*|DICOM pixels in .*"
)


def decoded_or_refused(decode, data):
    try:
        pixels = decode(data)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 2
    assert re.fullmatch(f"|{OWN_WORDS}", refusal)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_damage_to_an_image_escapes(kind):
    for data in mutations(encoded(Image.fromarray(ramp(top=255 if kind == "JPEG" else 4095)), kind), 150):
        decoded_or_refused(decode_radiograph, data)


@pytest.mark.parametrize("kind", ["bits", "fields"])
def test_no_damage_to_a_dicom_file_escapes(tmp_path, recwarn, caplog, kind):
    tags = {"StudyDate": "20200101", "RescaleSlope": 2, "RescaleIntercept": 0, "WindowCenter": 9, "WindowWidth": 9}
    path = save_dicom(tmp_path / "a.dcm", ramp(8, 8, top=4095), bits=12, **tags)
    data = path.read_bytes()
    recwarn.clear()
    caplog.clear()
    for copy in mutations(data, 400, 132) if kind == "bits" else broken_fields(data):
        path.write_bytes(copy)
        decoded_or_refused(lambda _: load_radiograph(path), copy)
    assert not recwarn.list  # pydicom's would quote values of the header
    assert not caplog.records


def broken_fields(data):
    """The length of a number, the text of a number, and the transfer syntax, each as no file should have it."""
    rows = data.index(b"\x28\x00\x10\x00US")
    yield data[: rows + 6] + b"\x03\x00abc" + data[rows + 10 :]
    slope = data.index(b"\x28\x00\x53\x10DS")
    yield data[: slope + 8] + b"p7" + data[slope + 10 :]
    yield data.replace(b"1.2.840.10008.1.2.1\x00", b"1.2.840.10008.1.2.99", 1)
    yield data.replace(b"1.2.840.10008.1.2.1\x00", b"patient17 was here. ", 1)


def test_dicom_without_pydicom_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM")
    monkeypatch.setattr(radiographs, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'imitate-ds\[dicom\]'"):
        load_radiograph(tmp_path / "a.dcm")


# The square


def textured(height, width, seed=0):
    return np.random.default_rng(seed).integers(60, 200, (height, width), np.uint8)


def test_constant_borders_are_cropped_whatever_their_grey():
    pixels = np.zeros((100, 120), np.uint8)
    pixels[:, :10] = 255
    pixels[20:90, 15:115] = textured(70, 100)
    assert content_box(pixels) == (20, 90, 15, 115)
    assert content_box(np.pad(pixels, 9, constant_values=255)) == (29, 99, 24, 124)
    framed = np.pad(textured(50, 50), 7, constant_values=2)
    assert content_box(framed + np.arange(64, dtype=np.uint8) % 2) == (7, 57, 7, 57)


def test_a_ramp_keeps_its_place():
    top, bottom, left, right = content_box(ramp(60, 60))
    assert (top, bottom) == (0, 60)
    assert left <= 2
    assert right >= 58


@pytest.mark.parametrize("shape", [(80, 50), (50, 80), (33, 33)])
def test_square_keeps_the_aspect_and_pads_with_black(shape):
    square = prepare_radiograph(textured(*shape), 64)
    assert square.shape == (64, 64)
    assert square.dtype == np.uint8
    rows, columns = (np.flatnonzero(square.max(axis=axis)) for axis in (1, 0))
    found = len(rows), len(columns)
    assert found == tuple(round(side * 64 / max(shape)) for side in shape)
    assert abs((rows[0] + rows[-1]) / 2 - 31.5) <= 0.5
    assert abs((columns[0] + columns[-1]) / 2 - 31.5) <= 0.5


def test_shrinking_averages_over_area():
    """One-pixel stripes come out grey, not as the stripes a nearest pixel would pick."""
    stripes = np.tile(np.array([0, 200], np.uint8), (512, 256))
    square = prepare_radiograph(stripes, 64)
    assert abs(int(square[8:-8, 8:-8].mean()) - 100) <= 2
    assert square[8:-8, 8:-8].std() < 6


def test_mask_goes_where_its_radiograph_goes():
    pixels = np.zeros((100, 60), np.uint8)
    pixels[10:90, 5:55] = textured(80, 50)
    mask = np.zeros_like(pixels)
    mask[10:50, 5:55] = 255
    square = fit_square(mask, content_box(pixels), 64, nearest=True)
    assert set(np.unique(square)) == {0, 255}
    assert square[:32, 12:52].min() == 255
    assert square[32:].max() == 0


def test_the_square_is_the_same_the_second_time():
    once = prepare_radiograph(textured(64, 64), 64)
    np.testing.assert_array_equal(prepare_radiograph(once, 64), once)


@pytest.mark.parametrize("pixels", [np.full((20, 20), 7, np.uint8), np.zeros((0, 4), np.uint8)])
def test_one_pixel_value_is_refused(pixels):
    with pytest.raises(ValueError, match="one pixel value"):
        prepare_radiograph(pixels, 64)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.float32)])
def test_other_arrays_are_refused(pixels):
    with pytest.raises(ValueError, match="expected grey uint8"):
        prepare_radiograph(pixels, 64)


def test_an_image_that_is_almost_all_border_is_left_as_it_is():
    pixels = np.zeros((100, 100), np.uint8)
    pixels[50, 50] = 255
    assert content_box(pixels) == (0, 100, 0, 100)
    halves = np.repeat(np.array([0, 255], np.uint8), 50)[:, None].repeat(100, axis=1)
    assert content_box(halves) == (0, 100, 0, 100)
