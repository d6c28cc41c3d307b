"""From the settings of one of transformers' image processors to an `ImageSpec`, kind by kind.

Each takes the settings over the class defaults. VtpError tells of settings that are not served, UsageError of
an image size or a fit that was asked for and that the processor does not give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from vtp.engines.errors import UsageError, VtpError
from vtp.runtime.preprocess import anyres, gemma4, idefics3, internvl, naflex, navit, pixtral, qwen
from vtp.runtime.preprocess.base import ImageSpec, Size, is_int
from vtp.runtime.preprocess.clip import ClipSpec
from vtp.runtime.preprocess.fit import FITS, FittedSpec

Settings = dict[str, Any]


class Asked(NamedTuple):
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


def _fitted(kind: type[FittedSpec], values: Settings, asked: Asked, size: Size, **own: Any) -> FittedSpec:
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


def read_clip(values: Settings, _: Asked) -> ClipSpec:
    """One view, stretched, cropped or padded to one size."""
    size = _size_fields(values["size"]) if values["do_resize"] else {}
    crop = _crop_fields(values["crop_size"]) if values["do_center_crop"] else {}
    switches = {name: values[name] for name in ("do_pad", "do_center_crop")}
    return ClipSpec(**_shared(values), **switches, **size, **crop)


def read_gemma3(values: Settings, asked: Asked) -> ClipSpec:
    """As `read_clip`, without crops of a picture."""
    if values["do_pan_and_scan"]:
        raise VtpError(
            "the image processor sets do_pan_and_scan, which makes as many crops as a picture suggests; "
            "only do_pan_and_scan false is supported"
        )
    return read_clip(values, asked)


def read_gemma4(values: Settings, asked: Asked) -> FittedSpec:
    """Patches of one view; an asked size brings the token budget that gives it."""
    sides = {"patch_size": values["patch_size"], "pooling_size": values["pooling_kernel_size"]}
    for name, side in sides.items():
        if not (is_int(side) and 1 <= side <= 256):
            raise VtpError(f"the image processor's {name} is {side!r}; it must be 1 to 256")
    patch, pooling, budget = *sides.values(), values["max_soft_tokens"]
    if budget not in gemma4.BUDGETS:
        raise VtpError(
            f"the image processor's max_soft_tokens is {budget!r}; one of {gemma4.BUDGETS} is needed"
        )
    if asked.size:  # goes with the budget that transformers would have to be given for it
        budget = gemma4.budget_for(asked.size, patch, pooling) or budget
    size = asked.size or gemma4.default_size(patch, pooling, budget)
    return _fitted(gemma4.Gemma4Spec, values, asked, size, max_soft_tokens=budget, **sides)


def read_qwen(values: Settings, asked: Asked) -> FittedSpec:
    """Patches of one view, within the processor's fewest and most pixels."""
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


def read_anyres(values: Settings, asked: Asked) -> FittedSpec:
    """Square tiles in one of the processor's layouts, and the whole picture."""
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


def read_internvl(values: Settings, asked: Asked) -> ImageSpec:
    """Tiles and the whole picture; one stretched view where the size is a single tile."""
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


def read_idefics3(values: Settings, asked: Asked) -> FittedSpec:
    """Tiles and the whole picture, by the longest edge; one view without do_image_splitting."""
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


def read_pixtral(values: Settings, asked: Asked) -> FittedSpec:
    """One view of whole tokens, within the longest edge."""
    token, longest = values["patch_size"], _longest_edge(values["size"], "size")
    if isinstance(token, Mapping) and token.get("height") == token.get("width"):
        token = token.get("height")
    if not (is_int(token) and token >= 1):
        raise VtpError(f"the image processor's patch_size is {token!r}; a positive whole number is needed")
    size = asked.size or pixtral.default_size(longest, token)
    edge = min(longest, max(size))  # as transformers makes pictures when it is asked for this longest edge
    return _fitted(pixtral.PixtralSpec, values, asked, size, patch_size=token, longest_edge=edge)


