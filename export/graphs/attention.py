"""Attention as the graphs need it: GroupQueryAttention on a bound cache, and the one row that methods read.

Transformers' own attention modules stay as they are. While a graph is traced they call the functions
registered here instead of eager or SDPA attention, so one emitter serves every decoder of the library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtp.engines.errors import VtpError

DECODER_ATTENTION = "vtp_decoder"
TOWER_ATTENTION = "vtp_tower"
# Keyword arguments of attention functions that change nothing in a causal decoder graph.
_HARMLESS = {"dropout", "position_ids", "use_cache", "is_causal", "sliding_window", "cache_position"}


@dataclass
class Lengths:
    """Where the rows of a batch end, in GroupQueryAttention's terms.

    seqlens_k int32 [B]: valid tokens in the cache after this run, minus one.
    total_sequence_length int32 []: the longest row after this run.
    """

    seqlens_k: Tensor
    total_sequence_length: Tensor

    def last_index(self, sequence: int) -> Tensor:
        """Index int64 [B] of every row's last real token among the `sequence` tokens of this run."""
        past = self.total_sequence_length.to(torch.int64) - sequence
        return (self.seqlens_k.to(torch.int64) - past).clamp(0, sequence - 1)


@dataclass
class Watch:
    """A decoder layer whose attention a method reads, and what was read once that layer ran.

    layer      absolute number
    text_rows  int64 [B,R], places of the text tokens in this run, where their rows are wanted too
    last       float32 [B,S], the last real token's row, mean over heads
    text       float32 [B,H,R,S], the text tokens' rows
    """

    layer: int
    text_rows: Tensor | None = None
    last: Tensor | None = None
    text: Tensor | None = None

    def read(self, query: Tensor, key: Tensor, scale: float, lengths: Lengths) -> None:
        """Take the rows from query [B,H,S,d] and key [B,G,S,d], both rotated."""
        self.last = last_row(query, key, scale, lengths).mean(dim=1)
        if self.text_rows is not None:
            self.text = attention_rows(query, key, scale, self.text_rows)


@dataclass
class Peek:
    """Only what a layer would attend to: its attention leaves the last row here and gives zeros."""

    watch: Watch
    lengths: Lengths


@dataclass
class Cache:
    """Duck-typed transformers cache: hands new keys and values through, holds the past and present."""

    past: dict[int, tuple[Tensor, Tensor]]
    lengths: Lengths
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    watch: Watch | None = None

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value


@dataclass
class TowerProbe:
    """Which tower attention module to watch; the scores [B,N] and the keys [B,N,C] it gave."""

    module: nn.Module | None
    has_cls: bool
    scores: Tensor | None = None
    keys: Tensor | None = None


# How a target attends: query [B,H,S,d], key and value [B,G,S,d] (rotated), the layer's past key and value
# [B,G,capacity,d], lengths, scale -> output [B,S,H,d], present key and value.
Attend = Callable[
    [Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Lengths, float], tuple[Tensor, tuple[Tensor, Tensor]]
]

# The same in a tower: query, key and value [B,H,S,d], mask or None, scale -> output [B,H,S,d].
TowerAttend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


# Rotary embedding: x [B,H,S,d], cos and sin [B,S,r/2] -> x with its first r features turned.
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]

# RMS norm over the last axis: hidden [...,D], weight [D], epsilon -> hidden.
Norm = Callable[[Tensor, Tensor, float], Tensor]


