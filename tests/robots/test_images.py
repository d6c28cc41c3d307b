"""Pictures of ROS messages, against loops over bytes, the formula of BT.601, and OpenCV's own values."""

from __future__ import annotations

import array
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import VtpError
from vtp.serve.robots.images import ENCODINGS, compressed_rgb, image_rgb, picture_of

# Where red, green and blue lie within a pixel's bytes, as the names say.
CHANNELS = {
    "rgb8": (3, "rgb"),
    "bgr8": (3, "bgr"),
    "rgba8": (4, "rgba"),
    "bgra8": (4, "bgra"),
    "mono8": (1, "g"),
    "8UC1": (1, "g"),
}
# Two pixels' bytes as YUYV, and what OpenCV 5.0 (cvtColor, COLOR_YUV2RGB_YUYV) makes of them.
OPENCV = [
    ([16, 128, 235, 128], [0, 0, 0, 255, 255, 255]),
    ([81, 90, 81, 240], [254, 0, 0, 254, 0, 0]),
    ([145, 54, 145, 34], [0, 255, 1, 0, 255, 1]),
    ([41, 240, 41, 110], [0, 0, 255, 0, 0, 255]),
    ([0, 0, 255, 255], [203, 0, 0, 255, 225, 20]),
    ([255, 255, 0, 0], [74, 255, 255, 0, 54, 255]),
    ([126, 17, 127, 239], [255, 81, 0, 255, 82, 0]),
    ([90, 200, 91, 60], [0, 113, 231, 0, 114, 233]),
]


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8).tobytes()


def pixel(encoding: str, data: bytes, place: int) -> list[int]:
    """Red, green and blue of the pixel whose bytes begin at `place`."""
    _, names = CHANNELS[encoding]
    if names == "g":
        return [data[place]] * 3
    return [data[place + names.index(color)] for color in "rgb"]


@pytest.mark.parametrize("padding", [0, 1, 13])
@pytest.mark.parametrize("encoding", CHANNELS)
def test_packed_pixels_equal_a_loop(encoding: str, padding: int) -> None:
    height, width, size = 7, 5, CHANNELS[encoding][0]
    step = width * size + padding
    data = noise(height * step)
    wanted = [[pixel(encoding, data, y * step + x * size) for x in range(width)] for y in range(height)]
    made = image_rgb(encoding, height, width, step, data)
    assert made.dtype == np.uint8
    assert made.flags.c_contiguous
    assert made.tolist() == wanted


