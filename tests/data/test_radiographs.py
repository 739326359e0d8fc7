import io
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from imitate_ds.data import dicom, grey_levels
from imitate_ds.data.dicom import read_dicom_header
from imitate_ds.data.radiographs import decode_radiograph, load_radiograph


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
    monkeypatch.setattr(grey_levels, "MAX_PIXELS", 1_000)
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(kind, orientation):
    """As a viewer shows them, whatever the format, and whatever the depth."""
    pixels = np.zeros((40, 60), np.uint8)
    pixels[:20, :30], pixels[20:, :30] = 200, 90
    stored = [np.array, np.fliplr, lambda p: np.rot90(p, 2), np.flipud,
              np.transpose, np.rot90, lambda p: np.rot90(p, 2).T, lambda p: np.rot90(p, -1)]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored[orientation - 1](pixels)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = decode_radiograph(encoded(image, kind, exif=exif, quality=100))
    assert distance(shown, pixels) <= 4
    if kind == "PNG":
        deep = Image.fromarray(np.asarray(image).astype(np.uint16) * 100)
        assert distance(decode_radiograph(encoded(deep, kind, exif=exif)), np.rint(pixels * 1.275)) <= 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_that_cannot_be_read_turns_nothing():
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        data = encoded(Image.fromarray(ramp()), "JPEG", quality=95, exif=exif)
        assert distance(decode_radiograph(data), ramp()) <= 4


def tiff(pixels, order, white_is_zero):
    """pixels [H, W] as an uncompressed TIFF, byte order < or >."""
    height, width = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    numbers = {256: width, 257: height, 258: pixels.itemsize * 8, 259: 1, 262: 1 - white_is_zero, 273: 0, 277: 1,
               278: height, 279: len(data)}  # fmt: skip
    numbers[273] = 8 + 2 + 12 * len(numbers) + 4
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(numbers))
    tags = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, number) for tag, number in numbers.items())
    return header + tags + struct.pack(f"{order}I", 0) + data


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("top", [255, 4095])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_tiff_of_either_byte_order_and_either_sense(order, top, white_is_zero):
    data = tiff(ramp(top=top), order, white_is_zero)
    if (order, top, white_is_zero) == (">", 4095, True):  # Pillow does not know it
        with pytest.raises(ValueError, match="not a JPEG, PNG, TIFF or DICOM image"):
            decode_radiograph(data)
    else:
        assert distance(decode_radiograph(data), 255 - ramp() if white_is_zero else ramp()) <= 1


def test_palette_alpha_cmyk_and_progressive_pictures():
    grey = Image.fromarray(ramp())
    palette = Image.fromarray(255 - ramp())
    palette.putpalette(np.repeat(np.arange(255, -1, -1, np.uint8), 3).tobytes())
    assert palette.mode == "P"
    np.testing.assert_array_equal(decode_radiograph(encoded(palette, "PNG")), ramp())
    without_white = np.where(ramp() == 255, 0, ramp())
    np.testing.assert_array_equal(decode_radiograph(encoded(palette, "PNG", transparency=0)), without_white)
    assert distance(decode_radiograph(encoded(grey.convert("RGB").convert("CMYK"), "JPEG", quality=95)), ramp()) <= 4
    assert distance(decode_radiograph(encoded(grey, "JPEG", quality=95, progressive=True)), ramp()) <= 4
    bits = decode_radiograph(encoded(Image.fromarray(ramp() > 127), "PNG"))
    np.testing.assert_array_equal(bits, (ramp() > 127) * 255)


