"""What callers give instead of pictures: pixel_values, or what an encoder elsewhere made of the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtp.engines.errors import UsageError, quoted_argument
from vtp.runtime.bundle.manifest import Manifest, TensorInfo
from vtp.runtime.media.pictures import Pictures
from vtp.runtime.result import Timings
from vtp.runtime.stages.boundary import EMBEDS, FEATURES, Boundary, find_boundary


@dataclass(frozen=True)
class Encoded:
    """What a caller gave as image_features or image_embeds: an array, or a dict of arrays by names."""

    name: str
    given: Any


class ReadyPictures(Pictures):
    """Pictures that are not decoded. An entry is pixel_values of one, or a dict of one picture's tensors."""

    def __init__(self, ready: Sequence[Any]) -> None:
        self._ready = list(ready)
        self.pixels = []

    def __len__(self) -> int:
        return len(self._ready)

    def check(self, timings: Timings) -> None:
        """Nothing shows before they run."""

    def load(self, timings: Timings) -> None:
        """Have `pixels` hold the entries."""
        self.pixels = self._ready


def instead_of(image: Any, features: Any, embeds: Any) -> Any:
    """The picture, or what was given in its place; UsageError for more than one of them."""
    given = {"image": image, FEATURES: features, EMBEDS: embeds}
    found = [name for name, value in given.items() if value is not None]
    if len(found) > 1:
        raise UsageError(f"{found[0]} and {found[1]} are given; give one of image, {FEATURES} and {EMBEDS}")
    return Encoded(found[0], given[found[0]]) if found and found != ["image"] else image


def encoded_pictures(encoded: Encoded, manifest: Manifest, keep: int) -> ReadyPictures:
    """Check what was given against the bundle, for a keep-count; UsageError in one line."""
    boundary = find_boundary(manifest, keep, encoded.name)
    named = _named(encoded.given, boundary, manifest)
    arrays = {name: _checked(name, value, boundary.known[name]) for name, value in named.items()}
    pictures = len(arrays[encoded.name])
    for name, array in arrays.items():
        if len(array) != pictures:
            raise UsageError(
                f"{encoded.name} is of {pictures} pictures and {name} of {len(array)}; give both of all"
            )
    _check_indices(arrays.get("keep_indices"), manifest.visual.count)
    return ReadyPictures(
        [{name: array[place : place + 1] for name, array in arrays.items()} for place in range(pictures)]
    )


def _named(given: Any, boundary: Boundary, manifest: Manifest) -> dict[str, Any]:
    """The tensors by their names; an array alone is refused where more is needed."""
    name, needs = boundary.name, boundary.needs
    named = dict(given) if isinstance(given, Mapping) else {name: given}
    if odd := [one for one in named if one not in boundary.known]:
        raise UsageError(
            f"{name} names {quoted_argument(odd[0])}; this bundle knows {', '.join(boundary.known)} there"
        )
    if missing := [one for one in {name: None, **needs} if one not in named]:
        shapes = ", ".join(f"'{one}': {_shape(boundary.known[one])}" for one in {name: None, **needs})
        if name in missing:
            raise UsageError(f"{name} is a dict without '{name}'; give {name}={{{shapes}}}")
        raise UsageError(
            f"{name} alone is not enough: method {manifest.method.name} (positions "
            f"{manifest.method.positions}) also needs {', '.join(missing)}; give {name}={{{shapes}}}, or the "
            "picture itself"
        )
    return named


def _checked(name: str, value: Any, info: TensorInfo) -> np.ndarray:
    """An array of [pictures, ...] in the graph's dtype; a single picture's may lack the first axis."""
    array = as_array(name, value)
    wanted = info.shape[1:]
    if list(array.shape) == wanted:
        array = array[None]
    if list(array.shape[1:]) != wanted or not len(array):
        raise UsageError(f"{name} has the shape {list(array.shape)}; this bundle takes {_shape(info)}")
    kinds = (np.integer,) if np.issubdtype(info.dtype, np.integer) else (np.float16, np.float32)
    if not any(np.issubdtype(array.dtype, kind) for kind in kinds):
        raise UsageError(f"{name} is {array.dtype}; give {info.dtype}")
    with np.errstate(over="ignore"):
        array = np.array(array, info.dtype, order="C")  # the caller's may change before a stream is read
    if not np.isfinite(array).all():
        raise UsageError(f"{name} holds values that are not finite in {info.dtype}; what made it overflowed")
    return array


def as_array(name: str, value: Any) -> np.ndarray:
    """numpy's array of an array or a torch tensor, wherever it lies; bfloat16 as float32."""
    try:
        tensor = value.detach().cpu() if hasattr(value, "detach") else value
        if str(getattr(tensor, "dtype", "")) == "torch.bfloat16":
            tensor = tensor.float()
        array = np.asarray(tensor)
    except (ValueError, TypeError, NotImplementedError):  # rows of unequal lengths; no data
        array = np.array(None)
    if array.dtype.kind not in "iufb":
        raise UsageError(f"{name} must be an array of numbers, not {quoted_argument(value)}")
    return array


def _check_indices(indices: np.ndarray | None, count: int) -> None:
    """A merged token has the index -1."""
    if indices is None:
        return
    least, most = indices.min(), indices.max()
    if least < -1 or most >= count:
        raise UsageError(f"keep_indices reach from {least} to {most}; the visual tokens are 0 to {count - 1}")


def _shape(info: TensorInfo) -> str:
    return f"{info.dtype}[pictures, {', '.join(map(str, info.shape[1:]))}]"
