"""Pictures open as transformers opens them, and what is no picture is refused in one line."""

import random
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from transformers.image_utils import load_image as oracle

from vtp.engines.errors import UsageError, VtpError
from vtp.runtime.images import MAX_PIXELS, load_image


def noise(height: int, width: int, channels: int | None = 3, seed: int = 0) -> np.ndarray:
    """Random uint8 pixels [H, W, channels], or [H, W] for None."""
    shape = (height, width) if channels is None else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds none of them."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


def files_of_all_modes() -> dict[str, bytes]:
    rgb, rgba = Image.fromarray(noise(13, 21)), Image.fromarray(noise(13, 21, 4))
    palette = rgb.quantize(17)
    deep = (np.arange(13 * 21, dtype=np.uint16) * 240).reshape(13, 21)
    frames = [Image.fromarray(noise(13, 21, seed=seed)) for seed in range(3)]
    return {
        "png_rgb": encoded(rgb, "PNG"),
        "png_rgba": encoded(rgba, "PNG"),
        "png_gray": encoded(rgb.convert("L"), "PNG"),
        "png_gray_alpha": encoded(rgba.convert("LA"), "PNG"),
        "png_bilevel": encoded(rgb.convert("1"), "PNG"),
        "png_palette": encoded(palette, "PNG"),
        "png_palette_transparent": encoded(palette, "PNG", transparency=3),
        "png_16_bit": encoded(Image.fromarray(deep), "PNG"),
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg_cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "tiff_cmyk": encoded(rgb.convert("CMYK"), "TIFF"),
        "tiff_16_bit": encoded(Image.fromarray(deep), "TIFF"),
        "tiff_32_bit": encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "tiff_ycbcr": encoded(rgb.convert("YCbCr"), "TIFF"),
        "bmp": encoded(rgb, "BMP"),
        "webp_alpha": encoded(rgba, "WEBP", lossless=True),
        "gif_animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=40),
        "png_animated": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=40),
        "webp_animated": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
    }


@pytest.mark.parametrize("name", files_of_all_modes())
def test_every_mode_opens_as_in_transformers(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(files_of_all_modes()[name])
    image = load_image(path)
    assert image.mode == "RGB" and image.size == (21, 13)
    expected = np.asarray(oracle(str(path)))
    assert expected.std() > 0  # a picture, not one flat colour, is compared
    np.testing.assert_array_equal(np.asarray(image), expected)
    for source in (str(path), path.read_bytes(), bytearray(path.read_bytes()), Image.open(path)):
        np.testing.assert_array_equal(np.asarray(load_image(source)), expected)


def test_an_animation_gives_its_first_frame() -> None:
    for name in ("png_animated", "webp_animated"):
        np.testing.assert_array_equal(load_image(files_of_all_modes()[name]), noise(13, 21, seed=0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int, tmp_path: Path) -> None:
    plain = Image.fromarray(noise(16, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    plain.save(path, exif=exif)
    image = load_image(path)
    assert image.size == ((32, 16) if orientation < 5 else (16, 32))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(oracle(str(path))))
    assert (np.asarray(image).tobytes() == np.asarray(plain).tobytes()) == (orientation == 1)


def test_arrays_are_taken_as_rgb_or_gray() -> None:
    pixels = noise(5, 7)
    np.testing.assert_array_equal(np.asarray(load_image(pixels)), pixels)
    np.testing.assert_array_equal(np.asarray(load_image(pixels[:, ::-1])), pixels[:, ::-1])
    gray = noise(5, 7, None)
    np.testing.assert_array_equal(np.asarray(load_image(gray)), np.repeat(gray[:, :, None], 3, axis=2))


def test_the_callers_image_is_left_alone() -> None:
    given_image = Image.fromarray(noise(5, 7))
    load_image(given_image).paste((0, 0, 0), (0, 0, 7, 5))
    np.testing.assert_array_equal(np.asarray(given_image), noise(5, 7))


def refusal(source: Any, kind: type[VtpError] = VtpError) -> str:
    with pytest.raises(kind) as caught:
        load_image(source)
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def test_paths_that_hold_no_picture(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.png", UsageError)
    assert "is a directory" in refusal(tmp_path, UsageError)
    assert "cannot read" in refusal("nul\0byte.png", UsageError) or "no such file" in refusal("nul\0byte.png")
    assert "not a local file" in refusal("https://example.com/cat.png", UsageError)
    assert "not a regular file" in refusal("/dev/null", UsageError)
    assert "cannot read" in refusal("x" * 5000, UsageError)
    (tmp_path / "empty.png").write_bytes(b"")
    assert "is empty" in refusal(tmp_path / "empty.png")
    (tmp_path / "words.png").write_text("these are only words, and no picture at all")
    assert "not a picture" in refusal(tmp_path / "words.png")


def test_values_that_are_no_picture() -> None:
    assert "uint8" in refusal(noise(4, 4).astype(np.float32), UsageError)
    assert "channels last" in refusal(np.moveaxis(noise(4, 5), 2, 0), UsageError)
    assert "[4, 4, 4]" in refusal(noise(4, 4, 4), UsageError)
    assert "[3]" in refusal(np.zeros(3, np.uint8), UsageError)
    assert "nothing to see" in refusal(np.zeros((0, 4, 3), np.uint8))
    assert "nothing to see" in refusal(Image.new("RGB", (0, 5)))
    assert "NoneType" in refusal(None, UsageError)
    assert "list" in refusal([noise(4, 4)], UsageError)
    assert "is empty" in refusal(b"")
    assert "0x7 pixels" in refusal(png_header(0, 7))
    assert "vector format" in refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = encoded(Image.fromarray(noise(64, 64)), kind)
    text = refusal(data[: len(data) // 2])
    assert "truncated or damaged" in text or "damaged" in text


@pytest.mark.parametrize("pillow_limit", [None, 1000, 10**12], ids=str)
@pytest.mark.parametrize("filter_action", ["error", "ignore"])
@pytest.mark.parametrize("size", [(50_000, 50_000), (10_000, 10_000), (MAX_PIXELS + 1, 1)], ids=str)
def test_bombs_are_refused_from_the_header(
    size: tuple[int, int],
    filter_action: Literal["error", "ignore"],
    pillow_limit: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded = []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    with warnings.catch_warnings():
        warnings.simplefilter(filter_action)
        before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
        assert f"{MAX_PIXELS:,}" in refusal(png_header(*size))
        assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before
    assert not decoded


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]), seed=st.integers(0, 2**32))
def test_damaged_files_open_or_are_refused(kind: str, seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray(encoded(Image.fromarray(noise(16, 16)), kind))
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert load_image(bytes(data)).mode == "RGB"
        except VtpError as error:
            assert "\n" not in str(error)