@pytest.mark.parametrize(
    ("kind", "head"), [(b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0"), (b"iCCP", b"icc\0\0")]
)
def test_a_bomb_in_the_notes_of_a_png_is_refused(kind, head):
    png = encoded(Image.fromarray(ramp()), "PNG")
    body = head + zlib.compress(bytes(50_000_000))
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"damaged image file \(ValueError\)"):
        decode_radiograph(png[:33] + chunk + png[33:])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


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
    r"damaged (DICOM|image) file \((\w+|it has no pixels, or ends before them)\)"
    r"|not a JPEG, PNG, TIFF or DICOM image|image too large: .*|image file too large: .*"
    r"|image has (one pixel value|no pixels|values that are not finite)"
    r"|DICOM file has .*; a radiograph .*|DICOM header and .* differ in .*|DICOM pixels in .*"
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
    monkeypatch.setattr(dicom, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'imitate-ds\[dicom\]'"):
        load_radiograph(tmp_path / "a.dcm")


# What hospitals send: every transfer syntax, really encoded

SYNTAXES = {  # as pydicom calls it: as gdcm calls it
    "ImplicitVRLittleEndian": "ImplicitVRLittleEndian",
    "ExplicitVRLittleEndian": "ExplicitVRLittleEndian",
    "ExplicitVRBigEndian": "ExplicitVRBigEndian",
    "DeflatedExplicitVRLittleEndian": "DeflatedExplicitVRLittleEndian",
    "RLELossless": "RLELossless",
    "JPEGLossless": "JPEGLosslessProcess14",
    "JPEGLosslessSV1": "JPEGLosslessProcess14_1",
    "JPEGLSLossless": "JPEGLSLossless",
    "JPEG2000Lossless": "JPEG2000Lossless",
    "JPEGBaseline8Bit": "JPEGBaselineProcess1",
    "JPEGExtended12Bit": "JPEGExtendedProcess2_4",
    "JPEGLSNearLossless": "JPEGLSNearLossless",
    "JPEG2000": "JPEG2000",
}
LOSSLESS = list(SYNTAXES)[:9]
LOSSY = [("JPEGBaseline8Bit", 8), ("JPEGExtended12Bit", 8), ("JPEGExtended12Bit", 10), ("JPEGExtended12Bit", 12)]
LOSSY += [("JPEGLSNearLossless", 12), ("JPEG2000", 12), ("JPEG2000", 16)]
STREAMS = [*LOSSLESS[4:], "JPEGBaseline8Bit", "JPEGExtended12Bit"]  # those whose pixels are a stream of their own
DEPTHS = [(8, "u1"), (10, "u2"), (12, "u2"), (14, "u2"), (16, "u2"), (12, "i2"), (16, "i2")]


def waves(bits, kind):
    """Smooth and different in every row, over the whole range of bits: 40 x 60."""
    y, x = np.mgrid[0:40, 0:60]
    values = (np.sin(x / 9) + np.cos(y / 7) + 2) / 4 * (2**bits - 1)
    return (values.round() - (2 ** (bits - 1) if kind[0] == "i" else 0)).astype(kind)


def transcode(source, target, syntax):
    """source again as target, encoded by gdcm in the transfer syntax; near-lossless is off by 3 at most."""
    gdcm = pytest.importorskip("gdcm")
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, SYNTAXES[syntax])))
    change.SetInput(reader.GetImage())
    codec = None
    if syntax == "JPEGLSNearLossless":
        codec = gdcm.JPEGLSCodec()
        codec.SetLossless(False)
        codec.SetLossyError(3)
    elif syntax == "JPEG2000":
        codec = gdcm.JPEG2000Codec()
        codec.SetReversible(False)
        codec.SetRate(0, 8)
    if codec:
        change.SetUserCodec(codec)
    assert change.Change()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return target


def transcoded(folder, syntax, bits=12, kind="u2"):
    """The waves in one transfer syntax: the file, and what the same file shows uncompressed."""
    plain = save_dicom(folder / "plain.dcm", waves(bits, kind), bits=bits)
    path = transcode(plain, folder / f"{syntax}.dcm", syntax)
    meta = pytest.importorskip("pydicom").dcmread(path, stop_before_pixels=True).file_meta
    assert meta.TransferSyntaxUID.keyword == syntax
    return path, load_radiograph(plain)


@pytest.mark.parametrize(("bits", "kind"), DEPTHS)
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_lossless_transfer_syntaxes_show_what_the_plain_file_shows(tmp_path, syntax, bits, kind):
    path, plain = transcoded(tmp_path, syntax, bits, kind)
    assert np.ptp(plain) == 255
    np.testing.assert_array_equal(load_radiograph(path), plain)


