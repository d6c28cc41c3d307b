"""Bringing a picture to the one layout that a bundle was made for.

A picture that the model's own processor would lay out as the bundle does goes through unchanged, and its
`pixel_values` are transformers'. For any other, the spec's `fit` says what happens:

letterbox   it is padded in the mean colour, centred, to the aspect of the bundle's image size, at its own
            resolution; so shapes keep their proportions, and the only resizing is the processor's.
stretch     it is resized to the layout as it is; shapes are distorted.
refuse      it is refused, in one line.
"""

from __future__ import annotations

from PIL import Image

from vtp.engines.errors import VtpError
from vtp.runtime.preprocess.pixels import check_area, mean_colour, paste
from vtp.runtime.preprocess.spec import Box, ImageSpec, Size


def fitted_size(spec: ImageSpec, picture: Size, own: object, made_for: object) -> Size:
    """(height, width) after padding a picture of size `picture`.

    `own` is the layout that the processor would choose for it, `made_for` the bundle's; raises `VtpError`
    where they differ and the spec says to refuse, and for a picture too long to be padded.
    """
    if own == made_for or spec.fit == "stretch":
        return picture
    height, width = spec.image_size
    if spec.fit == "refuse":
        raise VtpError(
            f"a picture of {picture[1]}x{picture[0]} does not have the layout that this bundle was made for, "
            f"that of {width}x{height} pixels; crop or resize the picture, or export with --image-fit "
            "letterbox"
        )
    padded = _padded(picture, (height, width))
    check_area(picture, padded, f"padded to the shape of {width}x{height}")
    return padded


def _padded(picture: Size, shape: Size) -> Size:
    """The smallest size that holds the picture and has the aspect of `shape`, to the nearest pixel."""
    (height, width), (rows, columns) = picture, shape
    if width * rows > height * columns:
        return max(height, (2 * width * rows + columns) // (2 * columns)), width
    return height, max(width, (2 * height * columns + rows) // (2 * rows))


def pad(image: Image.Image, size: Size, spec: ImageSpec) -> Image.Image:
    """Pad a picture to `fitted_size`'s answer."""
    return paste(image, size, mean_colour(spec))


def padded_box(picture: Size, padded: Size) -> Box:
    """Where the padded picture lies, in pixels of the picture before padding."""
    left, top = (padded[1] - picture[1]) // 2, (padded[0] - picture[0]) // 2
    return Box(-left, -top, padded[1] - left, padded[0] - top)
