"""From a picture to `pixel_values`, bit for bit as transformers' PIL image processors make them.

The recipe is data (`ImageSpec`), read from a model's processor configuration at export and kept in the
bundle; `kind` names the function that carries it out. Resizing is Pillow's own, and the arithmetic on pixels
is done once for each of the 256 values and looked up, which gives the same bits as doing it per pixel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vtp.engines.errors import VtpError
from vtp.runtime.images import MAX_PIXELS

__all__ = ["Box", "ImageSpec", "preprocess", "source_box", "spec_from_processor"]

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)


class Box(NamedTuple):
    """A rectangle in pixels of the source picture; where padding was added, it reaches beyond."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes `pixel_values` [1, 3, H, W]; every field is plain JSON.

    Steps of kind "clip", each behind its switch: `do_pad` to a square in the mean colour; `do_resize` so that
    the shorter edge is `shortest_edge`, or to exactly `height` x `width`; `do_center_crop` to `crop_height` x
    `crop_width`, black where the picture is smaller; times `rescale_factor`; minus `mean`, divided by `std`.
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
    mean: tuple[float, ...] = _CLIP_MEAN
    std: tuple[float, ...] = _CLIP_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        _check_spec(self)

    @property
    def fixed_size(self) -> tuple[int, int]:
        """(H, W) of `pixel_values`; raises `VtpError` where it depends on the picture."""
        if self.do_center_crop:
            return self.crop_height or 0, self.crop_width or 0
        if self.do_resize and self.height and self.width:
            return self.height, self.width
        if self.do_resize and self.do_pad and self.shortest_edge:
            return self.shortest_edge, self.shortest_edge
        raise VtpError(
            "this image processor gives each picture another size; a static graph needs do_center_crop, "
            "or a size with height and width"
        )

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values that `from_json` takes back."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageSpec:
        """Read `to_json`'s dictionary; raises `VtpError` for keys this version does not know."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise VtpError(
                f"the bundle's image section has unknown keys {unknown}; export it again with this version"
            )
        return cls(**data)


def preprocess(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Turn an RGB image (see `vtp.runtime.images.load_image`) into float32 `pixel_values` [1, 3, H, W].

    Raises `VtpError` for another mode, and for a picture so long and thin that resizing would exhaust memory.
    """
    if image.mode != "RGB":
        raise VtpError(
            f"preprocess takes RGB images, not mode {image.mode}; open the picture with load_image"
        )
    return _KINDS[spec.kind].pixels(image, spec)


def source_box(spec: ImageSpec, width: int, height: int) -> Box:
    """Where the model's input lies in a source picture of `width` x `height` pixels.

    The map is linear: column u of W input columns shows source column left + u / W * (right - left).
    """
    return _KINDS[spec.kind].box(spec, width, height)


