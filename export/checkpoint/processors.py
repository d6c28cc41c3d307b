"""Reading transformers' processor configurations into an `ImageSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vtp.engines.errors import UsageError, VtpError
from vtp.export.checkpoint import patch_processors
from vtp.runtime.preprocess import anyres, idefics3, internvl, qwen
from vtp.runtime.preprocess.base import CLIP_MEAN, CLIP_STD, ImageSpec, Size, is_int
from vtp.runtime.preprocess.clip import CLIP_FITS, ClipSpec
from vtp.runtime.preprocess.fit import FITS, FittedSpec

_HALF = (0.5, 0.5, 0.5)
Settings = dict[str, Any]


def spec_from_processor(
    config: Mapping[str, Any], image_size: Size | None = None, fit: str | None = None
) -> ImageSpec:
    """Read the dictionary of preprocessor_config.json, or processor_config.json's with "image_processor".

    config      keys left out or null take the default of the processor class that the file names.
    image_size  (height, width) that the bundle is to be made for; None: the processor's only size, or for
                processors that adapt to each picture a moderate square. See docs of the kinds' modules.
    fit         what becomes of pictures of another shape; None: the processor's own way where it takes every
                picture, else letterbox. See `FittedSpec` and `ClipSpec.fitted`.

    Raises `VtpError`, by name, for a processor class, key or size that is not known here, and `UsageError`
    for an image size that the processor does not give.
    """
    owner = str(config.get("processor_class") or "")
    config = config.get("image_processor") or config
    processor = _find_processor(config)
    values = _settings(config, processor)
    values["processor_class"] = config.get("processor_class") or owner
    if fit not in (None, *FITS, *CLIP_FITS):
        known = ", ".join(dict.fromkeys((*FITS, *CLIP_FITS)))
        raise UsageError(f"unknown fit '{fit}'; choose one of {known}")
    spec = processor.read(values, _Asked(image_size, fit or "letterbox"))
    if isinstance(spec, ClipSpec) and image_size not in (None, spec.fixed_size):
        raise UsageError(
            f"image size {_words(image_size)} is not supported: this model's image processor makes "
            f"{_words(spec.fixed_size)} only"
        )
    return spec.fitted(fit) if isinstance(spec, ClipSpec) and fit is not None else spec


def names_without_class(config: Mapping[str, Any]) -> set[str]:
    """The settings of the image processor that a file names, if its class exists with torchvision alone.

    Empty for all others, whose classes tell them.
    """
    row = _PROCESSORS.get(_stem(_name(config)))
    return {*_COMMON, *row.defaults, *row.ignored} if row and row.torchvision else set()


def _words(size: Size) -> str:
    return f"{size[1]}x{size[0]}"


# -- from a processor's settings to a spec, kind by kind ----------------------------------------------------


class _Asked(NamedTuple):
    """What the caller wants of processors that adapt to each picture; see `spec_from_processor`."""

    size: Size | None
    fit: str


def _shared(values: Settings) -> Settings:
    """Fields of every kind."""
    names = ("do_convert_rgb", "do_resize", "do_rescale", "rescale_factor", "do_normalize")
    return {
        "resample": int(values["resample"]),
        "mean": _three(values["image_mean"]),
        "std": _three(values["image_std"]),
        **{name: values[name] for name in names},
    }


def _fitted(kind: type[FittedSpec], values: Settings, asked: _Asked, size: Size, **own: Any) -> FittedSpec:
    """A spec for the image size `size`; what is wrong with one that was asked for is a `UsageError`."""
    if asked.fit not in FITS:
        raise UsageError(
            f"image-fit {asked.fit} is not supported by this model's image processor, which lays out "
            f"pictures by their shape; choose {', '.join(FITS)}"
        )
    image: Settings = {"image_height": size[0], "image_width": size[1], "fit": asked.fit}
    try:
        return kind(**_shared(values), **image, **own)
    except VtpError as error:
        if asked.size is None:
            raise
        raise UsageError(str(error)) from error


def _read_clip(values: Settings, _: _Asked) -> ClipSpec:
    size = _size_fields(values["size"]) if values["do_resize"] else {}
    crop = _crop_fields(values["crop_size"]) if values["do_center_crop"] else {}
    switches = {name: values[name] for name in ("do_pad", "do_center_crop")}
    return ClipSpec(**_shared(values), **switches, **size, **crop)


def _read_gemma3(values: Settings, asked: _Asked) -> ClipSpec:
    if values["do_pan_and_scan"]:
        raise VtpError(
            "the image processor sets do_pan_and_scan, which makes as many crops as a picture suggests; "
            "only do_pan_and_scan false is supported"
        )
    return _read_clip(values, asked)


def _read_qwen(values: Settings, asked: _Asked) -> FittedSpec:
    pixels = dict(values["size"]) if isinstance(values["size"], Mapping) else {}
    least = values["min_pixels"] or pixels.get("shortest_edge") or pixels.get("min_pixels")
    most = values["max_pixels"] or pixels.get("longest_edge") or pixels.get("max_pixels")
    if not (is_int(least) and is_int(most) and 1 <= least <= most):
        raise VtpError(
            f"image size {values['size']} is not supported; supported: shortest_edge and longest_edge, "
            "the fewest and the most pixels"
        )
    sides = {name: values[name] for name in ("patch_size", "temporal_patch_size", "merge_size")}
    for name, side in sides.items():
        if not (is_int(side) and side >= 1):
            raise VtpError(f"the image processor's {name} is {side!r}; it must be a positive whole number")
    factor = sides["patch_size"] * sides["merge_size"]
    size = asked.size or qwen.default_size(least, most, factor)
    return _fitted(qwen.QwenSpec, values, asked, size, min_pixels=least, max_pixels=most, **sides)


def _read_anyres(values: Settings, asked: _Asked) -> FittedSpec:
    tile = _one_tile(values)
    points = values["image_grid_pinpoints"]
    if not (isinstance(points, list | tuple) and points and all(_is_pair(point) for point in points)):
        raise VtpError(
            f"image_grid_pinpoints {points!r:.60} is not supported; supported: [height, width] pairs"
        )
    pinpoints = tuple((point[0], point[1]) for point in points)
    size = asked.size or anyres.default_size(pinpoints, tile)
    return _fitted(anyres.AnyresSpec, values, asked, size, height=tile, width=tile, pinpoints=pinpoints)


def _one_tile(values: Settings) -> int:
    """The edge of anyres' tiles: `size` and `crop_size` agree on it, so that cropping changes nothing."""
    size = _size_fields(values["size"])
    edges = {*size.values(), *(_crop_fields(values["crop_size"]).values() if values["crop_size"] else ())}
    if len(edges) != 1:
        raise VtpError(
            f"size {values['size']} with crop_size {values['crop_size']} is not supported for this image "
            "processor; supported: one square size for both"
        )
    return edges.pop()


