"""Settings of image processors that resize a picture to whole visual tokens and hand over its patches."""

from __future__ import annotations

from typing import Any

from vtp.engines.errors import VtpError
from vtp.runtime.preprocess import naflex, navit
from vtp.runtime.preprocess.base import Size, is_int
from vtp.runtime.preprocess.fit import FittedSpec

_HALF = (0.5, 0.5, 0.5)
# A kind, the image size, and the kind's own fields.
Read = tuple[type[FittedSpec], Size, dict[str, Any]]

LFM2_VL: dict[str, Any] = {
    "resample": 2,
    "image_mean": _HALF,
    "image_std": _HALF,
    "encoder_patch_size": 16,
    "downsample_factor": 2,
    "min_image_tokens": 64,
    "max_image_tokens": 256,
}
# Tiles, which bundles do not have, and the padding of several pictures to one number of patches.
LFM2_VL_IGNORED = (
    *("do_image_splitting", "min_tiles", "max_tiles", "tile_size", "use_thumbnail", "max_pixels_tolerance"),
    *("max_num_patches", "size", "do_pad", "return_row_col_info"),
)
MINICPM: dict[str, Any] = {
    "image_mean": _HALF,
    "image_std": _HALF,
    "patch_size": 14,
    "scale_resolution": 448,
    "downsample_mode": "16x",
    "use_image_id": True,
}
MINICPM_IGNORED = ("max_slice_nums", "slice_mode")  # bundles show a picture in one piece


def read_lfm2_vl(values: dict[str, Any], asked: Size | None) -> Read:
    """LFM2-VL's; VtpError for a setting that is no positive number."""
    _check_positive(values, "encoder_patch_size", "downsample_factor", "min_image_tokens", "max_image_tokens")
    patch, merge = values["encoder_patch_size"], values["downsample_factor"]
    fewest, most = values["min_image_tokens"], values["max_image_tokens"]
    if fewest > most:
        raise VtpError(f"min_image_tokens {fewest} of the image processor exceeds max_image_tokens")
    least, largest = (count * (patch * merge) ** 2 for count in (fewest, most))
    own = {"min_pixels": least, "max_pixels": largest, "patch_size": patch, "merge_size": merge}
    return naflex.NaflexSpec, asked or naflex.default_size(least, largest, patch * merge), own


def read_minicpm(values: dict[str, Any], asked: Size | None) -> Read:
    """MiniCPM-V 4.6's; VtpError for a way to count or merge patches that is not served."""
    _check_positive(values, "patch_size", "scale_resolution")
    for name, served in (("downsample_mode", "16x"), ("use_image_id", True)):
        if values[name] != served:
            raise VtpError(f"the image processor's {name} is {values[name]!r}; supported: {served!r}")
    patch, edge = values["patch_size"], values["scale_resolution"]
    own = {"max_pixels": edge**2, "patch_size": patch, "merge_size": navit.MERGE}
    return navit.NavitSpec, asked or navit.own_size((edge, edge), edge, patch * navit.MERGE), own


def _check_positive(values: dict[str, Any], *names: str) -> None:
    for name in names:
        if not (is_int(values[name]) and values[name] >= 1):
            raise VtpError(f"the image processor's {name} is {values[name]!r}; it must be a positive number")
