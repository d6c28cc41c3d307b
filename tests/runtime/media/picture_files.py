"""Picture files in many formats and modes, and how what is made of them is checked."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines.errors import VtpError
from vtp.runtime.media.images import load_image


def noise(height: int, width: int, channels: int | None = 3, seed: int = 0) -> np.ndarray:
    """Random uint8 pixels [H, W, channels], or [H, W] for None."""
    shape = (height, width) if channels is None else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds none of them."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


def png(pixels: np.ndarray, bits: int = 16, **chunks: bytes) -> bytes:
    """A PNG of values [H, W] (grey), [H, W, 2] (grey with alpha), [H, W, 3] or [H, W, 4], written by hand."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, colour, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2" if bits == 16 else "u1").tobytes() for line in pixels)
    parts = {"IHDR": header, **chunks, "IDAT": zlib.compress(lines), "IEND": b""}
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in parts.items():
        body = kind.encode() + body
        data += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data


def tiff_of_12_bits(pixels: np.ndarray) -> bytes:
    """A little-endian grey TIFF [H, W], W even, with two values of 12 bits in three bytes."""
    height, width = pixels.shape
    first, second = pixels[:, 0::2].astype(int), pixels[:, 1::2].astype(int)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)
    entries = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: height}
    entries[279] = packed.nbytes
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(4) + packed.tobytes()


DEEP = (np.arange(14 * 22, dtype=np.uint16) * 210).reshape(14, 22)


def files_of_all_modes() -> dict[str, bytes]:
    """Files that transformers opens as a viewer does."""
    rgb = Image.fromarray(noise(13, 21))
    frames = [Image.fromarray(noise(13, 21, seed=seed)) for seed in range(3)]
    more: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 40}
    return {
        "png_rgb": encoded(rgb, "PNG"),
        "png_gray": encoded(rgb.convert("L"), "PNG"),
        "png_bilevel": encoded(rgb.convert("1"), "PNG"),
        "png_palette": encoded(rgb.quantize(17), "PNG"),
        "png_16_bit_rgb": png(np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], -1)),
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg_cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "tiff_cmyk": encoded(rgb.convert("CMYK"), "TIFF"),
        "tiff_ycbcr": encoded(rgb.convert("YCbCr"), "TIFF"),
        "tiff_lab": encoded(Image.frombytes("LAB", (21, 13), noise(13, 21).tobytes()), "TIFF"),
        "bmp": encoded(rgb, "BMP"),
        "gif_animated": encoded(frames[0], "GIF", **more),
        "png_animated": encoded(frames[0], "PNG", **more),
        "webp_animated": encoded(frames[0], "WEBP", lossless=True, **more),
    }


def assert_every_source_gives(expected: np.ndarray, path: Path) -> None:
    data = path.read_bytes()
    for source in (path, str(path), data, bytearray(data), memoryview(data), Image.open(path)):
        image = load_image(source)
        assert image.mode == "RGB" and image.size == expected.shape[1::-1]
        np.testing.assert_array_equal(np.asarray(image), expected)
        np.testing.assert_array_equal(np.asarray(load_image(image)), expected)  # and stays as it is


def refusal(source: Any, kind: type[VtpError] = VtpError) -> str:
    with pytest.raises(kind) as caught:
        load_image(source)
    text = str(caught.value)
    assert text and "\n" not in text
    return text