def rotary_operator(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """ONNX's RotaryEmbedding; see `Rotate`."""
    return torch.onnx.ops.rotary_embedding(x, cos, sin)


def norm_operator(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """ONNX's RMSNormalization; see `Norm`."""
    return functional.rms_norm(hidden, weight.shape, weight, epsilon)


@dataclass(frozen=True)
class Attending:
    """What a target writes for attention in decoders and in towers, rotary embeddings and RMS norms."""

    decoder: Attend
    tower: TowerAttend
    rotary: Rotate = rotary_operator
    norm: Norm = norm_operator


_active: list[Any] = []
_attending: list[Attending] = []


@contextmanager
def active(context: Cache | Peek | TowerProbe) -> Iterator[None]:
    """Make `context` the one that the registered attention functions read and write."""
    _active.append(context)
    try:
        yield
    finally:
        _active.pop()


def _decoder_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Emit attention on the cache. query [B,H,S,d], key and value [B,G,S,d] (rotated) -> [B,S,H,d]."""
    refused = sorted(name for name, given in kwargs.items() if name not in _HARMLESS and given is not None)
    if refused:
        raise VtpError(f"this decoder's attention uses '{refused[0]}', which the exporter does not serve")
    cache: Cache | Peek = _active[-1]
    layer = module.layer_idx
    scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
    if cache.watch is not None and layer == cache.watch.layer:
        cache.watch.read(query, key, scale, cache.lengths)
    if isinstance(cache, Peek):
        return torch.zeros_like(query).transpose(1, 2), None
    output, cache.present[layer] = _attending[-1].decoder(
        query, key, value, cache.past[layer], cache.lengths, scale
    )
    return output, None


def grouped_query_attention(
    query: Tensor, key: Tensor, value: Tensor, past: tuple[Tensor, Tensor], lengths: Lengths, scale: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Emit ONNX Runtime's GroupQueryAttention; see `Attend`."""
    batch, heads, sequence, width = query.shape
    groups = key.shape[1]
    output, *present = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (
            _merge_heads(query),
            _merge_heads(key),
            _merge_heads(value),
            *past,
            lengths.seqlens_k,
            lengths.total_sequence_length,
        ),
        attrs={"num_heads": heads, "kv_num_heads": groups, "scale": scale},
        dtypes=(query.dtype, key.dtype, value.dtype),
        shapes=((batch, sequence, heads * width), past[0].shape, past[1].shape),
        version=1,
    )
    return output.reshape(batch, sequence, heads, width), (present[0], present[1])


def _merge_heads(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).flatten(2)


def last_row(query: Tensor, key: Tensor, scale: float, lengths: Lengths) -> Tensor:
    """The last real token's attention row over this run's tokens, float32 [B,H,S].

    Only this one row is computed; the fused attention beside it never materialises S x S. It is the whole
    row when the cache was empty (prefill), which is when pruners read it.
    """
    last = lengths.last_index(query.shape[2]).unsqueeze(1)
    return attention_rows(query, key, scale, last)[:, :, 0]


def attention_rows(query: Tensor, key: Tensor, scale: float, rows: Tensor) -> Tensor:
    """The attention rows float32 [B,H,R,S] of the tokens at `rows` int64 [B,R] among this run's S.

    query [B,H,S,d] and key [B,G,S,d], rotated. A token sees itself and those before it.
    """
    batch, heads, sequence, width = query.shape
    groups, count = key.shape[1], rows.shape[1]
    places = rows.clamp(0, sequence - 1)
    asked = torch.gather(query, 2, places.view(batch, 1, count, 1).expand(batch, heads, count, width))
    asked = asked.reshape(batch, groups, heads // groups * count, width)
    logits = torch.matmul(asked, key.transpose(2, 3)).float() * scale
    logits = logits.reshape(batch, heads, count, sequence)
    later = torch.arange(sequence) > places.unsqueeze(2)
    logits = logits.masked_fill(later.unsqueeze(1), torch.finfo(torch.float32).min)
    return torch.softmax(logits, dim=-1)


def _tower_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Fused attention for a vision tower; the watched module also leaves its scores with the probe."""
    probe: TowerProbe = _active[-1]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if module is probe.module:
        probe.scores = (
            _cls_row(query, key, scale) if probe.has_cls else _attention_received(query, key, scale)
        )
        keys = _merge_heads(key)
        probe.keys = keys[:, 1:] if probe.has_cls else keys
    return _attending[-1].tower(query, key, value, attention_mask, scale).transpose(1, 2), None


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """ONNX's Attention operator; see `TowerAttend`."""
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


# ONNX Runtime's.
GROUPED_QUERY = Attending(grouped_query_attention, fused_attention)


def _cls_row(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """CLS' attention to the patches, mean over heads: one row per head, float32 [B,N]."""
    logits = torch.matmul(query[:, :, :1], key.transpose(2, 3)).float() * scale
    return torch.softmax(logits, dim=-1)[:, :, 0, 1:].mean(dim=1)


def _attention_received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention that every patch receives, mean over heads and rows, float32 [B,N] (towers without CLS)."""
    logits = torch.matmul(query, key.transpose(2, 3)).float() * scale
    return torch.softmax(logits, dim=-1).mean(dim=(1, 2))


def register() -> None:
    """Make the two attention functions known to transformers under their names."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(DECODER_ATTENTION, _decoder_attention)
    AttentionInterface.register(TOWER_ATTENTION, _tower_attention)
    AttentionMaskInterface.register(DECODER_ATTENTION, lambda *args, **kwargs: None)
    AttentionMaskInterface.register(TOWER_ATTENTION, lambda *args, **kwargs: None)


def _rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` as the target writes it; cos and sin [B,S,d] hold two equal halves."""
    half = cos.shape[-1] // 2
    cos, sin, turn = cos[..., :half], sin[..., :half], _attending[-1].rotary
    return turn(query, cos, sin), turn(key, cos, sin)


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    return _attending[-1].norm(hidden, module.weight, module.variance_epsilon)


@contextmanager
def emitting(
    decoder: nn.Module, tower: nn.Module | None = None, attending: Attending = GROUPED_QUERY
) -> Iterator[None]:
    """Switch a transformers decoder (and tower) to the functions above while graphs are traced.

    Attention goes through the registered functions; it, rotary embeddings and RMS norms are written as
    `attending` says. Everything is put back on leaving, so that the same model can serve as its own
    reference.
    """
    register()
    with ExitStack() as stack:
        _attending.append(attending)
        stack.callback(_attending.pop)
        for part, name in ((decoder, DECODER_ATTENTION), (tower, TOWER_ATTENTION)):
            if part is not None:
                stack.enter_context(_attention_implementation(part, name))
        for module in decoder.modules():
            if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
                stack.enter_context(mock.patch.object(module, "forward", MethodType(_rms_norm, module)))
        stack.enter_context(mock.patch.object(_modeling(decoder), "apply_rotary_pos_emb", _rotate))
        yield


def _modeling(decoder: nn.Module) -> Any:
    """The transformers module that defines the decoder's classes."""
    return sys.modules[type(decoder).__module__]


@contextmanager
def _attention_implementation(part: Any, name: str) -> Iterator[None]:
    config = part.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