def _read_internvl(values: Settings, asked: _Asked) -> ImageSpec:
    tile = _size_fields(values["size"])
    if "height" not in tile:
        raise VtpError(f"image size {values['size']} is not supported; supported: height and width")
    # InternVLProcessor switches cropping on, whatever its image processor's own file says.
    crops = values["crop_to_patches"] or values["processor_class"] == "InternVLProcessor"
    edges, least, most = (tile["height"], tile["width"]), values["min_patches"], values["max_patches"]
    if not (is_int(least) and is_int(most) and 1 <= least <= most):
        raise VtpError(f"min_patches {least!r} and max_patches {most!r} of the image processor do not fit")
    size = asked.size or (internvl.default_size(edges, least, most) if crops else edges)
    if size == edges:  # as with crop_to_patches off: every picture is one stretched tile
        return ClipSpec(**_shared(values), **tile)
    return _fitted(internvl.InternvlSpec, values, asked, size, **tile, min_tiles=least, max_tiles=most)


def _read_idefics3(values: Settings, asked: _Asked) -> FittedSpec:
    longest, tile = (_longest_edge(values[name], name) for name in ("size", "max_image_size"))
    splitting = values["do_image_splitting"]
    image_size = asked.size or idefics3.default_size(longest, tile, splitting)
    own = {
        "height": tile,
        "width": tile,
        # An asked size goes as transformers' size={"longest_edge": ...} does.
        "longest_edge": max(asked.size) if asked.size and splitting else longest,
        "do_image_splitting": splitting,
    }
    return _fitted(idefics3.Idefics3Spec, values, asked, image_size, **own)


