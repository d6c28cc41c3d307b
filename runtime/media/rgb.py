"""What a viewer shows of a picture, as RGB: upright, transparent parts on white, deep greys scaled.

What is transparent is laid on white as transformers 5 does it (`image_transforms.convert_to_rgb`), bit for
bit. Knows Pillow's modes; opens nothing.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from vtp.engines.errors import VtpError

__all__ = ["to_rgb"]

_WHITE = (255, 255, 255, 255)
_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # colours that are stored multiplied by their alpha, and not so
_WITH_ALPHA = frozenset(("LA", "PA", "RGBA"))  # LAB has a band called A as well, which is not alpha
# Formats whose greys of more than 8 bits Pillow may give as mode I, with values from 0 to 65535.
_SIXTEEN_BITS = frozenset(("PNG", "PPM"))
_BITS_PER_SAMPLE = 258  # TIFF's tag
_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return a loaded image as a new one of mode RGB.

    Greys of 12 and 16 bits keep their high 8 bits, as Pillow reads 16-bit RGB. `VtpError` for pixels of which
    nothing says how bright white is (modes I and F); what Pillow raises goes through.
    """
    bits = _grey_bits(image, name)  # asked before turning, which forgets the format
    upright = _upright(image)
    return _on_white(upright if bits is None else _eight_bits(upright, bits))


def _upright(image: Image.Image) -> Image.Image:
    """As Pillow's `exif_transpose`, which also writes all tags anew: seconds for a few megabytes of them."""
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert(_STRAIGHT.get(image.mode, image.mode))
    if image.mode not in _WITH_ALPHA and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")


def _grey_bits(image: Image.Image, name: str) -> int | None:
    """How many bits the values of a deep grey have; None for the modes that Pillow turns into RGB itself."""
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        return 12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 16
    if image.mode not in ("I", "F"):
        return None
    if image.mode == "I" and image.format in _SIXTEEN_BITS:
        return 16
    kind = "floating-point" if image.mode == "F" else "32-bit"
    raise VtpError(
        f"{name} has {kind} pixels (mode {image.mode}), and nothing says which value is white; scale them to "
        "0..255 and give an 8-bit picture or a uint8 array"
    )


def _eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """A deep grey as mode L, or as LA where one of its values is transparent."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> (bits - 8)).clip(0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
