"""The kinds of preprocessing by name, and the image section of manifest.json, read and written.

The section is one flat object: `kind`, and the fields of all kinds, those of other kinds at their defaults
(null where a field has none). A new kind is one module, one row in `KINDS` and its new names in `_ORDER`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from vtp.engines.errors import VtpError
from vtp.runtime.preprocess.anyres import AnyresSpec
from vtp.runtime.preprocess.base import ImageSpec
from vtp.runtime.preprocess.clip import ClipSpec
from vtp.runtime.preprocess.gemma4 import Gemma4Spec
from vtp.runtime.preprocess.idefics3 import Idefics3Spec
from vtp.runtime.preprocess.internvl import InternvlSpec
from vtp.runtime.preprocess.naflex import NaflexSpec, NaflexTilesSpec
from vtp.runtime.preprocess.navit import NavitSlicesSpec, NavitSpec
from vtp.runtime.preprocess.pixtral import PixtralSpec
from vtp.runtime.preprocess.qwen import QwenSpec

_SPECS = (
    *(ClipSpec, QwenSpec, AnyresSpec, InternvlSpec, Idefics3Spec, Gemma4Spec, PixtralSpec, NaflexSpec),
    *(NavitSpec, NaflexTilesSpec, NavitSlicesSpec),
)
KINDS: dict[str, type[ImageSpec]] = {spec.kind: spec for spec in _SPECS}

_ORDER = (
    *("do_convert_rgb", "do_pad", "do_resize", "shortest_edge", "height", "width", "resample"),
    *("do_center_crop", "crop_height", "crop_width", "do_rescale", "rescale_factor", "do_normalize"),
    *("mean", "std", "image_height", "image_width", "fit", "min_pixels", "max_pixels", "patch_size"),
    *("temporal_patch_size", "merge_size", "pinpoints", "min_tiles", "max_tiles", "longest_edge"),
    *("do_image_splitting", "frames", "pooling_size", "max_soft_tokens", "max_pixels_tolerance"),
    "use_thumbnail",
)
# Written for the kinds that have them alone, so that others are read by versions that do not know these.
_LATER = ("pooling_size", "max_soft_tokens", "max_pixels_tolerance", "use_thumbnail")


def _section() -> type:
    """The image section as a dataclass of every kind's fields, with the types and defaults that they have."""
    found: dict[str, tuple[Any, Any]] = {}
    for spec in _SPECS:
        hints = typing.get_type_hints(spec)
        for field in dataclasses.fields(spec):
            required = field.default is dataclasses.MISSING
            optional = hints[field.name] | None if required else hints[field.name]
            found.setdefault(field.name, (optional, None if required else field.default))
    keys = [(name, found[name][0], dataclasses.field(default=found[name][1])) for name in _ORDER]
    return dataclasses.make_dataclass("ImageSection", [("kind", str, "clip"), *keys], frozen=True)


# What a reader of manifests checks the types of the section's values against.
ImageSection = _section()


def spec_to_json(spec: ImageSpec) -> dict[str, Any]:
    """The image section as a dictionary of JSON values that `spec_from_json` takes back."""
    values = {name: getattr(spec, name) for name in _names(type(spec))}
    section = vars(ImageSection(kind=spec.kind, **values))
    written = {name: value for name, value in section.items() if name in values or name not in _LATER}
    return {name: _as_list(value) for name, value in written.items()}


def spec_from_json(section: Mapping[str, Any]) -> ImageSpec:
    """The spec that a manifest's image section describes; keys left out stand at their defaults.

    Raises `VtpError` for a kind or key that this version does not know, for a field of another kind, which
    would change nothing, and for what the kind's own checks refuse.
    """
    defaults = vars(ImageSection())
    if unknown := sorted(set(section) - set(defaults)):
        raise VtpError(
            f"the bundle's image section has unknown keys {unknown}; export it again with this version"
        )
    values = {**defaults, **section}
    name = values.pop("kind")
    if name not in KINDS:
        raise VtpError(f"unknown image preprocessing '{name}'; this version knows {', '.join(KINDS)}")
    own = _names(KINDS[name])
    for key, value in values.items():
        if key not in own and _as_list(value) != _as_list(defaults[key]):
            raise VtpError(f"image preprocessing: kind {name} has no {key}")
    if missing := [key for key in own if values[key] is None and own[key]]:
        raise VtpError(f"image preprocessing: kind {name} needs {', '.join(missing)}")
    return KINDS[name](**{key: values[key] for key in own})


def _names(spec: type[ImageSpec]) -> dict[str, bool]:
    """The names of a kind's fields, and whether each must be given."""
    return {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(spec)}


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, tuple | list) else value
