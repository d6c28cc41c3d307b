"""What makes training bearable on two CPU cores: bfloat16 matrix products, memory that is not given back."""

import contextlib
import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

ATTENTION = "scenes_sdpa_float32"


def settle_memory() -> None:
    """Tell glibc to keep freed memory: page faults on fresh buffers cost a third of each step otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never mmap a buffer
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def register_attention() -> str:
    """Register attention that runs in float32 under autocast (its bfloat16 backward is four times slower)."""
    AttentionInterface.register(ATTENTION, attend)
    return ATTENTION


def half_precision() -> torch.autocast:
    """Autocast to bfloat16 on the CPU."""
    return torch.autocast("cpu", torch.bfloat16)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    shared: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in float32. The first `shared` positions are plainly causal; only the rest needs `mask`.

    Without a mask (the tower's) products are in bfloat16 and only the softmax in float32.
    """
    with torch.autocast("cpu", enabled=False):
        if mask is None and not shared and query.dtype == torch.bfloat16:
            return _attend_all(query, key, value, scaling), None
        groups = query.shape[1] // key.shape[1]
        key, value = (
            t.float().repeat_interleave(groups, 1) if groups > 1 else t.float() for t in (key, value)
        )
        query = query.float()
        core = F.scaled_dot_product_attention
        if not shared or mask is None:
            out = core(query, key, value, attn_mask=mask, scale=scaling)
        else:
            seen = slice(None), slice(None), slice(shared)
            head = core(query[seen], key[seen], value[seen], is_causal=True, scale=scaling)
            tail = core(query[:, :, shared:], key, value, attn_mask=mask[:, :, shared:], scale=scaling)
            out = torch.cat((head, tail), 2)
    return out.transpose(1, 2), None


def _attend_all(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Written out: the backward pass takes half as long as that of the fused one."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(-1, -2)
    return (scores.float().softmax(-1).bfloat16() @ value).transpose(1, 2)
