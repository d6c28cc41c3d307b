"""Decoder pieces in operators of opset 18 to 20: for TensorRT 10.3, which has none for what they do.

TensorRT 10.3 is what JetPack 6.2 brings. It knows neither Attention, RMSNormalization, RotaryEmbedding nor
TensorScatter, so each is written out.

The cache is written with ScatterElements: the engine copies the whole cache once a run, which TensorScatter
does not. Where over the whole cache would copy as much and read the new rows besides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtp.export.graphs.attention.fixed_cache import decomposed, look_at, on_fixed_cache
from vtp.export.graphs.attention.operators import Attending, fused_attention


def write_rows(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """ScatterElements along the places of the cache; see `fixed_cache.Write`."""
    places = start.view(-1, 1, 1, 1) + torch.arange(new.shape[2]).view(1, 1, -1, 1)
    return torch.scatter(cache, 2, places.expand(new.shape), new)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in products and a concatenation; see `attention.Rotate`."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    one, two = x[..., :half], x[..., half : 2 * half]
    turned = [one * cos - two * sin, two * cos + one * sin]
    return torch.cat([*turned, x[..., 2 * half :]] if x.shape[-1] > 2 * half else turned, dim=-1)


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm, mean and root in float32; see `attention.Norm`."""
    wide = hidden.float()
    wide = wide * torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + epsilon)
    return weight * wide.to(hidden.dtype)


DECOMPOSED = Attending(
    on_fixed_cache(write_rows, decomposed), decomposed, rotate, rms_norm, look_at(decomposed)
)

# For an ONNX Runtime whose GroupQueryAttention takes no mask (see `masked_query`): only the decoder's
# attention and cache are written out, in operators that its CPU and CUDA providers both have.
MASKED = Attending(on_fixed_cache(write_rows, decomposed), fused_attention, look=look_at(decomposed))
