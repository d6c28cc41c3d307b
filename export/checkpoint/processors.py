"""Reading transformers' processor configurations into an `ImageSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vtp.engines.errors import UsageError, VtpError
from vtp.export.checkpoint import processor_readers as readers
from vtp.export.checkpoint.processor_readers import Asked, Settings
from vtp.runtime.preprocess.base import CLIP_MEAN, CLIP_STD, ImageSpec, Size
from vtp.runtime.preprocess.clip import CLIP_FITS, ClipSpec
from vtp.runtime.preprocess.fit import FITS

_HALF = (0.5, 0.5, 0.5)


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
    spec = processor.read(values, Asked(image_size, fit or "letterbox"))
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


def unasked_tiles(config: Mapping[str, Any], spec: ImageSpec) -> list[str]:
    """A line for anyone who exports without a size, if the processor cuts pictures that `spec` does not."""
    config = config.get("image_processor") or config
    processor = _find_processor(config)
    given = {key: value for key, value in config.items() if value is not None}
    if not ({**processor.defaults, **given}.get(processor.cuts) and spec.image_size and spec.views == 1):
        return []
    return [
        f"pictures are shown in one piece of {_words(spec.image_size)}; the model's own processor cuts "
        "larger ones into tiles: --image-size WIDTHxHEIGHT shows pictures of that size as it does"
    ]


def _words(size: Size) -> str:
    return f"{size[1]}x{size[0]}"


class _Processor(NamedTuple):
    """One transformers image processor: how it is read, its class defaults, for keys a file leaves out.

    `ignored` are keys of its files that change nothing for one picture; `torchvision`: its class exists with
    torchvision alone; `cuts`: the setting with which it cuts large pictures, which a bundle shows in one
    piece if no size is asked.
    """

    read: Callable[[Settings, Asked], ImageSpec]
    defaults: Settings
    pads: bool = False
    ignored: tuple[str, ...] = ()
    torchvision: bool = False
    cuts: str = ""


_CLIP = _Processor(
    readers.read_clip,
    {
        "do_center_crop": True,
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
)
_IDEFICS3 = _Processor(
    readers.read_idefics3,
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
        readers.read_clip, {"size": {"height": 224, "width": 224}, "image_mean": _HALF, "image_std": _HALF}
    ),
    # LLaVA's own class differs from CLIP's by one switch: `do_pad` pads to a square first.
    "Llava": _CLIP._replace(pads=True),
    "VideoLlava": _CLIP,
    # Of the settings for pictures, which older folders hand over, it takes no note.
    "LlavaNextVideo": _CLIP._replace(ignored=("do_pad", "image_grid_pinpoints", "aspect_ratio_setting")),
    "Gemma3": _Processor(
        readers.read_gemma3,
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
    "Gemma4": _Processor(
        readers.read_gemma4,
        {
            "do_normalize": False,
            "image_mean": (0.0, 0.0, 0.0),
            "image_std": (1.0, 1.0, 1.0),
            "patch_size": 16,
            "max_soft_tokens": 280,
            "pooling_kernel_size": 3,
        },
        ignored=("size",),  # the budget says it
    ),
    "Qwen2VL": _Processor(
        readers.read_qwen,
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
        readers.read_anyres,
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
        readers.read_anyres,
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
    "Pixtral": _Processor(
        readers.read_pixtral,
        {
            "patch_size": 16,
            "size": {"longest_edge": 1024},
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
        ignored=("do_pad",),  # it pads batches of unlike pictures
    ),
    "GotOcr2": _Processor(
        readers.read_internvl,
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
        readers.read_lfm2_vl,
        {
            "resample": 2,
            "image_mean": _HALF,
            "image_std": _HALF,
            "encoder_patch_size": 16,
            "downsample_factor": 2,
            "min_image_tokens": 64,
            "max_image_tokens": 256,
            "do_image_splitting": True,
            "min_tiles": 2,
            "max_tiles": 10,
            "tile_size": 512,
            "use_thumbnail": True,
            "max_pixels_tolerance": 2.0,
        },
        # Its padding brings views to one number of patches.
        ignored=("max_num_patches", "size", "do_pad", "return_row_col_info"),
        torchvision=True,
        cuts="do_image_splitting",
    ),
    "MiniCPMV4_6": _Processor(
        readers.read_minicpm,
        {
            "image_mean": _HALF,
            "image_std": _HALF,
            "patch_size": 14,
            "scale_resolution": 448,
            "downsample_mode": "16x",
            "use_image_id": True,
            "max_slice_nums": 9,
            "slice_mode": True,
        },
        cuts="slice_mode",
    ),
}

# Processors of videos, where they do something else with a frame than the model's image processor.
_FRAMES: dict[str, _Processor] = {
    "LlavaOnevision": _Processor(
        readers.read_clip,
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
