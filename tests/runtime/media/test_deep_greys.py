"""Greys of more than 8 bits are those of a deep RGB picture, or are refused."""

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image as oracle

from vtp.runtime.media.images import load_image

from .picture_files import DEEP, assert_every_source_gives, encoded, png, refusal, tiff_of_12_bits, written


@pytest.mark.parametrize("kind", ["PNG", "PPM", "TIFF", "JPEG2000"])
def test_deep_greys_are_those_of_a_deep_rgb_picture(kind: str, tmp_path: Path) -> None:
    """Pillow reads 16-bit RGB as transformers does; a grey picture with the same values looks the same."""
    rgb = np.asarray(oracle(str(written(tmp_path / "rgb.png", png(np.stack([DEEP] * 3, -1))))))
    assert rgb.std() > 50
    data = png(DEEP) if kind == "PNG" else encoded(Image.fromarray(DEEP), kind)
    assert_every_source_gives(rgb, written(tmp_path / "grey", data))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_deep_greys_of_either_byte_order(mode: str) -> None:
    order = {"B": ">u2", "N": "=u2"}.get(mode[-1], "<u2")
    picture = Image.frombytes(mode, (22, 14), DEEP.astype(order).tobytes())
    expected = np.asarray(load_image(png(DEEP)))
    np.testing.assert_array_equal(np.asarray(load_image(picture)), expected)


def test_deep_greys_of_12_bits_fill_the_range(tmp_path: Path) -> None:
    values = DEEP >> 4
    path = written(tmp_path / "twelve.tif", tiff_of_12_bits(values))
    np.testing.assert_array_equal(np.asarray(Image.open(path)), values)  # the file is what it should be
    assert_every_source_gives(np.asarray(load_image(png(DEEP))), path)


def test_deep_greys_with_transparency(tmp_path: Path) -> None:
    values = DEEP % 5 * 10000  # each value often; the oracle has the same picture in 8 bits
    key = int(values[3, 7])
    path = written(tmp_path / "key.png", png(values, tRNS=struct.pack(">H", key)))
    expected = convert_to_rgb(
        Image.open(BytesIO(png(values >> 8, 8, tRNS=struct.pack(">H", key >> 8)))), True
    )
    assert (expected[values == key] == 255).all() and (expected[values != key] < 255).all()
    assert_every_source_gives(expected, path)
    alpha = png(np.stack([DEEP, DEEP[::-1]], -1))
    expected = convert_to_rgb(Image.open(BytesIO(alpha)), return_numpy=True)
    assert_every_source_gives(expected, written(tmp_path / "alpha.png", alpha))


@pytest.mark.parametrize("orientation", [3, 6])
def test_deep_greys_are_turned(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture, file = Image.fromarray(DEEP), BytesIO()
    picture.save(file, "PNG", exif=exif)
    turned = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[orientation]
    expected = np.asarray(load_image(picture.transpose(turned)))
    np.testing.assert_array_equal(np.asarray(load_image(file.getvalue())), expected)


@pytest.mark.parametrize(("dtype", "word"), [(np.int32, "32-bit"), (np.float32, "floating-point")])
def test_greys_of_unknown_range_are_refused(dtype: type, word: str) -> None:
    picture = Image.fromarray(DEEP.astype(dtype))
    for source in (picture, encoded(picture, "TIFF")):
        assert f"has {word} pixels" in refusal(source) and "scale them to 0..255" in refusal(source)
