"""The pictures of a request: from a data: URL, base64 or an allowed domain, checked by their headers.

They are decoded when their turn comes, so that requests that wait hold no more than they sent. What Pillow
says of a picture never reaches a client: its texts have held addresses (CVE-2026-22778).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from vtp.runtime.media.images import MAX_SIDE, EncodedImage, excess
from vtp.serve.http.errors import ApiError
from vtp.serve.http.pictures.fetching import Fetcher
from vtp.serve.http.pictures.parts import is_crowded

__all__ = ["MediaLimits", "Picture", "check_picture", "decode_base64", "read_picture"]

# What Pillow may try on a client's bytes: the formats of cameras and web pages, and no others.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_NAMES = "JPEG, PNG, WebP, GIF or BMP"
_ALPHA_MODES = frozenset(("LA", "La", "PA", "RGBA", "RGBa"))
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
_SHOWN_SCHEME = 16  # characters of a URL's scheme in a message


@dataclass(frozen=True)
class MediaLimits:
    """What the pictures of one request may take.

    pictures  in one request
    bytes     of one picture's file
    pixels    of one picture, by its header
    side      pixels of its longer side, by its header
    """

    pictures: int = 16
    bytes: int = 32 * 2**20
    pixels: int = 40_000_000
    side: int = MAX_SIDE


@dataclass(frozen=True)
class Picture:
    """A picture whose header was read: a source for `load_image`, which shows what a viewer shows of it
    (upright, transparent parts on white); `notes` say in words what that changes. `size` is (width, height)
    of the upright picture."""

    image: EncodedImage
    size: tuple[int, int]
    notes: tuple[str, ...] = ()


async def read_picture(
    url: str,
    *,
    limits: MediaLimits,
    allowed_domains: tuple[str, ...],
    param: str,
    fetcher: Fetcher | None = None,
) -> Picture:
    """The picture of a data: URL (base64), or of an http(s) URL whose domain is allowed.

    allowed_domains  such as "example.org", "*.example.org" or "example.org:8080"
    param            the request's field, for errors
    fetcher          how URLs are fetched; None: as `Fetcher` does by default

    Raises ApiError (400) for what is refused: see `Fetcher`, `decode_base64` and `check_picture`.
    """
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "data":
        return await asyncio.to_thread(_from_data_url, rest, limits, param)
    if scheme.lower() in ("http", "https"):
        data = await (fetcher or Fetcher()).fetch(url, allowed_domains, limits.bytes, param)
        return await asyncio.to_thread(check_picture, data, limits, param)
    given = f"begins with '{scheme[:_SHOWN_SCHEME]}:'" if _is_scheme(scheme) and rest else "has no scheme"
    raise ApiError(
        f"the picture's URL {given}; give the picture itself as a data: URL (data:image/jpeg;base64,…)",
        param=param,
        code="invalid_image_url",
    )


def _is_scheme(text: str) -> bool:
    return text.isascii() and text.replace("+", "").replace("-", "").replace(".", "").isalnum()


def _from_data_url(rest: str, limits: MediaLimits, param: str) -> Picture:
    """The media type is not looked at: the content says what it is."""
    head, comma, text = rest.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(
            "the picture's data: URL is not base64; write data:image/jpeg;base64, and then the file's bytes "
            "in base64",
            param=param,
            code="invalid_image_url",
        )
    return decode_base64(text, limits, param)


def decode_base64(text: str, limits: MediaLimits, param: str) -> Picture:
    """The picture of a file in base64, with padding and nothing else in it."""
    if len(text) // 4 * 3 - 2 > limits.bytes:
        raise too_many_bytes(limits.bytes, param)
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ApiError(
            "the picture's base64 is damaged: a character that base64 does not have, or wrong padding; "
            "encode the whole file, without line ends",
            param=param,
            code="invalid_base64",
        ) from None
    return check_picture(data, limits, param)


def check_picture(data: bytes, limits: MediaLimits, param: str) -> Picture:
    """The picture of a file's bytes.

    Raises ApiError (400) for more bytes or pixels than `limits`, for another format, and for what is damaged
    as far as the header shows that.
    """
    if len(data) > limits.bytes:
        raise too_many_bytes(limits.bytes, param)
    if is_crowded(data):
        raise ApiError(
            "the picture's file consists of too many small parts; save it again",
            param=param,
            code="invalid_image",
        )
    with _opened(data, limits, param) as image:
        _check_size(image, limits, param)
        try:
            notes, size = tuple(_notes(image)), _upright_size(image)
        except Exception:  # damaged headers make Pillow raise nearly anything, and its texts tell too much
            raise _damaged(param) from None
    return Picture(EncodedImage(data, FORMATS), size, notes)


def too_many_bytes(limit: int, param: str) -> ApiError:
    """The refusal of a picture's file that is too large."""
    return ApiError(
        f"the picture's file is larger than {limit:,} bytes; shrink it, or save it as JPEG",
        param=param,
        code="image_too_large",
    )


def _opened(data: bytes, limits: MediaLimits, param: str) -> Image.Image:
    """Read the header."""
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        given = f"more pixels than are ever decoded; at most {limits.pixels:,} are taken"
        raise _too_large(given, param) from None
    except Exception:
        what = "not a picture that is served" if data else "empty"
        raise ApiError(
            f"the picture's file is {what}; give {_NAMES}, whole", param=param, code="invalid_image"
        ) from None


def _check_size(image: Image.Image, limits: MediaLimits, param: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise _damaged(param)
    if too_large := excess(width, height, limits.pixels, limits.side):
        raise _too_large(too_large, param)


def _too_large(given: str, param: str) -> ApiError:
    return ApiError(f"the picture has {given}: shrink or crop it first", param=param, code="image_too_large")


def _damaged(param: str) -> ApiError:
    return ApiError(
        "the picture's file is truncated or damaged; send the whole file", param=param, code="invalid_image"
    )


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in range(5, 9) else (width, height)


def _orientation(image: Image.Image) -> int:
    """Of EXIF, 1 to 8; 1 is upright."""
    readable = image.format != "PNG" or "exif" in image.info  # a PNG without it is decoded to look further
    return int(image.getexif().get(_ORIENTATION, 1)) if readable else 1


def _notes(image: Image.Image) -> Iterator[str]:
    """What the header says will be changed."""
    if _orientation(image) in range(2, 9):
        yield "turned upright by its EXIF orientation"
    if image.format in ("GIF", "WEBP", "PNG") and getattr(image, "is_animated", False):
        yield "only the first frame of the animation is shown"
    if image.mode in _ALPHA_MODES or image.info.get("transparency") is not None:
        yield "transparent parts were laid on white"
