"""Constant borders, aspect and area: what a radiograph and its masks look like in the square."""

import numpy as np
import pytest

from imitate_ds.data.square import content_box, fit_square, prepare_radiograph
from tests.data.test_radiographs import ramp


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
