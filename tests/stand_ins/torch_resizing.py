"""What transformers' LFM2-VL image processor takes of torchvision, in torch: resizing and normalising.

Its class exists with torchvision alone. Everything else of it runs as it is: sizes, tiles, patches, padding.
Held once against torchvision 0.28.0's own functions (AVX-512), with equal bits.
"""

from __future__ import annotations

import sys
from enum import Enum
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import image_processing_backends

_MODULE = "transformers.models.lfm2_vl.image_processing_lfm2_vl"


class InterpolationMode(Enum):
    """torchvision's, as far as it is named here."""

    BILINEAR = "bilinear"
    LANCZOS = "lanczos"


def resize(image: Tensor, size: Any, interpolation: InterpolationMode, antialias: bool) -> Tensor:
    """uint8 [.,3,H,W] -> uint8 [.,3,h,w]; left alone where it fits."""
    assert image.dtype == torch.uint8 and interpolation is InterpolationMode.BILINEAR and antialias
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return functional.interpolate(image, tuple(size), mode="bilinear", antialias=True)


def normalize(image: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:
    """float32 [.,3,H,W] less the mean, divided by the deviation."""
    del inplace
    mean, std = (torch.as_tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))
    return (image - mean) / std


def lfm2_image_processor(**settings: Any) -> Any:
    """transformers' Lfm2VlImageProcessor on the functions of this file."""
    functions: Any = ModuleType("torchvision.transforms.v2.functional")
    functions.resize, functions.normalize = resize, normalize
    functions.InterpolationMode = InterpolationMode
    if _MODULE not in sys.modules:
        package: Any = ModuleType("torchvision.transforms.v2")
        package.functional = functions
        stubs = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
        stubs |= {package.__name__: package}
        sys.modules.update(stubs)
        try:
            import_module(_MODULE)
        finally:
            for name in stubs:
                del sys.modules[name]
    image_processing_backends.tvF = functions
    image_processing_backends.pil_torch_interpolation_mapping = {2: InterpolationMode.BILINEAR}
    return sys.modules[_MODULE].Lfm2VlImageProcessor(**settings)