@pytest.mark.parametrize(("syntax", "bits"), LOSSY)
def test_lossy_transfer_syntaxes_show_nearly_what_the_plain_file_shows(tmp_path, syntax, bits):
    path, plain = transcoded(tmp_path, syntax, bits, "u1" if bits == 8 else "u2")
    assert distance(load_radiograph(path), plain) <= 2


def lossless_jpeg(pixels, bits, predictor):
    """pixels [H, W] as a JPEG Lossless stream (ITU-T T.81, annex H); one Huffman table, all codes of five bits."""
    height, width = pixels.shape
    values = pixels.astype(int)
    left, above, corner = values[:, :-1], values[:-1], values[:-1, :-1]
    guess = np.full_like(values, 2 ** (bits - 1))
    guess[0, 1:], guess[1:, 0] = left[0], above[:, 0]
    forms = {2: above[:, 1:], 4: left[1:] + above[:, 1:] - corner, 7: (left[1:] + above[:, 1:]) >> 1}
    guess[1:, 1:] = forms[predictor]
    code = ""
    for difference in (values - guess).ravel().tolist():
        size = abs(difference).bit_length()
        code += f"{size:05b}" + (f"{difference + (2**size - 1 if difference < 0 else 0):0{size}b}" if size else "")
    code += "1" * (-len(code) % 8)
    scan = int(code, 2).to_bytes(len(code) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"".join([
        b"\xff\xd8\xff\xc3" + struct.pack(">HBHHBBBB", 11, bits, height, width, 1, 1, 0x11, 0),
        b"\xff\xc4" + struct.pack(">HB", 19 + 17, 0) + bytes([0, 0, 0, 0, 17] + [0] * 11) + bytes(range(17)),
        b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, predictor, 0, 0) + scan + b"\xff\xd9",
    ])  # fmt: skip


def encapsulated(path, syntax, *frames, **tags):
    """The DICOM file at path again, its pixels replaced by compressed frames."""
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    dataset.PixelData = pydicom.encaps.encapsulate([frame + b"\0" * (len(frame) % 2) for frame in frames])
    dataset["PixelData"].is_undefined_length = True
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    return path


def stream_of(path):
    pydicom = pytest.importorskip("pydicom")
    return pydicom.encaps.get_frame(pydicom.dcmread(path).PixelData, 0, number_of_frames=1)


@pytest.mark.parametrize("predictor", [2, 4, 7])
def test_jpeg_lossless_with_other_predictors_than_the_first(tmp_path, predictor):
    pytest.importorskip("gdcm")
    path = save_dicom(tmp_path / "a.dcm", waves(12, "u2"), bits=12)
    plain = load_radiograph(path)
    encapsulated(path, "JPEGLossless", lossless_jpeg(waves(12, "u2"), 12, predictor))
    np.testing.assert_array_equal(load_radiograph(path), plain)


@pytest.mark.parametrize(("syntax", "name"), [("HTJ2K", "High-Throughput JPEG 2000 "), ("MPEG2MPML", "MPEG2 Main ")])
def test_a_transfer_syntax_without_a_decoder_is_refused_by_name(tmp_path, syntax, name):
    path, _ = transcoded(tmp_path, "JPEG2000Lossless")
    with pytest.raises(ValueError, match=f"DICOM pixels in '{name}.*' cannot be decoded; save the file in another"):
        load_radiograph(encapsulated(path, syntax, stream_of(path)))