def _by_patches(read: Callable[[Settings, Size | None], patch_processors.Read]) -> Any:
    """How a processor of `patch_processors` is read."""

    def spec(values: Settings, asked: _Asked) -> FittedSpec:
        kind, size, own = read(values, asked.size)
        return _fitted(kind, values, asked, size, **own)

    return spec


def _longest_edge(size: Any, name: str) -> int:
    edge = size.get("longest_edge") if isinstance(size, Mapping) and len(size) == 1 else None
    if not (is_int(edge) and edge >= 1):
        raise VtpError(f"{name} {size} is not supported; supported: longest_edge")
    return edge


# -- the processors -----------------------------------------------------------------------------------------


class _Processor(NamedTuple):
    """One transformers image processor: how it is read, its class defaults, for keys a file leaves out.

    `ignored` are keys of its files that change nothing for one picture; `torchvision`: its class exists with
    torchvision alone.
    """

    read: Callable[[Settings, _Asked], ImageSpec]
    defaults: Settings
    pads: bool = False
    ignored: tuple[str, ...] = ()
    torchvision: bool = False


_CLIP = _Processor(
    _read_clip,
    {
        "do_center_crop": True,
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
)
_IDEFICS3 = _Processor(
    _read_idefics3,
    {
        "resample": 1,
        "size": {"longest_edge": 4 * 364},
        "max_image_size": {"longest_edge": 364},
        "do_image_splitting": True,
        "image_mean": _HALF,
        "image_std": _HALF,
    },
    # Its padding is for batches of unlike pictures, its sampling for videos.
    ignored=("do_pad", "return_row_col_info", "video_sampling"),
)
_PROCESSORS: dict[str, _Processor] = {
    "CLIP": _CLIP,
    "Siglip": _Processor(
        _read_clip, {"size": {"height": 224, "width": 224}, "image_mean": _HALF, "image_std": _HALF}
    ),
    # LLaVA's own class differs from CLIP's by one switch: `do_pad` pads to a square first.
    "Llava": _CLIP._replace(pads=True),
    "VideoLlava": _CLIP,
    "Gemma3": _Processor(
        _read_gemma3,
        {
            "resample": 2,
            "size": {"height": 224, "width": 224},
            "image_mean": _HALF,
            "image_std": _HALF,
            "do_pan_and_scan": False,
        },
        ignored=(
            "pan_and_scan_min_crop_size",
            "pan_and_scan_max_num_crops",
            "pan_and_scan_min_ratio_to_activate",
        ),
    ),
    "Qwen2VL": _Processor(
        _read_qwen,
        {
            "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
            "min_pixels": None,
            "max_pixels": None,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
    ),
    "LlavaNext": _Processor(
        _read_anyres,
        {
            "do_center_crop": True,
            "size": {"shortest_edge": 224},
            "crop_size": {"height": 224, "width": 224},
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
        ignored=("do_pad",),  # it pads batches of unlike pictures
    ),
    "LlavaOnevision": _Processor(
        _read_anyres,
        {
            "size": {"height": 384, "width": 384},
            "image_grid_pinpoints": [
                [height, width] for height in range(384, 2305, 384) for width in range(384, 2305, 384)
            ],
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
        ignored=("do_pad",),
    ),
    "GotOcr2": _Processor(
        _read_internvl,
        {
            "size": {"height": 384, "width": 384},
            "crop_to_patches": False,
            "min_patches": 1,
            "max_patches": 12,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
    ),
    "Idefics3": _IDEFICS3,
    "SmolVLM": _IDEFICS3,
    "Lfm2Vl": _Processor(
        _by_patches(patch_processors.read_lfm2_vl),
        patch_processors.LFM2_VL,
        ignored=patch_processors.LFM2_VL_IGNORED,
        torchvision=True,
    ),
    "MiniCPMV4_6": _Processor(
        _by_patches(patch_processors.read_minicpm),
        patch_processors.MINICPM,
        ignored=patch_processors.MINICPM_IGNORED,
    ),
}

# Processors of videos, where they do something else with a frame than the model's image processor.
_FRAMES: dict[str, _Processor] = {
    "LlavaOnevision": _Processor(
        _read_clip,
        {"size": {"height": 384, "width": 384}, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
        # Of the settings for pictures, which older folders hand over, it takes no note.
        ignored=("do_pad", "image_grid_pinpoints"),
    ),
}

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
# Keys that say who wrote the file, how tensors are handed over or which frames are taken (which a bundle says
# itself), and change no pixel.
_BYSTANDERS = frozenset(
    (
        *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map"),
        *("video_processor_type", "do_sample_frames", "num_frames", "fps", "return_metadata"),
        *("backend", "device", "data_format", "input_data_format", "return_tensors"),
        *("disable_grouping", "default_to_square", "image_seq_length", "_valid_processor_keys"),
    )
)


def _settings(config: Mapping[str, Any], processor: _Processor) -> Settings:
    """The file's settings over the class defaults; settings that are not known are refused."""
    given = {
        key: value
        for key, value in config.items()
        if value is not None and key not in _BYSTANDERS and key not in processor.ignored
    }
    values = {**_COMMON, **processor.defaults, **given}
    if unknown := sorted(set(values) - set(_COMMON) - set(processor.defaults)):
        raise VtpError(f"the image processor has settings that are not supported: {', '.join(unknown)}")
    if values["do_pad"] and not processor.pads:
        raise VtpError("the image processor sets do_pad, which is supported for LlavaImageProcessor only")
    return values


def _find_processor(config: Mapping[str, Any]) -> _Processor:
    """The row for the class that the file names, whichever of transformers' backends and ages it is from."""
    name = _name(config)
    stem = _stem(name)
    if name.removesuffix("Fast").endswith("VideoProcessor") and stem in _FRAMES:
        return _FRAMES[stem]
    if stem not in _PROCESSORS:
        known = ", ".join(f"{key}ImageProcessor" for key in sorted(_PROCESSORS))
        raise VtpError(f"image processor '{name or 'without a type'}' is not supported; supported: {known}")
    return _PROCESSORS[stem]


def _name(config: Mapping[str, Any]) -> str:
    """The processor class that a file names; "" for none."""
    names = ("image_processor_type", "video_processor_type", "feature_extractor_type")
    return next((str(config[key]) for key in names if config.get(key)), "")


def _stem(name: str) -> str:
    for suffix in ("Fast", "Pil", "ImageProcessor", "VideoProcessor", "FeatureExtractor"):
        name = name.removesuffix(suffix)
    return name


def _size_fields(size: Any) -> Settings:
    """`size` as spec fields; a bare number is a shortest edge, as in these processors' older files."""
    if is_int(size):
        return {"shortest_edge": size}
    if isinstance(size, list | tuple) and len(size) == 2:
        return {"height": size[0], "width": size[1]}
    if isinstance(size, Mapping) and set(size) in ({"shortest_edge"}, {"height", "width"}):
        return dict(size)
    raise VtpError(f"image size {size} is not supported; supported: shortest_edge, or height and width")


def _crop_fields(size: Any) -> Settings:
    """`crop_size` as spec fields; a bare number is a square."""
    if is_int(size):
        size = {"height": size, "width": size}
    fields = _size_fields(size)
    if "height" not in fields:
        raise VtpError(f"crop size {size} is not supported; supported: height and width")
    return {"crop_height": fields["height"], "crop_width": fields["width"]}


def _is_pair(point: Any) -> bool:
    return isinstance(point, list | tuple) and len(point) == 2 and all(is_int(edge) for edge in point)


def _three(numbers: Any) -> tuple[float, ...]:
    """A mean or deviation for each channel; one number stands for all three."""
    if isinstance(numbers, int | float) and not isinstance(numbers, bool):
        return (float(numbers),) * 3
    return tuple(numbers)
