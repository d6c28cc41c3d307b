"""Pictures open as transformers opens them, and anything else is refused in one line."""

import os
import random
import socket
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image as oracle

from vtp.engines.errors import UsageError, VtpError
from vtp.runtime.media.images import MAX_PIXELS, MAX_SIDE, EncodedImage, check_image, load_image

from .picture_files import (
    DEEP,
    assert_every_source_gives,
    encoded,
    files_of_all_modes,
    noise,
    png,
    png_header,
    refusal,
    written,
)


@pytest.mark.parametrize("name", files_of_all_modes())
def test_every_mode_opens_as_in_transformers(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(files_of_all_modes()[name])
    expected = np.asarray(oracle(str(path)))
    assert expected.std() > 0  # a picture, not one flat colour, is compared
    assert_every_source_gives(expected, path)


# -- what is transparent -------------------------------------------------------------------------------------

# How transformers' own reading of a path (not of the opened picture) treats what is transparent: it drops an
# alpha channel, and every alpha of a palette, before its processors see them, and shows what was hidden.
SHOWN_BY_PATH = frozenset(("png_rgba", "png_gray_alpha", "png_palette_alphas", "webp_alpha", "tiff_rgba"))


def files_with_transparency() -> dict[str, bytes]:
    rgba = Image.fromarray(noise(13, 21, 4))
    palette = rgba.convert("RGB").quantize(17)
    few = Image.fromarray(noise(13, 21, None) % 5 * 40)  # greys, each often
    return {
        "png_rgba": encoded(rgba, "PNG"),
        "png_gray_alpha": encoded(rgba.convert("LA"), "PNG"),
        "png_palette_alphas": encoded(palette, "PNG", transparency=bytes(range(0, 255, 15))),
        "png_palette_transparent": encoded(palette, "PNG", transparency=3),
        "png_rgb_key": encoded(few.convert("RGB"), "PNG", transparency=(80, 80, 80)),
        "png_gray_key": encoded(few, "PNG", transparency=80),
        "png_bilevel_key": encoded(few.convert("1"), "PNG", transparency=0),
        "gif": encoded(palette, "GIF", transparency=3),
        "gif_gray": encoded(few, "GIF", transparency=80),
        "webp_alpha": encoded(rgba, "WEBP", lossless=True),
        "tiff_rgba": encoded(rgba, "TIFF"),
    }


@pytest.mark.parametrize("name", files_with_transparency())
def test_what_is_transparent_lies_on_white(name: str, tmp_path: Path) -> None:
    """The oracle gets the picture as it is opened; by path too, where transformers keeps what is clear."""
    path = tmp_path / name
    path.write_bytes(files_with_transparency()[name])
    with Image.open(path) as opened:
        expected = convert_to_rgb(opened, return_numpy=True)
    clear = np.asarray(Image.open(path).convert("RGBA"))[:, :, 3] == 0
    assert (
        clear.any()
        and (expected[clear] == 255).all()
        and not np.array_equal(expected, np.asarray(oracle(str(path))))
    )
    assert_every_source_gives(expected, path)
    by_path = convert_to_rgb(oracle(str(path)), return_numpy=True)
    assert np.array_equal(by_path, expected) == (name not in SHOWN_BY_PATH)


PICTURE_MODES = ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA"]


@pytest.mark.parametrize("mode", PICTURE_MODES)
def test_pictures_of_every_mode_are_those_of_transformers(mode: str) -> None:
    picture = Image.fromarray(noise(13, 21, 4)).convert(mode)
    expected = convert_to_rgb(picture, return_numpy=True)
    assert picture.mode == mode and expected.std() > 0
    np.testing.assert_array_equal(np.asarray(load_image(picture)), expected)


@pytest.mark.parametrize(("mode", "straight"), [("La", "LA"), ("RGBa", "RGBA")])
def test_colours_multiplied_by_their_alpha(mode: str, straight: str) -> None:
    picture = Image.fromarray(noise(13, 21, 4)).convert(straight).convert(mode)
    expected = convert_to_rgb(picture.convert(straight), return_numpy=True)
    np.testing.assert_array_equal(np.asarray(load_image(picture)), expected)


def test_lab_has_no_alpha() -> None:
    """Its second band is called A, which transformers takes for an alpha channel of pictures."""
    picture = Image.frombytes("LAB", (21, 13), noise(13, 21).tobytes())
    np.testing.assert_array_equal(np.asarray(load_image(picture)), np.asarray(picture.convert("RGB")))


def test_arrays_with_alpha_are_those_of_transformers() -> None:
    """Every value with every alpha: transformers' arithmetic for arrays is not its one for pictures."""
    alpha, value = np.mgrid[0:256, 0:256].astype(np.uint8)
    array = np.stack([value, value // 2, 255 - value, alpha], -1)
    expected = convert_to_rgb(array, return_numpy=True)
    np.testing.assert_array_equal(np.asarray(load_image(array)), expected)


# -- sources -------------------------------------------------------------------------------------------------


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


def test_other_tags_are_not_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture is turned without it; megabytes of tags would take seconds, and their memory tenfold."""
    exif = Image.Exif()
    exif[0x0112], exif[0x9999] = 6, "words"
    Image.fromarray(noise(16, 32)).save(tmp_path / "photo.png", exif=exif)
    turned = oracle(str(tmp_path / "photo.png"))
    monkeypatch.setattr(Image.Exif, "tobytes", None)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "photo.png")), np.asarray(turned))


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


class Liar(np.ndarray):
    """An array that says something else about its shape."""

    shape = (2, 2, 3)  # type: ignore[assignment]


class Interface:
    """What says that it is an array, of memory that it does not have."""

    __array_interface__ = {"shape": (9, 9, 3), "typestr": "|u1", "data": (8, True), "version": 3}  # noqa: RUF012


def test_arrays_that_lie() -> None:
    pixels = noise(6, 8)
    np.testing.assert_array_equal(np.asarray(load_image(pixels.view(Liar))), pixels)
    assert "Interface" in refusal(Interface(), UsageError)
    huge = np.broadcast_to(np.uint8(7), (10**6, 10**6, 3))  # takes one byte
    assert "at most" in refusal(huge)
    assert "masked" in refusal(np.ma.masked_array(pixels, pixels > 9), UsageError)
    for dtype in (object, bool, np.int8, np.uint16, np.float64, "S1", [("r", "u1")]):
        assert "must be uint8" in refusal(np.zeros((4, 4), dtype), UsageError)


@pytest.mark.parametrize("channels", [None, 3, 4])
def test_views_of_arrays_are_what_numpy_says_they_are(channels: int | None) -> None:
    pixels = noise(12, 10, channels)
    for view in (pixels[::-2, ::3], np.asfortranarray(pixels), pixels[4:5, :1], pixels[:, ::-1]):
        np.testing.assert_array_equal(np.asarray(load_image(view)), np.asarray(load_image(view.copy("C"))))
    read_only = np.frombuffer(noise(12, 10).tobytes(), np.uint8).reshape(12, 10, 3)
    np.testing.assert_array_equal(np.asarray(load_image(read_only)), noise(12, 10))


def test_bytes_that_are_gone_and_paths_in_bytes() -> None:
    view = memoryview(b"some bytes")
    view.release()
    assert "cannot be read" in refusal(view, UsageError)

    class InBytes:
        def __fspath__(self) -> bytes:
            return b"picture.png"

    assert "a path must be text" in refusal(InBytes(), UsageError)


def test_fifos_and_sockets_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.png"))
        for name in ("fifo.png", "socket.png"):
            assert "not a regular file" in refusal(tmp_path / name, UsageError)
    (tmp_path / "link.png").symlink_to("fifo.png")
    assert "not a regular file" in refusal(tmp_path / "link.png", UsageError)


def test_a_fifo_that_takes_a_files_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking at the path and opening it."""
    path = written(tmp_path / "picture.png", png(DEEP))
    seen = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(Path, "stat", lambda self, **_: seen)
    assert "not a regular file" in refusal(path, UsageError)


@pytest.mark.parametrize(
    "source",
    [
        "absent.png",
        b"",
        b"words",
        png_header(0, 7),
        png_header(50_000, 50_000),
        5,
        noise(4, 4, 2),
        "/dev/null",
    ],
    ids=str,
)
def test_checking_finds_what_shows_without_decoding(source: Any) -> None:
    with pytest.raises(VtpError) as caught:
        check_image(source)
    assert str(caught.value) == refusal(source)


def test_checking_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "picture.png", encoded(Image.fromarray(noise(64, 64)), "PNG")[:2000])
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for source in (path, path.read_bytes(), Image.open(path), noise(4, 4)):
        check_image(source)


def test_values_that_are_no_picture() -> None:
    assert "uint8" in refusal(noise(4, 4).astype(np.float32), UsageError)
    assert "channels last" in refusal(np.moveaxis(noise(4, 5), 2, 0), UsageError)
    assert "[4, 4, 2]" in refusal(noise(4, 4, 2), UsageError)
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
@pytest.mark.parametrize("size", [(50_000, 50_000), (10_000, 10_000), (1, 39_900_000)], ids=str)
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
        most = MAX_SIDE if size[0] == 1 and pillow_limit != 1000 else MAX_PIXELS  # Pillow's own comes first
        assert f"at most {most:,}" in refusal(png_header(*size))
        assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before
    assert not decoded


def test_the_longest_side_is_exact() -> None:
    """In files, Pillow's images and arrays alike; panoramas of telephones have half of it."""
    for turned in (False, True):
        for side in (MAX_SIDE, MAX_SIDE + 1):
            array = np.zeros((2, side, 3) if turned else (side, 2, 3), np.uint8)
            for source in (array, Image.fromarray(array), encoded(Image.fromarray(array), "PNG")):
                if side == MAX_SIDE:
                    assert load_image(source).size == array.shape[1::-1]
                    continue
                for act in (load_image, check_image):
                    with pytest.raises(VtpError, match="each side may have at most 32,768: shrink or crop"):
                        act(source)


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


def test_an_encoded_image_is_of_its_formats_only() -> None:
    picture = Image.fromarray(noise(13, 21))
    source = EncodedImage(encoded(picture, "PNG"), ("PNG", "JPEG"))
    check_image(source)
    assert np.array_equal(np.asarray(load_image(source)), noise(13, 21))
    for data in (encoded(picture, "TIFF"), encoded(picture, "BMP"), b"", b"hello"):
        for read in (check_image, load_image):
            with pytest.raises(VtpError, match=r"the picture is (not a picture|empty)"):
                read(EncodedImage(data, ("PNG", "JPEG")))
