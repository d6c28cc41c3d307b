"""Changed picture files of every common format. What is answered must be what Pillow's own decoding gives."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path

import numpy as np
from mutate import Step, change_bytes, draw_bytes
from PIL import Image, ImageOps
from subject import Subject, Wrong

from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.media.images import load_image
from vtp.runtime.preprocess import preprocess

_MODES = {
    "PNG": ("RGB", "L", "P", "RGBA", "1", "LA", "I;16"), "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"), "BMP": ("RGB", "P"), "GIF": ("P", "L"), "TIFF": ("RGB", "CMYK", "I;16", "L"),
    "PPM": ("RGB", "L"), "TGA": ("RGB", "P"), "ICO": ("RGBA",), "PCX": ("RGB",), "DDS": ("RGBA",),
    "SGI": ("RGB",),
}  # fmt: skip


class Area:
    """Opens a changed file, and makes pixel_values of it."""

    def __init__(self, subject: Subject, scratch: Path) -> None:
        self._spec = open_bundle(subject.bundle).manifest.image
        self._path = scratch / "picture"
        source = Image.open(subject.picture).resize((40, 30))
        self._files = {
            f"{form} {mode}": _saved(source, form, mode) for form, modes in _MODES.items() for mode in modes
        }

    def draw(self, rng: random.Random) -> list[Step]:
        """[format and mode], then changes of its bytes."""
        name = rng.choice(list(self._files))
        size = len(self._files[name])
        return [[name], *(draw_bytes(rng, size) for _ in range(rng.choice([1, 1, 2, 5])))]

    def run(self, steps: list[Step]) -> None:
        """Raises VtpError for a picture that is refused, Wrong where Pillow sees another."""
        data = change_bytes(self._files[steps[0][0]], steps[1:])
        self._path.write_bytes(data)
        image = load_image(str(self._path))
        preprocess(image, self._spec)
        if image.mode != "RGB":
            raise Wrong(f"mode {image.mode}")
        wanted = _opaque(data)
        if wanted is not None and not np.array_equal(np.asarray(image), wanted):
            raise Wrong("other pixels than Pillow's")


def _saved(source: Image.Image, form: str, mode: str) -> bytes:
    out = io.BytesIO()
    (
        source.convert("I").point(lambda x: x * 256).convert("I;16")
        if mode == "I;16"
        else source.convert(mode)
    ).save(out, form)
    return out.getvalue()


def _opaque(data: bytes) -> np.ndarray | None:
    """Pillow's pixels, upright; None where transparency or many bits make RGB a question of taste."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
        image.load()
        if image.mode not in ("RGB", "L", "P", "1", "CMYK") or "transparency" in image.info:
            return None
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
