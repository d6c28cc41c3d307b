"""Pictures of requests: what is taken, as Pillow shows it, and what is refused, in the server's own words."""

from __future__ import annotations

import asyncio
import base64
import re
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import VtpError
from vtp.runtime.media.images import EncodedImage, load_image
from vtp.runtime.media.pictures import PictureError
from vtp.serve.http.errors import ApiError, holds_no_secret
from vtp.serve.http.pictures.parts import is_crowded
from vtp.serve.http.pictures.sources import FORMATS, MediaLimits, check_picture, read_picture
from vtp.serve.http.refusals import told

from .client import Site, words

LIMITS = MediaLimits()
PARAM = "messages.0.content.1.image_url"


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def url_of(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


@dataclass(frozen=True)
class Seen:
    """A picture as the model sees it."""

    image: Image.Image
    notes: tuple[str, ...]


def read(url: str, limits: MediaLimits = LIMITS) -> Seen:
    """Read and load it; what cannot be is refused at either place."""
    picture = asyncio.run(read_picture(url, limits=limits, allowed_domains=(), param=PARAM))
    try:
        return Seen(load_image(picture.image), picture.notes)
    except VtpError as error:
        raise told(as_picture_error(error), running=True) from None


def as_picture_error(error: VtpError) -> PictureError:
    """As `Pictures.load` raises it."""
    made = PictureError(str(error))
    made.__cause__ = error.__cause__
    return made


def refusal(url: str, limits: MediaLimits = LIMITS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(url, limits)
    error = caught.value
    assert (error.status, error.param) in ((400, PARAM), (400, "messages"))  # at once, or when it is decoded
    assert "\n" not in error.message and len(error.message) < 300
    assert not re.search("0x[0-9a-f]{6}|BytesIO|PIL|Traceback|/", _without_media(error))
    assert error.__cause__ is None
    return error


def _without_media(error: ApiError) -> str:
    """The message, less the media type that it names as an example."""
    return error.message.replace("image/jpeg", "").replace("https://example.org/picture.jpg", "")


def scene(width: int = 6, height: int = 4) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


# -- what is taken -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_read_whatever_its_media_type(kind: str) -> None:
    data = saved(scene(), kind)
    for head in ("data:image/png;base64,", "data:;base64,", "DATA:text/html;charset=x;BASE64,"):
        picture = read(url_of(data, head))
        assert (picture.image.mode, picture.image.size, picture.notes) == ("RGB", (6, 4), ())
        assert np.array_equal(np.asarray(picture.image), np.asarray(Image.open(BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "LA", "RGBA", "I;16", "YCbCr"])
def test_odd_sizes_and_modes(size: tuple[int, int], mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full(size[::-1], 0x8123, np.uint16))
    else:
        image = Image.new("RGB", size, (200, 200, 200)).convert(mode)
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    picture = read(url_of(saved(image, kind))).image
    assert (picture.mode, picture.size) == ("RGB", size)
    expected = 0x81 if mode == "I;16" else 255 if mode == "1" else 200
    if mode != "1":  # which is dithered
        assert abs(np.asarray(picture).astype(int) - expected).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_told(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read(url_of(saved(scene(), "PNG", exif=exif)))
    flips = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }
    assert np.array_equal(np.asarray(picture.image), flips[orientation](np.asarray(scene())))
    assert bool(picture.notes) == (orientation != 1)


def transparent(mode: str) -> bytes:
    """Black, its left half transparent."""
    alpha = np.repeat([[0, 0, 255, 255]], 4, axis=0).astype(np.uint8)
    if mode in ("RGBA", "LA"):
        image = Image.new(mode[:-1], (4, 4))
        image.putalpha(Image.fromarray(alpha))
        return saved(image)
    if mode == "P":
        image = Image.fromarray(alpha // 255)
        image = image.convert("P")
        image.putdata([int(value) // 255 for value in alpha.ravel()])
        image.putpalette([255, 0, 0, 0, 0, 0])
        return saved(image, transparency=0)
    base = np.repeat(alpha[:, :, None], 3, axis=2)  # the colour that is transparent is 0, the rest grey
    if mode == "RGB":
        return saved(Image.fromarray(np.where(base == 0, 7, 0).astype(np.uint8)), transparency=(7, 7, 7))
    return saved(Image.fromarray(np.where(alpha == 0, 7, 0).astype(np.uint8)), transparency=7)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_parts_are_laid_on_white_and_told(mode: str) -> None:
    picture = read(url_of(transparent(mode)))
    expected = np.repeat(np.repeat([[255, 255, 0, 0]], 4, axis=0)[:, :, None], 3, axis=2)
    assert np.array_equal(np.asarray(picture.image), expected)
    assert picture.notes == ("transparent parts were laid on white",)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_shown(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    picture = read(url_of(data))
    assert picture.image.getpixel((0, 0)) == (255, 0, 0)
    assert picture.notes == ("only the first frame of the animation is shown",)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "TGA", "PCX", "JPEG2000", "DDS", "EPS"])
def test_other_formats_are_refused(kind: str) -> None:
    assert "not a picture that is served" in refusal(url_of(saved(scene(16, 16), kind))).message


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"hello", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    refusal(url_of(data))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    data = saved(scene(64, 64), kind, **({"lossless": True} if kind == "WEBP" else {}))
    refusal(url_of(data[: int(len(data) * share)]))


def bomb(width: int, height: int) -> bytes:
    """A PNG that is small as a file, and says that it is large."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(6325, 6325), (10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_by_their_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", None)  # decoding would fail
    assert "at most 40,000,000" in refusal(url_of(bomb(*size))).message


def test_the_pixel_limit_is_exact() -> None:
    data = saved(scene(6, 4))
    assert read(url_of(data), MediaLimits(pixels=24)).image.size == (6, 4)
    error = refusal(url_of(data), MediaLimits(pixels=23))
    assert "6x4 = 24 pixels; at most 23" in error.message and error.code == "image_too_large"


def test_the_longest_side_is_bounded_by_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row takes memory of its own: a column of 40 million pixels takes as much as many pictures."""
    assert read(url_of(saved(scene(1, 32_768)))).image.size == (1, 32_768)
    monkeypatch.setattr(Image.Image, "load", None)  # decoding would fail
    for size in ((1, 39_900_000), (32_769, 1)):
        error = refusal(url_of(bomb(*size)))
        assert f"{size[0]}x{size[1]} pixels; each side may have at most 32,768" in error.message
        assert error.code == "image_too_large"


def test_the_byte_limit_is_exact() -> None:
    data = saved(scene())
    assert read(url_of(data), MediaLimits(bytes=len(data))).image.size == (6, 4)
    error = refusal(url_of(data), MediaLimits(bytes=len(data) - 1))
    assert f"larger than {len(data) - 1} bytes" in error.message


def test_headers_of_hostile_files_end_in_a_picture_or_in_one_line() -> None:
    """Bytes that were changed here and there, as a fuzzer does it."""
    random = np.random.default_rng(1)
    for kind in FORMATS:
        data = saved(scene(), kind)
        for _ in range(60):
            changed = bytearray(data)
            for place in random.integers(0, len(data), 3):
                changed[place] = random.integers(0, 256)
            try:
                assert read(url_of(bytes(changed))).image.mode == "RGB"
            except ApiError as error:
                assert "\n" not in error.message and holds_no_secret(error.message)


@pytest.mark.parametrize(
    "text", ["=", "AAA", "AAA*", "AA AA", "AAAA\n", "A-_A", "é===", "AAAA%3D", "A===", "====A"]
)
def test_base64_is_read_strictly(text: str) -> None:
    assert refusal(f"data:image/png;base64,{text}").code == "invalid_base64"


@pytest.mark.parametrize(
    "url", ["data:", "data:image/png,AAAA", "data:image/png;base64", "data:;base32,AAAA"]
)
def test_data_urls_without_base64_are_refused(url: str) -> None:
    assert "base64" in refusal(url).message


@pytest.mark.parametrize(
    "url",
    [
        "",
        "scene.png",
        "/etc/passwd",
        "iVBORw0KGgo=",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "ftp://example.org/a.png",
        "gopher://example.org/",
        "blob:https://example.org/1",
        "jar:file:///a",
        "//example.org/a.png",
        "\ndata:;base64,AAAA",
        "\ud800:x",
    ],
)
def test_other_schemes_are_refused(url: str) -> None:
    error = refusal(url)
    assert error.code == "invalid_image_url" and "passwd" not in error.message


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_alike_where_warnings_are_errors() -> None:
    assert "at most 40,000,000" in refusal(url_of(bomb(10_000, 10_000))).message


def test_what_waits_is_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of 36 megapixels is not decoded before its turn."""
    data = saved(Image.new("L", (6000, 6000)))
    monkeypatch.setattr(Image.Image, "load", None)  # decoding would fail
    picture = asyncio.run(read_picture(url_of(data), limits=LIMITS, allowed_domains=(), param=PARAM))
    assert picture.image.data == data


def test_no_other_format_is_tried_when_it_is_decoded() -> None:
    """Not even on bytes that another of Pillow's decoders would take."""
    data = saved(scene(), "TIFF")
    assert load_image(data).size == (6, 4)
    with pytest.raises(VtpError, match="not a picture"):
        load_image(EncodedImage(data, FORMATS))


@pytest.mark.parametrize("stream", [False, True])
def test_a_damaged_picture_is_told_in_the_servers_words(site: Site, stream: bool) -> None:
    """It shows when the picture is decoded, after the request was taken; other pictures are answered."""
    data = saved(scene(64, 64))
    parts = [{"type": "image_url", "image_url": {"url": url_of(data[: len(data) // 2])}}, words("how many ?")]
    answer = site.chat(parts, stream=stream)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
    assert answer.error["message"] == "a picture's file is truncated or damaged; send the whole file"
    parts[0]["image_url"] = {"url": url_of(data)}
    assert site.chat(parts, stream=stream).status == 200


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_size_is_that_of_the_upright_picture(kind: str, orientation: int) -> None:
    file, exif = BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(file, kind, exif=exif)
    picture = check_picture(file.getvalue(), LIMITS, PARAM)
    assert picture.size == load_image(picture.image).size


# -- files of many parts -------------------------------------------------------------------------------------

DOT = Image.new("RGB", (4, 4), "red")
JPEG, PNG, GIF = saved(DOT, "JPEG"), saved(DOT), saved(DOT, "GIF")
MARK = b"!\xfe\x01a\x00"  # a comment of a GIF


def scanned(count: int) -> bytes:
    """A progressive JPEG whose last scan is there `count` times more."""
    file = saved(DOT, "JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    return file[:-2] + file[last:-2] * count + file[-2:]


def in_runs(side: int, lines: bytes) -> bytes:
    """A grey BMP of side x side pixels in runs (RLE8)."""
    palette = bytes(value for grey in range(256) for value in (grey, grey, grey, 0))
    sizes = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(lines), 0, 0, 0, 0)
    start = 14 + len(sizes) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(lines), 0, 0, start) + sizes + palette + lines


EXIF = b"\xff\xe1\x00\x0eExif\0\0II*\0\0\0"


CROWDED = [
    scanned(101),
    JPEG[:2] + EXIF * 17 + JPEG[2:],
    in_runs(1500, b"\x01\x00\x00\x00" * 1500),
    in_runs(8, bytes(3 << 20)),
    JPEG[:2] + b"\xff\xfe\x00\x02" * 20000 + JPEG[2:],
    JPEG[:2] + b"\x00" * 20000 + JPEG[2:],
    JPEG[:2] + b"\xff" * 20000 + JPEG[2:],
    PNG[:33] + b"\x00\x00\x00\x01tEXta\x00\x00\x00\x00" * 20000 + PNG[33:],
    GIF[:-1] + MARK * 150000 + b";",
    b"GIF89a\x01\x00\x01\x00\x00\x00\x00!\xfe" + b"\x01a" * 300000 + b"\x00",
    b"GIF89a\x01\x00\x01\x00\x00\x00\x00" + b"?" * 300000,
]


@pytest.mark.parametrize("data", CROWDED, ids=range(len(CROWDED)))
def test_files_of_too_many_parts_are_refused_before_pillow_reads_them(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ApiError, match="too many small parts"):
        read(url_of(data))


def test_files_of_many_parts_are_read() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
    frames = {"save_all": True, "append_images": [noise.rotate(90), noise]}
    for data in (
        saved(noise),
        saved(noise, "JPEG", quality=100, progressive=True, icc_profile=b"x" * 900_000, comment=b"c"),
        saved(noise, "GIF", **frames),
        saved(noise, "WEBP", **frames),
        scanned(80),
        JPEG[:2] + EXIF * 16 + JPEG[2:],
        JPEG + b"\xff\xda\x00\x08" * 5000,  # a film behind the picture, as telephones write it
        in_runs(64, b"\x40\x07\x00\x00" * 64),
        JPEG[:2] + b"\xff\xfe\x00\x02" * 9000 + JPEG[2:],
        b"",
        JPEG[:2],
        GIF[:6],
        PNG[:8],
    ):
        assert not is_crowded(data)
