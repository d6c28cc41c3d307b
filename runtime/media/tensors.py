"""torch tensors as pictures, without importing torch: what libraries of cameras and datasets hand over.

channels first [3 or 4, H, W], torchvision's way, or last [H, W, 3 or 4]; a tensor that could be either is
taken as channels first. [H, W] is grey. uint8 from 0 to 255, or floating point from 0 to 1, which is rounded
to the nearest of 256 levels. On any device.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard

import numpy as np

from vtp.engines.errors import UsageError

__all__ = ["Tensor", "extent_of", "frames_of", "is_tensor", "pixels_of"]

_CHANNELS = (3, 4)


class Tensor(Protocol):
    """What type checkers hold a `torch.Tensor` against, since torch may not be installed."""

    shape: Any
    is_meta: bool
    layout: Any

    def detach(self) -> Any:
        """The same without its history."""

    def is_floating_point(self) -> bool:
        """Whether its numbers are."""


def is_tensor(source: object) -> TypeGuard[Tensor]:
    """Whether it is torch's; a tensor exists only where torch is loaded."""
    return any(kind.__module__ == "torch" and kind.__name__ == "Tensor" for kind in type(source).__mro__)


def pixels_of(tensor: Any) -> np.ndarray:
    """The same picture as a uint8 array, channels last. UsageError for another tensor."""
    extent_of(tensor)
    tensor = tensor.detach().cpu()
    array = np.asarray(_levels(tensor.float().numpy()) if tensor.is_floating_point() else tensor.numpy())
    return array.transpose(1, 2, 0) if _channels_first(array.shape) else array


def frames_of(tensor: Any) -> list[Any]:
    """The frames of a tensor [frames, ...], each a picture; another tensor is one frame."""
    return list(tensor) if tensor.ndim == 4 else [tensor]


def extent_of(tensor: Any) -> tuple[int, int]:
    """(height, width), without reading a pixel; UsageError for a shape or type that no picture has."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if tensor.ndim == 4:
        raise UsageError(
            f"a tensor {list(shape)} is a batch: give one picture, a list of pictures (list(tensor)), or a "
            "video to a bundle made with vtp-export --frames"
        )
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and not {shape[0], shape[2]} & set(_CHANNELS)):
        raise UsageError(
            f"an image tensor must be [3, height, width] or [height, width, 3] in RGB (4 in RGBA), or "
            f"[height, width], not {list(shape)}"
        )
    if dtype != "uint8" and not tensor.is_floating_point():
        raise UsageError(
            f"an image tensor must be uint8 with values 0 to 255, or floating point with values 0 to 1, not "
            f"{dtype}; convert it first"
        )
    if tensor.is_meta or str(tensor.layout) != "torch.strided":
        kind = "on the device meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        raise UsageError(f"an image tensor must hold all of its values, and this one is {kind}; convert it")
    return shape[1:] if _channels_first(shape) else shape[:2]


def _channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] in _CHANNELS


def _levels(array: np.ndarray) -> np.ndarray:
    """Floating point from 0 to 1 as uint8."""
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if not (low >= 0 and high <= 1):  # a NaN is neither
        raise UsageError(
            f"an image tensor of floating point must have values 0 to 1, not {low:g} to {high:g}; undo the "
            "normalisation, or divide by 255"
        )
    return np.rint(array * np.float32(255)).astype(np.uint8)