def _clip_pixels(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Pad, resize and crop with Pillow, then look every pixel value up; float32 [1, 3, H, W]."""
    plan = _clip_plan(spec, *image.size)
    if plan.padded != image.size:
        square = Image.new("RGB", plan.padded, tuple(int(value * 255) for value in spec.mean))
        square.paste(image, plan.pad)
        image = square
    if spec.do_resize:
        image = image.resize(plan.resized, resample=Image.Resampling(spec.resample))
    if spec.do_center_crop:
        left, top = plan.crop
        image = image.crop((left, top, left + plan.output[0], top + plan.output[1]))
    values = np.asarray(image)  # [H, W, 3] uint8
    table = _value_table(spec)
    return np.stack([table[channel][values[:, :, channel]] for channel in range(3)])[None]


def _value_table(spec: ImageSpec) -> np.ndarray:
    """What each uint8 value becomes in each channel: float32 [3, 256].

    The order of types is transformers': the product in float64, rounded to float32, then float32 arithmetic.
    """
    values = np.arange(256, dtype=np.uint8)
    scaled = values.astype(np.float64) * spec.rescale_factor if spec.do_rescale else values
    table = np.broadcast_to(scaled.astype(np.float32), (3, 256))
    if not spec.do_normalize:
        return table
    mean, std = (np.array(numbers, dtype=np.float32)[:, None] for numbers in (spec.mean, spec.std))
    return (table - mean) / std


class _ClipPlan(NamedTuple):
    """Sizes (width, height) and offsets (x, y) of every step, in pixels."""

    padded: tuple[int, int]
    pad: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]
    output: tuple[int, int]


def _clip_plan(spec: ImageSpec, width: int, height: int) -> _ClipPlan:
    """Follow one picture's size through the steps, before any memory is spent on it."""
    side = max(width, height)
    padded = (side, side) if spec.do_pad else (width, height)
    pad = ((padded[0] - width) // 2, (padded[1] - height) // 2)
    resized = _resized_size(spec, *padded) if spec.do_resize else padded
    for step, size in (("padded to a square", padded), ("resized for this model", resized)):
        if math.prod(size) > MAX_PIXELS:
            raise VtpError(
                f"a picture of {width}x{height} is too long: {step} it would be {size[0]}x{size[1]}; "
                f"at most {MAX_PIXELS:,} pixels are processed; crop it first"
            )
    output = (spec.crop_width or 0, spec.crop_height or 0) if spec.do_center_crop else resized
    crop = ((resized[0] - output[0]) // 2, (resized[1] - output[1]) // 2)
    return _ClipPlan(padded, pad, resized, crop, output)


def _resized_size(spec: ImageSpec, width: int, height: int) -> tuple[int, int]:
    """(width, height) after resizing, rounded as transformers rounds: down, in float arithmetic."""
    if spec.height and spec.width:
        return spec.width, spec.height
    edge = spec.shortest_edge or 0
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def _clip_box(spec: ImageSpec, width: int, height: int) -> Box:
    """Undo crop, resize and padding for the corners of the model's input."""
    plan = _clip_plan(spec, width, height)
    scale_x, scale_y = (plan.padded[axis] / plan.resized[axis] for axis in (0, 1))
    left = plan.crop[0] * scale_x - plan.pad[0]
    top = plan.crop[1] * scale_y - plan.pad[1]
    return Box(left, top, left + plan.output[0] * scale_x, top + plan.output[1] * scale_y)


class _Kind(NamedTuple):
    """What one kind of preprocessing can do; a new family with another recipe adds one row to `_KINDS`."""

    pixels: Callable[[Image.Image, ImageSpec], np.ndarray]
    box: Callable[[ImageSpec, int, int], Box]


_KINDS: dict[str, _Kind] = {"clip": _Kind(_clip_pixels, _clip_box)}


def _check_spec(spec: ImageSpec) -> None:
    """Refuse a spec that no picture could go through."""
    if spec.kind not in _KINDS:
        raise VtpError(f"unknown image preprocessing '{spec.kind}'; this version knows {', '.join(_KINDS)}")
    sizes = tuple(size is not None for size in (spec.shortest_edge, spec.height, spec.width))
    _require(
        not spec.do_resize or sizes in ((True, False, False), (False, True, True)),
        "resizing needs either shortest_edge, or height and width",
    )
    _require(
        not spec.do_center_crop or (spec.crop_height is not None and spec.crop_width is not None),
        "center cropping needs crop_height and crop_width",
    )
    for name in ("shortest_edge", "height", "width", "crop_height", "crop_width"):
        size = getattr(spec, name)
        _require(
            size is None or (_is_int(size) and 1 <= size <= 65_536),
            f"{name} must be 1 to 65536, not {size!r}",
        )
    _require(
        _is_int(spec.resample) and 0 <= spec.resample <= 5, f"resample must be 0 to 5, not {spec.resample!r}"
    )
    for name in ("mean", "std"):
        numbers = getattr(spec, name)
        _require(
            len(numbers) == 3 and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers),
            f"{name} must be three numbers, not {list(numbers)}",
        )
    _require(0 not in spec.std, "std must not hold a zero")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise VtpError(f"image preprocessing: {message}")


class _Processor(NamedTuple):
    """One transformers image processor: its kind here and its class defaults, for keys a file leaves out."""

    kind: str
    defaults: dict[str, Any]
    pads: bool = False


_PROCESSORS: dict[str, _Processor] = {
    "CLIP": _Processor(
        "clip",
        {
            "do_center_crop": True,
            "size": {"shortest_edge": 224},
            "crop_size": {"height": 224, "width": 224},
            "image_mean": _CLIP_MEAN,
            "image_std": _CLIP_STD,
        },
    ),
    "Siglip": _Processor(
        "clip", {"size": {"height": 224, "width": 224}, "image_mean": _HALF, "image_std": _HALF}
    ),
}
# LLaVA's own class differs from CLIP's by one switch: `do_pad` pads to a square first.
_PROCESSORS["Llava"] = _PROCESSORS["CLIP"]._replace(pads=True)

_COMMON = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_pad": False,
    "crop_size": None,
}
# Keys that say who wrote the file or how tensors are handed over, and change no pixel.
_BYSTANDERS = frozenset(
    (
        *(
            "image_processor_type",
            "feature_extractor_type",
            "processor_class",
            "auto_map",
            "backend",
            "device",
        ),
        *("data_format", "input_data_format", "return_tensors", "disable_grouping", "default_to_square"),
        *("image_seq_length", "_valid_processor_keys"),
    )
)


def spec_from_processor(config: Mapping[str, Any]) -> ImageSpec:
    """Read the dictionary of preprocessor_config.json, or processor_config.json's with "image_processor".

    Keys left out or null take the default of the processor class that the file names. Raises `VtpError`, by
    name, for a processor class, key or size that is not known here.
    """
    config = config.get("image_processor") or config
    processor = _find_processor(config)
    values = _settings(config, processor)
    size = _size_fields(values["size"]) if values["do_resize"] else {}
    crop = _crop_fields(values["crop_size"]) if values["do_center_crop"] else {}
    copied = (
        "do_convert_rgb",
        "do_pad",
        "do_resize",
        "do_center_crop",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
    )
    return ImageSpec(
        kind=processor.kind,
        resample=int(values["resample"]),
        mean=_three(values["image_mean"]),
        std=_three(values["image_std"]),
        **{name: values[name] for name in copied},
        **size,
        **crop,
    )


def _settings(config: Mapping[str, Any], processor: _Processor) -> dict[str, Any]:
    """The file's settings over the class defaults; settings that are not known are refused."""
    given = {key: value for key, value in config.items() if value is not None}
    values = {**_COMMON, **processor.defaults, **given}
    if unknown := sorted(set(values) - _BYSTANDERS - set(_COMMON) - {"size", "image_mean", "image_std"}):
        raise VtpError(f"the image processor has settings that are not supported: {', '.join(unknown)}")
    if values["do_pad"] and not processor.pads:
        raise VtpError("the image processor sets do_pad, which is supported for LlavaImageProcessor only")
    return values


def _find_processor(config: Mapping[str, Any]) -> _Processor:
    """The row for the class that the file names, whichever of transformers' backends and ages it is from."""
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    stem = name
    for suffix in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        stem = stem.removesuffix(suffix)
    if stem not in _PROCESSORS:
        known = ", ".join(f"{key}ImageProcessor" for key in sorted(_PROCESSORS))
        raise VtpError(f"image processor '{name or 'without a type'}' is not supported; supported: {known}")
    return _PROCESSORS[stem]


def _size_fields(size: Any) -> dict[str, Any]:
    """`size` as spec fields; a bare number is a shortest edge, as in these processors' older files."""
    if _is_int(size):
        return {"shortest_edge": size}
    if isinstance(size, list | tuple) and len(size) == 2:
        return {"height": size[0], "width": size[1]}
    if isinstance(size, Mapping) and set(size) in ({"shortest_edge"}, {"height", "width"}):
        return dict(size)
    raise VtpError(f"image size {size} is not supported; supported: shortest_edge, or height and width")


def _crop_fields(size: Any) -> dict[str, Any]:
    """`crop_size` as spec fields; a bare number is a square."""
    if isinstance(size, int):
        size = {"height": size, "width": size}
    fields = _size_fields(size)
    if "height" not in fields:
        raise VtpError(f"crop size {size} is not supported; supported: height and width")
    return {"crop_height": fields["height"], "crop_width": fields["width"]}


def _three(numbers: Any) -> tuple[float, ...]:
    """A mean or deviation for each channel; one number stands for all three."""
    return (numbers,) * 3 if isinstance(numbers, int | float) else tuple(numbers)
