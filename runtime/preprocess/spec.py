"""A bundle's preprocessing, as data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from PIL import Image

from vtp.engines.errors import VtpError
from vtp.runtime.media.images import MAX_PIXELS

FITS = ("letterbox", "stretch", "refuse")  # see `fit`
Size = tuple[int, int]  # (height, width), in pixels, as transformers writes sizes
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_LENGTHS = (
    *("shortest_edge", "height", "width", "crop_height", "crop_width", "image_height", "image_width"),
    *("longest_edge", "min_tiles", "max_tiles", "patch_size", "temporal_patch_size", "merge_size", "frames"),
)


class Box(NamedTuple):
    """A rectangle in pixels of the source picture; where padding was added, it reaches beyond."""

    left: float
    top: float
    right: float
    bottom: float

    def cut(self, rows: int, columns: int) -> tuple[Box, ...]:
        """The box in `rows` x `columns` equal parts, row by row."""
        x = [self.left + (self.right - self.left) * part / columns for part in range(columns + 1)]
        y = [self.top + (self.bottom - self.top) * part / rows for part in range(rows + 1)]
        return tuple(
            Box(x[column], y[row], x[column + 1], y[row + 1])
            for row in range(rows)
            for column in range(columns)
        )


class Kind(NamedTuple):
    """What one kind can do.

    check   raises VtpError for a spec that no picture could go through; fields that all kinds share are
            checked already.
    fields  names of the spec's fields that belong to this kind and not to all.
    size    (H, W) of the pixels that the vision tower sees at once: of a tile, where there are tiles.
    shape   shape of `pixel_values`.
    pixels  the work itself.
    boxes   where each tile lies in a source picture of (width, height).
    """

    check: Callable[[ImageSpec], None]
    fields: tuple[str, ...]
    size: Callable[[ImageSpec], Size]
    shape: Callable[[ImageSpec], tuple[int, ...]]
    pixels: Callable[[Image.Image, ImageSpec], np.ndarray]
    boxes: Callable[[ImageSpec, int, int], tuple[Box, ...]]


# Filled by `kinds`, which imports every kind's module; a kind's module knows the spec, the spec no kind.
KINDS: dict[str, Kind] = {}


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes `pixel_values`; every field is plain JSON.

    kind   the module that does it. All kinds: resize with the filter `resample`, times `rescale_factor`,
           minus `mean`, divided by `std`, the last two behind their switches.

    "clip"      [1, 3, H, W]: `do_pad` to a square in the mean colour; `do_resize` so that the shorter edge is
                `shortest_edge`, or to exactly `height` x `width`; `do_center_crop` to `crop_height` x
                `crop_width`, black where the picture is smaller. With `frames` the bundle answers about
                videos: their number of frames, [frames, 3, H, W], each of them made as a picture is.

    The others are made for one image size, `image_height` x `image_width`; `fit` ("letterbox", "stretch",
    "refuse") says what becomes of a picture that the processor would lay out otherwise.

    "qwen"      [patches, values]: `patch_size`, `temporal_patch_size`, `merge_size`; the processor's own
                range is `min_pixels` to `max_pixels`.
    "anyres"    [tiles, 3, `height`, `width`]: the whole picture, then its parts at the best of `pinpoints`,
                a list of (height, width).
    "internvl"  [tiles, 3, `height`, `width`]: `min_tiles` to `max_tiles` parts, then the whole picture.
    "idefics3"  [tiles, 3, `height`, `width`]: the parts of a picture of `longest_edge`, then the whole of it;
                without `do_image_splitting` one tile.

    Raises `VtpError` for a spec that contradicts itself.
    """

    kind: str = "clip"
    do_convert_rgb: bool = True
    do_pad: bool = False
    do_resize: bool = True
    shortest_edge: int | None = None
    height: int | None = None
    width: int | None = None
    resample: int = 3
    do_center_crop: bool = False
    crop_height: int | None = None
    crop_width: int | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    image_height: int | None = None
    image_width: int | None = None
    fit: str = "letterbox"
    min_pixels: int | None = None
    max_pixels: int | None = None
    patch_size: int | None = None
    temporal_patch_size: int | None = None
    merge_size: int | None = None
    pinpoints: tuple[tuple[int, int], ...] = ()
    min_tiles: int | None = None
    max_tiles: int | None = None
    longest_edge: int | None = None
    do_image_splitting: bool = True
    frames: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        object.__setattr__(self, "pinpoints", tuple(tuple(point) for point in self.pinpoints))
        _check(self)

    @property
    def fixed_size(self) -> Size:
        """(H, W) of the pixels that the vision tower sees at once, of a tile where there are tiles.

        Raises `VtpError` where it depends on the picture.
        """
        return KINDS[self.kind].size(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `pixel_values`; raises `VtpError` where it depends on the picture."""
        return KINDS[self.kind].shape(self)

    @property
    def views(self) -> int:
        """How many tiles `pixel_values` holds; 1 where the picture is seen in one piece."""
        return self.shape[0] if self.image_height is not None and len(self.shape) == 4 else 1

    @property
    def image_size(self) -> Size:
        """(H, W) of the image size that the bundle was made for; kind "clip" has none of its own."""
        return self.image_height or 0, self.image_width or 0

    @property
    def tile(self) -> Size:
        """(H, W) of one tile, for the kinds that cut tiles."""
        return self.height or 0, self.width or 0

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values that `from_json` takes back."""
        values = dataclasses.asdict(self)
        return {name: _as_list(value) for name, value in values.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageSpec:
        """Read `to_json`'s dictionary; raises `VtpError` for keys this version does not know."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise VtpError(
                f"the bundle's image section has unknown keys {unknown}; export it again with this version"
            )
        return cls(**data)

    def require(self, condition: bool, message: str) -> None:
        """Raise `VtpError` unless `condition`."""
        if not condition:
            raise VtpError(f"image preprocessing: {message}")

    def require_all(self, *names: str) -> None:
        """Raise `VtpError` unless these fields are set."""
        missing = [name for name in names if getattr(self, name) is None]
        self.require(not missing, f"kind {self.kind} needs {', '.join(missing)}")


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, tuple) else value


def _check(spec: ImageSpec) -> None:
    """Refuse a spec that no picture could go through."""
    if spec.kind not in KINDS:
        raise VtpError(f"unknown image preprocessing '{spec.kind}'; this version knows {', '.join(KINDS)}")
    _check_numbers(spec)
    _check_fields(spec)
    if spec.kind != "clip":
        spec.require(spec.do_resize, f"kind {spec.kind} needs do_resize")
    spec.require(spec.fit in FITS, f"fit must be one of {', '.join(FITS)}, not {spec.fit!r}")
    spec.require(
        math.prod(spec.image_size) <= MAX_PIXELS,
        f"image size {spec.image_width}x{spec.image_height} is too large; at most {MAX_PIXELS:,} pixels",
    )
    KINDS[spec.kind].check(spec)


def _check_numbers(spec: ImageSpec) -> None:
    """Ranges of numbers, whatever the kind."""
    for name in _LENGTHS:
        size = getattr(spec, name)
        fits = size is None or (is_int(size) and 1 <= size <= 65_536)
        spec.require(fits, f"{name} must be 1 to 65536, not {size!r}")
    for name in ("min_pixels", "max_pixels"):
        count = getattr(spec, name)
        spec.require(
            count is None or (is_int(count) and count >= 1), f"{name} must be positive, not {count!r}"
        )
    for point in spec.pinpoints:
        fits = len(point) == 2 and all(is_int(edge) and 1 <= edge <= 65_536 for edge in point)
        spec.require(fits, f"a resolution must be two edges of 1 to 65536, not {list(point)}")
    fits = is_int(spec.resample) and 0 <= spec.resample <= 5
    spec.require(fits, f"resample must be 0 to 5, not {spec.resample!r}")
    for name in ("mean", "std"):
        numbers = getattr(spec, name)
        fits = len(numbers) == 3 and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        spec.require(fits, f"{name} must be three numbers, not {list(numbers)}")
    spec.require(0 not in spec.std, "std must not hold a zero")


def _check_fields(spec: ImageSpec) -> None:
    """A field of another kind is a mistake, for it would change nothing."""
    special = {name for kind in KINDS.values() for name in kind.fields}
    for field in dataclasses.fields(spec):
        if field.name in special - set(KINDS[spec.kind].fields):
            given = getattr(spec, field.name) != field.default
            spec.require(not given, f"kind {spec.kind} has no {field.name}")


def is_int(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a whole number; True is not."""
    return isinstance(value, int) and not isinstance(value, bool)