@pytest.mark.parametrize("encoding", ["yuyv", "yuv422_yuy2", "uyvy", "yuv422"])
def test_chroma_is_bt601_of_limited_range(encoding: str) -> None:
    """ITU-R BT.601-7: Y is 219 steps above 16, chroma 224 steps around 128; within the rounding of 8 bits."""
    height, width, step = 6, 8, 8 * 2 + 6
    data = noise(height * step, 1)
    made = image_rgb(encoding, height, width, step, data)
    luma_first = encoding.startswith("yuy") or encoding.endswith("yuy2")
    for y in range(height):
        for x in range(width):
            quad = data[y * step + 4 * (x // 2) :][:4]
            if luma_first:
                luma, cb, cr = quad[2 * (x % 2)], quad[1], quad[3]
            else:
                luma, cb, cr = quad[2 * (x % 2) + 1], quad[0], quad[2]
            bright, pb, pr = max(luma - 16, 0) / 219, (cb - 128) / 224, (cr - 128) / 224
            red, blue = bright + 1.402 * pr, bright + 1.772 * pb
            green = (bright - 0.299 * red - 0.114 * blue) / 0.587
            wanted = [min(max(255 * value, 0), 255) for value in (red, green, blue)]
            assert np.abs(made[y, x] - np.array(wanted)).max() <= 1.0


@pytest.mark.parametrize(("quad", "wanted"), OPENCV)
def test_chroma_equals_opencv(quad: list[int], wanted: list[int]) -> None:
    assert image_rgb("yuyv", 1, 2, 4, bytes(quad)).ravel().tolist() == wanted
    swapped = bytes([quad[1], quad[0], quad[3], quad[2]])
    assert image_rgb("uyvy", 1, 2, 4, swapped).ravel().tolist() == wanted


def test_large_pictures_are_converted_in_blocks_alike() -> None:
    """Above 2^18 pixels a picture is converted some rows at a time."""
    height, width = 1031, 640
    data = noise(height * width * 2, 2)
    whole = image_rgb("yuyv", height, width, 2 * width, data)
    for y in (0, 408, 409, 410, 818, 819, 820, 1030):
        row = image_rgb("yuyv", 1, width, 2 * width, data[y * 2 * width :][: 2 * width])
        assert (whole[y] == row[0]).all()


def test_the_last_row_may_end_with_its_pixels() -> None:
    whole = noise(3 * 20)
    assert (image_rgb("rgb8", 3, 5, 20, whole) == image_rgb("rgb8", 3, 5, 20, whole[:55])).all()


def test_the_picture_is_a_copy() -> None:
    """Messages of a middleware may be reused."""
    data = bytearray(noise(12))
    made = image_rgb("rgb8", 2, 2, 6, data)
    before = made.copy()
    data[:] = bytes(12)
    assert (made == before).all()


@dataclass
class Raw:
    """The fields of sensor_msgs/Image, as rclpy gives them."""

    encoding: str
    height: int
    width: int
    step: int
    data: Any
    is_bigendian: int = 0


@dataclass
class Compressed:
    """The fields of sensor_msgs/CompressedImage."""

    format: str
    data: Any


@pytest.mark.parametrize("data", [bytes, bytearray, memoryview, lambda b: array.array("B", b)])
@pytest.mark.parametrize("big", [0, 1])
def test_messages_of_any_buffer(data: Any, big: int) -> None:
    content = noise(24)
    made = picture_of(Raw("bgra8", 2, 3, 12, data(content), big))
    assert made.tolist() == [[pixel("bgra8", content, y * 12 + x * 4) for x in range(3)] for y in range(2)]


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = BytesIO()
    picture.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("name", ["png", "rgb8; png compressed bgr8", ""])
def test_png_is_exact(name: str) -> None:
    pixels = np.frombuffer(noise(5 * 7 * 3), np.uint8).reshape(5, 7, 3)
    data = array.array("B", encoded(Image.fromarray(pixels), "PNG"))
    assert (picture_of(Compressed(name, data)) == pixels).all()


@pytest.mark.parametrize("name", ["jpeg", "jpg", "rgb8; jpeg compressed bgr8"])
def test_jpeg_is_what_its_decoder_says(name: str) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16], pixels[:, 16:] = (220, 20, 30), (10, 40, 230)
    data = encoded(Image.fromarray(pixels), "JPEG")
    made = compressed_rgb(name, data)
    assert (made == np.asarray(Image.open(BytesIO(data)))).all()
    assert made[8, 4, 0] > 180 > made[8, 4, 2]  # red is red, whatever the name says of bgr8
    assert made[8, 28, 2] > 180 > made[8, 28, 0]


def test_grey_files_are_served() -> None:
    made = compressed_rgb("mono8; png compressed mono8", encoded(Image.new("L", (4, 3), 77), "PNG"))
    assert (made == np.full((3, 4, 3), 77)).all()


# -- what is refused -----------------------------------------------------------------------------------------


def test_an_unknown_encoding_is_named_with_what_is_served() -> None:
    with pytest.raises(VtpError) as refused:
        image_rgb("bayer_rggb8", 2, 2, 2, bytes(4))
    assert "'bayer_rggb8'" in str(refused.value)
    assert "debayer" in str(refused.value)
    assert all(name in str(refused.value) for name in ENCODINGS)


@pytest.mark.parametrize(
    "encoding", ["rgb16", "mono16", "16UC1", "32FC1", "8UC3", "nv12", "RGB8", "", "\x1b[2J"]
)
def test_other_encodings_are_refused_in_one_line(encoding: str) -> None:
    with pytest.raises(VtpError, match="are not served") as refused:
        image_rgb(encoding, 2, 2, 12, bytes(24))
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(("encoding", "step", "row"), [("rgb8", 11, 12), ("bgra8", 0, 16), ("yuyv", 7, 8)])
def test_a_step_below_a_row_is_refused_with_both_numbers(encoding: str, step: int, row: int) -> None:
    with pytest.raises(VtpError, match=f"step {step}, but {row} bytes"):
        image_rgb(encoding, 2, 4, step, bytes(2 * row))


@pytest.mark.parametrize("size", [0, 23, 25, 31, 33, 64])
def test_data_of_another_length_is_refused_with_both_numbers(size: int) -> None:
    """Rows of 12 bytes, 16 apart: 32 bytes, or 28 without what fills up the last row."""
    with pytest.raises(VtpError, match=f"{size} bytes of data, but 2 rows of step 16 are 32 bytes"):
        image_rgb("rgb8", 2, 4, 16, bytes(size))


@pytest.mark.parametrize(("height", "width"), [(0, 4), (4, 0), (0, 0)])
def test_pictures_of_no_pixels_are_refused(height: int, width: int) -> None:
    with pytest.raises(VtpError, match=f"{width}x{height} pixels came"):
        image_rgb("mono8", height, width, width, bytes(height * width))


def test_sizes_are_bounded() -> None:
    with pytest.raises(VtpError, match="at most"):
        image_rgb("mono8", 1 << 16, 1 << 16, 1 << 16, b"")
    with pytest.raises(VtpError, match="1x32769 pixels; each side may have at most 32,768"):
        image_rgb("mono8", 32_769, 1, 1, bytes(32_769))


def test_an_odd_width_has_no_shared_chroma() -> None:
    with pytest.raises(VtpError, match="3 pixels wide; it must be even"):
        image_rgb("yuyv", 2, 3, 6, bytes(12))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("h264", b"\x00\x00\x00\x01\x67abc", "'h264' is neither JPEG nor PNG"),
        ("16UC1; compressedDepth png", b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x89PNG", "neither"),
        ("jpeg", b"", "without data"),
        ("jpeg", b"\xff\xd8\xff\xe0 cut", "damaged|not a picture"),
        ("png", b"\x89PNG\r\n\x1a\n\x00\x00", "damaged|not a picture|truncated"),
    ],
)
def test_other_compressed_images_are_refused(name: str, data: bytes, words: str) -> None:
    with pytest.raises(VtpError, match=words):
        compressed_rgb(name, data)