def read_lfm2_vl(values: Settings, asked: Asked) -> FittedSpec:
    """Patches of one view within the fewest and most tokens; of tiles, if the processor cuts such a size."""
    names = ("encoder_patch_size", "downsample_factor", "min_image_tokens", "max_image_tokens")
    patch, merge, *tokens = _positive(values, *names)
    least, most = (count * (patch * merge) ** 2 for count in tokens)
    if least > most:
        raise VtpError(f"min_image_tokens {tokens[0]} of the image processor exceeds max_image_tokens")
    size = asked.size or naflex.default_size(least, most, patch * merge)
    own = {"min_pixels": least, "max_pixels": most, "patch_size": patch, "merge_size": merge}
    if tiles := _lfm2_tiles(values):
        cut_above = most * tiles["max_pixels_tolerance"]
        if asked.size and naflex.is_cut(size, patch * merge, cut_above, patch):
            return _fitted(naflex.NaflexTilesSpec, values, asked, size, **own, **tiles)
        if math.prod(size) > most:
            high, wide = naflex.own_size(size, patch * merge, least, most)
            raise UsageError(
                f"image size {size[1]}x{size[0]} has {math.prod(size)} pixels; this processor shows at most "
                f"{most} in one piece, and cuts more than {cut_above:.0f} into tiles: give {wide}x{high}, as "
                "which it shows a picture of that size"
            )
    return _fitted(naflex.NaflexSpec, values, asked, size, **own)


def _lfm2_tiles(values: Settings) -> Settings:
    """What a spec needs to know of tiles besides; empty where the processor cuts none."""
    if not values["do_image_splitting"]:
        return {}
    tile, least, most = _positive(values, "tile_size", "min_tiles", "max_tiles")
    tolerance = values["max_pixels_tolerance"]
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
        raise VtpError(f"the image processor's max_pixels_tolerance is {tolerance!r}; it must be a number")
    edges = {"height": tile, "width": tile, "min_tiles": least, "max_tiles": most}
    others = {"max_pixels_tolerance": float(tolerance), "use_thumbnail": bool(values["use_thumbnail"])}
    return {**edges, **others} if most > 1 else {}


def read_minicpm(values: Settings, asked: Asked) -> FittedSpec:
    """MiniCPM-V 4.6's patches: of one view, or of the whole and slices if the processor cuts such a size."""
    patch, edge = _positive(values, "patch_size", "scale_resolution")
    for name, served in (("downsample_mode", "16x"), ("use_image_id", True)):
        if values[name] != served:
            raise VtpError(f"the image processor's {name} is {values[name]!r}; supported: {served!r}")
    factor = patch * navit.MERGE
    size = asked.size or navit.own_size((edge, edge), edge, factor)
    own = {"max_pixels": edge**2, "patch_size": patch, "merge_size": navit.MERGE}
    if values["slice_mode"] and size != navit.own_size(size, edge, factor):
        (most,) = _positive(values, "max_slice_nums")
        if navit.slice_grid(size, edge**2, most):
            return _fitted(navit.NavitSlicesSpec, values, asked, size, **own, max_tiles=most)
    return _fitted(navit.NavitSpec, values, asked, size, **own)


def _positive(values: Settings, *names: str) -> list[int]:
    """Settings that must be positive whole numbers."""
    for name in names:
        if not (is_int(values[name]) and values[name] >= 1):
            raise VtpError(f"the image processor's {name} is {values[name]!r}; it must be a positive number")
    return [values[name] for name in names]


def _longest_edge(size: Any, name: str) -> int:
    edge = size.get("longest_edge") if isinstance(size, Mapping) and len(size) == 1 else None
    if not (is_int(edge) and edge >= 1):
        raise VtpError(f"{name} {size} is not supported; supported: longest_edge")
    return edge


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