def in_a_new_process(code, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("syntax", ["JPEGLosslessSV1", "JPEGExtended12Bit", "JPEGLSLossless", "JPEG2000Lossless"])
def test_without_gdcm_it_is_named_where_it_is_needed_and_only_there(tmp_path, syntax):
    path, _ = transcoded(tmp_path, syntax)
    code = (
        "import sys; sys.modules['gdcm'] = None\n"
        "from imitate_ds.data.radiographs import load_radiograph\n"
        "try: print(load_radiograph(sys.argv[1]).shape)\n"
        "except ValueError as error: print(error)"
    )
    said = in_a_new_process(code, path).stdout
    needed = re.match(r"DICOM pixels in 'JPEG.*' cannot be decoded; pip install 'imitate-ds\[dicom\]'", said)
    assert said == "(40, 60)\n" if syntax == "JPEG2000Lossless" else needed


@pytest.mark.parametrize("syntax", STREAMS)
@pytest.mark.parametrize("part", [0.9, 0.4, 0.02])
def test_a_truncated_stream_is_refused(tmp_path, syntax, part):
    path, _ = transcoded(tmp_path, syntax, *((8, "u1") if syntax == "JPEGBaseline8Bit" else (12, "u2")))
    stream = stream_of(path)
    encapsulated(path, syntax, stream[: int(len(stream) * part)])
    with pytest.raises(ValueError, match=r"damaged DICOM file \(\w+\)"):
        load_radiograph(path)


@pytest.mark.parametrize("syntax", STREAMS[1:])
def test_a_stream_of_another_size_than_the_header_says_is_refused(tmp_path, syntax):
    """gdcm would write past its buffer."""
    path, _ = transcoded(tmp_path, syntax, 8, "u1")
    with pytest.raises(ValueError, match="DICOM header and compressed pixels differ in size"):
        load_radiograph(encapsulated(path, syntax, stream_of(path), Rows=39))


@pytest.mark.parametrize("syntax", ["JPEGLossless", "JPEGLSLossless"])
def test_a_stream_deeper_than_the_header_says_is_refused(tmp_path, syntax):
    path, _ = transcoded(tmp_path, syntax, 12, "u2")
    encapsulated(path, syntax, stream_of(path), BitsAllocated=8, BitsStored=8, HighBit=7)
    with pytest.raises(ValueError, match="DICOM header and compressed pixels differ in depth"):
        load_radiograph(path)


@pytest.mark.parametrize("syntax", STREAMS[1:])
def test_a_small_file_that_claims_a_huge_image_is_refused_unread(tmp_path, syntax):
    path, _ = transcoded(tmp_path, syntax, 8, "u1")
    claims = ">II" if "2000" in syntax else ">HH"
    here, there = (60, 40) if "2000" in syntax else (40, 60)
    huge = stream_of(path).replace(struct.pack(claims, here, there), struct.pack(claims, 60_000, 60_000), 1)
    tracemalloc.start()
    for sides, message in (((60_000, 60_000), "image too large"), ((40, 60), "image too large|differ in size")):
        with pytest.raises(ValueError, match=message):
            load_radiograph(encapsulated(path, syntax, huge, Rows=sides[0], Columns=sides[1]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


CRASHERS = """
import re, sys
from tests.data.test_radiographs import OWN_WORDS, decoded_or_refused, load_radiograph, mutations
path = sys.argv[1]
data = open(path, "rb").read()
pixels = data.index(b"\\xe0\\x7f\\x10\\x00")
for copy in mutations(data, 400, pixels + 20):
    open(path, "wb").write(copy)
    decoded_or_refused(lambda _: load_radiograph(path), copy)
for place in range(pixels + 20, pixels + 80):  # the segments before the scan, where gdcm is weakest
    for value in (0, 0x7F, 0xD1, 0xFF):
        open(path, "wb").write(data[:place] + bytes([value]) + data[place + 1 :])
        decoded_or_refused(lambda _: load_radiograph(path), data)
"""


@pytest.mark.parametrize("syntax", STREAMS)
def test_no_damage_to_a_stream_kills_the_process(tmp_path, repository, syntax):
    """Codecs in C do not raise, they crash: so in a process of their own."""
    path, _ = transcoded(tmp_path, syntax, *((8, "u1") if syntax == "JPEGBaseline8Bit" else (12, "u2")))
    done = in_a_new_process(f"import sys; sys.path.insert(0, {str(repository)!r})\n{CRASHERS}", path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", [1, 4])
def test_parameters_of_jpeg_ls_that_keep_the_decoder_busy_for_ever_are_refused(tmp_path, kind):
    """Counters up to RESET = 256 where values end at 1; and a segment that gives the size once more."""
    path, _ = transcoded(tmp_path, "JPEGLSLossless", 16)
    stream = stream_of(path)
    place = stream.index(b"\xff\xf8") + 4
    bad = struct.pack(">BHHHHH", kind, 1, 0x12, 0x43, 0x114, 256)
    path = encapsulated(path, "JPEGLSLossless", stream[:place] + bad + stream[place + len(bad) :])
    with pytest.raises(ValueError, match=r"damaged DICOM file \(ValueError\)"):
        load_radiograph(path)


def test_a_deflated_bomb_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    path, plain = transcoded(tmp_path, "DeflatedExplicitVRLittleEndian")
    np.testing.assert_array_equal(load_radiograph(path), plain)
    data = path.read_bytes()
    start = 144 + struct.unpack_from("<I", data, 140)[0]
    deflate = zlib.compressobj(9, wbits=-15)
    bomb = deflate.compress(zlib.decompress(data[start:], -15) + bytes(50_000_000)) + deflate.flush()
    path.write_bytes(data[:start] + bomb)
    monkeypatch.setattr(dicom, "MAX_FILE_BYTES", 10_000_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match="image file too large: it inflates to more than 10,000,000 bytes"):
        load_radiograph(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("name", ["a.png", "a.dcm"])
def test_a_file_too_large_is_refused_unread(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.truncate(grey_levels.MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match="image file too large: 536,870,913 bytes, more than 536,870,912"):
        load_radiograph(tmp_path / name)


# What the header says about the values


@pytest.mark.parametrize("syntax", ["ExplicitVRLittleEndian", "ExplicitVRBigEndian", "RLELossless"])
@pytest.mark.parametrize("kind", ["u2", "i2"])
def test_values_at_the_upper_end_of_their_words(tmp_path, syntax, kind):
    """BitsStored 12 and HighBit 15; the four bits below hold something else."""
    values = waves(12, kind)
    plain = save_dicom(tmp_path / "a.dcm", values, bits=12, WindowCenter=100, WindowWidth=3000)
    words = (values << 4) | (np.arange(60, dtype=kind) % 16)
    shifted = save_dicom(tmp_path / "b.dcm", words, WindowCenter=100, WindowWidth=3000)
    transcode(shifted, tmp_path / "c.dcm", syntax)
    dataset = pytest.importorskip("pydicom").dcmread(tmp_path / "c.dcm")
    dataset.BitsStored = 12
    dataset.save_as(tmp_path / "c.dcm")
    np.testing.assert_array_equal(load_radiograph(tmp_path / "c.dcm"), load_radiograph(plain))


def with_border(values, border):
    """values [40, 60] within a border of ten pixels and without a corner, as a turned collimator leaves them."""
    padded = np.pad(values, 10, constant_values=border)
    padded[30:50, 10:30][np.tri(20, dtype=bool)] = border
    return padded, padded == border


def check_inside(shown, mask, alone):
    """Where no border is, the image with a border shows what the image alone shows."""
    inside = ~mask[10:50, 10:70]
    assert inside.sum() > 2000
    assert distance(shown[10:50, 10:70][inside], alone[inside]) <= 3


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 1000, "WindowWidth": 1500}], ids=["percentiles", "window"])
@pytest.mark.parametrize(
    ("border", "bits", "tags"),
    [
        (-2000, 16, {"PixelPaddingValue": -2000}),
        (-2000, 16, {"PixelPaddingValue": -2100, "PixelPaddingRangeLimit": -1900}),
        (-2000, 16, {"PixelPaddingValue": -2000, "RescaleSlope": 1, "RescaleIntercept": 0}),
        (65535, 16, {"PixelPaddingValue": 65535}),
        (0, 12, {"PixelPaddingValue": 0}),
    ],
)
def test_declared_padding_is_black_and_does_not_set_the_contrast(tmp_path, photometric, window, border, bits, tags):
    kind = "i2" if border < 0 else "u2"
    values = waves(10, "u2").astype(kind) + 200
    alone = load_radiograph(save_dicom(tmp_path / "a.dcm", values, photometric, bits, **window))
    padded, mask = with_border(values, border)
    shown = load_radiograph(save_dicom(tmp_path / "b.dcm", padded, photometric, bits, **window, **tags))
    assert shown[mask].max() == 0
    check_inside(shown, mask, alone)


@pytest.mark.parametrize(("border", "kind"), [(65535, "u2"), (-32768, "i2")])
def test_padding_that_nobody_declared_does_not_ruin_the_contrast(tmp_path, border, kind):
    values = waves(12, "u2").astype(kind)
    padded, mask = with_border(values, border)
    shown = load_radiograph(save_dicom(tmp_path / "a.dcm", padded))
    alone = load_radiograph(save_dicom(tmp_path / "b.dcm", values))
    check_inside(shown, mask, alone)
    assert set(shown[mask]) == {255 if border > 0 else 0}


def test_a_black_border_as_far_from_the_rest_as_the_rest_is_wide_is_part_of_the_image(tmp_path):
    values = waves(11, "u2") + 2048
    padded, mask = with_border(values, 0)
    shown = load_radiograph(save_dicom(tmp_path / "a.dcm", padded, bits=12))
    assert shown[mask].max() == 0
    assert 120 <= shown[~mask].min() <= 140


def test_a_padding_value_in_the_midst_of_the_values_leaves_no_holes(tmp_path):
    values = waves(12, "u2")
    shown = load_radiograph(save_dicom(tmp_path / "a.dcm", values, bits=12, PixelPaddingValue=int(values[20, 30])))
    np.testing.assert_array_equal(shown, load_radiograph(save_dicom(tmp_path / "b.dcm", values, bits=12)))


def over_greys(values):
    return np.rint((values - values.min()) / np.ptp(values) * 255)


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 1500, "WindowWidth": 900},
        {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "LINEAR"},
        {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": -100, "WindowWidth": 900, "RescaleSlope": 0.5, "RescaleIntercept": -1000},
        {"WindowCenter": 0.4, "WindowWidth": 0.3, "VOILUTFunction": "LINEAR_EXACT", "RescaleSlope": 1 / 4095,
         "RescaleIntercept": 0},
        {"WindowCenter": 1500, "WindowWidth": 1},
    ],
)  # fmt: skip
def test_windows_are_those_of_the_standard(tmp_path, tags):
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, written down once more, and stretched over the greys."""
    path = save_dicom(tmp_path / "a.dcm", waves(12, "u2"), bits=12, **tags)
    x = waves(12, "u2") * tags.get("RescaleSlope", 1.0) + tags.get("RescaleIntercept", 0)
    center, width, function = tags["WindowCenter"], tags["WindowWidth"], tags.get("VOILUTFunction", "LINEAR")
    if function == "SIGMOID":
        y = 1 / (1 + np.exp(-4 * (x - center) / width))
    elif function == "LINEAR_EXACT":
        y = ((x - center) / width + 0.5).clip(0, 1)
    else:
        y = ((x - (center - 0.5)) / max(width - 1, 1e-9) + 0.5).clip(0, 1)
    assert distance(load_radiograph(path), over_greys(y)) <= 1


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "CUBIC"},
        {"WindowCenter": 1500, "WindowWidth": 0.5},
        {"WindowCenter": 1500, "WindowWidth": 0, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 1500, "WindowWidth": -900},
        {"WindowCenter": ["", ""], "WindowWidth": ["", ""]},
        {"WindowCenter": 1500},
        {"WindowWidth": 900},
        {"RescaleSlope": None, "RescaleIntercept": None, "VOILUTFunction": ""},
    ],
)
def test_windows_that_nobody_can_apply_give_way_to_percentiles(tmp_path, tags):
    shown = load_radiograph(save_dicom(tmp_path / "a.dcm", waves(12, "u2"), bits=12, **tags))
    np.testing.assert_array_equal(shown, load_radiograph(save_dicom(tmp_path / "b.dcm", waves(12, "u2"), bits=12)))


@pytest.mark.parametrize("window", [{}, {"WindowCenter": -1500, "WindowWidth": 900}])
def test_a_negative_slope_turns_values_over_and_not_the_window(tmp_path, window):
    tags = {"RescaleSlope": -1, "RescaleIntercept": 0}
    shown = load_radiograph(save_dicom(tmp_path / "a.dcm", waves(12, "u2"), bits=12, **tags, **window))
    straight = {"WindowCenter": 1501, "WindowWidth": 900} if window else {}
    plain = load_radiograph(save_dicom(tmp_path / "b.dcm", waves(12, "u2"), bits=12, **straight))
    assert distance(shown, 255 - plain.astype(int)) <= 1


def lut(entries, first=0, depth=16, packed=False, **more):
    pydicom = pytest.importorskip("pydicom")
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(entries) % 65536, first, depth]
    item.add_new("LUTData", "OW", np.asarray(entries, "u1" if packed else "<u2").tobytes())
    for name, value in more.items():
        setattr(item, name, value)
    return [item]


CURVE = np.sqrt(np.linspace(0, 1, 4096))


@pytest.mark.parametrize(
    ("kind", "tags"),
    [
        ("u2", {"VOILUTSequence": (CURVE * 65535, 0, 16)}),
        ("u2", {"VOILUTSequence": (CURVE * 4095, 0, 12)}),
        ("u2", {"VOILUTSequence": (CURVE * 255, 0, 8)}),
        ("u2", {"VOILUTSequence": (CURVE * 255, 0, 8, True)}),
        ("u2", {"VOILUTSequence": (CURVE * 65535, 0, 16), "WindowCenter": 9, "WindowWidth": 9}),
        ("u2", {"VOILUTSequence": (CURVE * 65535, 0, 16), "RescaleSlope": 1, "RescaleIntercept": 0}),
        ("u2", {"VOILUTSequence": (CURVE * 65535, 63488, 16), "RescaleSlope": 1, "RescaleIntercept": -2048}),
        ("i2", {"VOILUTSequence": (CURVE * 65535, -2048, 16)}),
        ("u2", {"ModalityLUTSequence": (CURVE * 4095, 0, 12)}),
        ("u2", {"ModalityLUTSequence": (CURVE * 65535, 0, 16), "WindowCenter": 32768.5, "WindowWidth": 65536}),
    ],
    ids=["16 bits", "12 bits", "8 bits", "8 bits packed", "and a window", "after a rescale", "negative start unsigned",
         "negative start", "modality", "modality and a window"],
)  # fmt: skip
@pytest.mark.parametrize("syntax", ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "JPEGLosslessSV1"])
def test_look_up_tables_of_every_depth(tmp_path, syntax, kind, tags):
    tags = {name: lut(*value) if isinstance(value, tuple) else value for name, value in tags.items()}
    path = save_dicom(tmp_path / "a.dcm", waves(12, kind), bits=12, **tags)
    transcode(path, tmp_path / "b.dcm", syntax)
    shown = CURVE[waves(12, kind).astype(int) + (2048 if kind == "i2" else 0)]
    if "ModalityLUTSequence" in tags and "WindowCenter" not in tags:
        shown = shown.clip(*np.percentile(shown, grey_levels.PERCENTILES))
    assert distance(load_radiograph(tmp_path / "b.dcm"), over_greys(shown)) <= 1


def test_a_look_up_table_that_is_not_whole_gives_way_or_is_refused(tmp_path):
    short = lut(CURVE * 65535)
    short[0].LUTDescriptor = [9000, 0, 16]
    window = {"WindowCenter": 1500, "WindowWidth": 900}
    shown = load_radiograph(save_dicom(tmp_path / "a.dcm", waves(12, "u2"), bits=12, VOILUTSequence=short, **window))
    plain = load_radiograph(save_dicom(tmp_path / "b.dcm", waves(12, "u2"), bits=12, **window))
    np.testing.assert_array_equal(shown, plain)
    with pytest.raises(ValueError, match="modality LUT that is not whole"):
        load_radiograph(save_dicom(tmp_path / "c.dcm", waves(12, "u2"), bits=12, ModalityLUTSequence=short))


def coloured():
    """Red, green, blue and grey quarters: 40 x 60, and what grey they are."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30, 0], pixels[:20, 30:, 1], pixels[20:, :30, 2], pixels[20:, 30:] = 200, 150, 250, 90
    return pixels, np.asarray(Image.fromarray(pixels).convert("L"))


@pytest.mark.parametrize("syntax", ["ExplicitVRLittleEndian", "RLELossless", "JPEGLosslessSV1", "JPEG2000Lossless"])
def test_colour_in_every_form_becomes_grey(tmp_path, syntax):
    pixels, grey = coloured()
    transcode(save_dicom(tmp_path / "a.dcm", pixels, "RGB", bits=8), tmp_path / "b.dcm", syntax)
    assert distance(load_radiograph(tmp_path / "b.dcm"), grey) <= 1


def test_chroma_at_half_width_becomes_grey(tmp_path):
    pixels, grey = coloured()
    ycc = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
    halved = np.stack([ycc[:, ::2, 0], ycc[:, 1::2, 0], ycc[:, ::2, 1], ycc[:, ::2, 2]], axis=-1)
    path = save_dicom(tmp_path / "a.dcm", pixels, "YBR_FULL_422", bits=8, PixelData=halved.tobytes())
    assert distance(load_radiograph(path), grey) <= 2
    jpeg = encoded(Image.fromarray(pixels), "JPEG", quality=100, subsampling="4:2:2")
    assert distance(load_radiograph(encapsulated(path, "JPEGBaseline8Bit", jpeg)), grey) <= 4


def test_colour_of_16_bits_is_scaled(tmp_path):
    pixels = np.repeat(ramp(top=4095)[..., None], 3, axis=2)
    assert distance(load_radiograph(save_dicom(tmp_path / "a.dcm", pixels, "RGB")), ramp()) <= 1


@pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
def test_files_that_do_not_say_how_they_are_encoded(tmp_path, implicit, little):
    """No preamble and no meta header, as old archives and memory dumps have it."""
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(save_dicom(tmp_path / "a.dcm", waves(12, "u2"), bits=12))
    plain = load_radiograph(tmp_path / "a.dcm")
    if not little:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, pydicom.Dataset(dataset), implicit_vr=implicit, little_endian=little)
    (tmp_path / "bare.dcm").write_bytes(buffer.getvalue())
    assert b"DICM" not in buffer.getvalue()
    np.testing.assert_array_equal(load_radiograph(tmp_path / "bare.dcm"), plain)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"Rows": 0}, "image has no pixels"),
        ({"SamplesPerPixel": 60_000}, "neither one nor three values a pixel"),
        ({"PixelData": bytes(2 * 40 * 60)}, "more than one frame"),
        ({"BitsAllocated": 0}, r"damaged DICOM file \(\w+\)"),
        ({"BitsStored": 60}, r"damaged DICOM file \(\w+\)"),
    ],
)
def test_headers_that_no_radiograph_has_are_refused(tmp_path, tags, message):
    with pytest.raises(ValueError, match=message):
        load_radiograph(save_dicom(tmp_path / "a.dcm", ramp(), bits=8, **tags))


def test_a_file_without_pixels_says_so(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(save_dicom(tmp_path / "a.dcm", ramp(), bits=8))
    del dataset.PixelData
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(ValueError, match=r"damaged DICOM file \(it has no pixels, or ends before them\)"):
        load_radiograph(tmp_path / "a.dcm")


def test_a_dicom_header_is_read_without_the_pixels(tmp_path):
    path = save_dicom(tmp_path / "a.dcm", ramp(height=40, width=60), bits=8)
    assert read_dicom_header(path) == ("patient17", 40, 60)
    path.write_bytes(path.read_bytes()[:-1000])  # of the pixels
    assert read_dicom_header(path) == ("patient17", 40, 60)
    assert read_dicom_header(save_dicom(path, ramp(), bits=8, PatientID=" ")).patient_id == ""


def test_a_header_that_cannot_be_read_is_refused_without_its_content(tmp_path):
    path = tmp_path / "patient17.dcm"
    for data in (b"", b"patient17", b"\0" * 128 + b"DICM"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"damaged DICOM file \(\w+\)$"):
            read_dicom_header(path)
    with pytest.raises(OSError, match="No such file or directory") as error:
        read_dicom_header(tmp_path / "patient18.dcm")
    assert "patient18" not in str(error.value)
