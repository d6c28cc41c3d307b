"""Attention as the graphs need it: GroupQueryAttention on a bound cache, and the one row that methods read.

Transformers' own attention modules stay as they are. While a graph is traced they call the functions
registered here instead of eager or SDPA attention, so one emitter serves every decoder of the library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtp.engines.errors import VtpError
from vtp.export.graphs.attention.lengths import Lengths as Lengths
from vtp.export.graphs.attention.lengths import Rule as Rule
from vtp.export.graphs.attention.lengths import softcapped as softcapped
from vtp.export.graphs.attention.states import StateCache, causal_convolution
from vtp.export.graphs.attention.views import apart, in_order, together
from vtp.export.graphs.restore import biased
from vtp.export.patched import patched
from vtp.export.tower_cues import KEYS, reads_cls

DECODER_ATTENTION = "vtp_decoder"
TOWER_ATTENTION = "vtp_tower"
# Keyword arguments of attention functions that change nothing in a causal decoder graph.
_HARMLESS = {"dropout", "position_ids", "use_cache", "is_causal", "cache_position"}
_CENTRED = ("Gemma", "Qwen3_5")  # whose RMS norms lie around 0
_MOST_SCORES = 1 << 25  # scores of a tower's heads that are laid out at once, where all of them are read


@dataclass
class LayerProbe:
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

    def read(self, query: Tensor, key: Tensor, rule: Rule, lengths: Lengths) -> None:
        """Take the rows from query [B,H,S,d] and key [B,G,S,d], both rotated."""
        self.last = last_row(query, key, rule, lengths).mean(dim=1)
        if self.text_rows is not None:
            self.text = attention_rows(query, key, rule, lengths, self.text_rows)


@dataclass
class LastRowProbe:
    """Only what a layer would attend to: its attention leaves the last row here and gives zeros."""

    probe: LayerProbe
    lengths: Lengths


@dataclass
class Cache(StateCache):
    """Duck-typed transformers cache: hands new keys and values through, holds the past and present.

    owners           the layers whose keys and values layers without any of their own read: reader -> owner
    states, carried  what layers had before this run, and have after it: (kind, layer) -> [B,...]
    """

    past: dict[int, tuple[Tensor, Tensor]]
    lengths: Lengths
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    probe: LayerProbe | None = None
    owners: Mapping[int, int] = field(default_factory=dict)
    states: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    carried: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value


@dataclass
class TowerProbe:
    """Which cues to read in which attention modules of a tower, and what they gave."""

    has_cls: bool
    wanted: Mapping[nn.Module, Sequence[str]] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    views: Sequence[int] = ()  # rows of each view, where unlike ones follow one another in one batch


# How a target attends: query [B,H,S,d], key and value [B,G,S,d] (rotated), the layer's past key and value
# [B,G,capacity,d], lengths, rule -> output [B,S,H,d], present key and value.
Attend = Callable[
    [Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Lengths, Rule], tuple[Tensor, tuple[Tensor, Tensor]]
]

# The same for a layer that reads another's: query [B,H,S,d], that layer's present key and value, lengths,
# rule -> output [B,S,H,d].
Look = Callable[[Tensor, tuple[Tensor, Tensor], Lengths, Rule], Tensor]

# In a tower: query, key and value [B,H,S,d], mask or None, scale -> output [B,H,S,d].
TowerAttend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


# Rotary embedding: x [B,H,S,d], cos and sin [B,S,r/2] -> x with its first r features turned.
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]

# RMS norm over the last axis: hidden [...,D], weight [D], epsilon -> hidden.
Norm = Callable[[Tensor, Tensor, float], Tensor]


def rotary_operator(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """ONNX's RotaryEmbedding; see `Rotate`."""
    width = 2 * cos.shape[-1]
    turned = torch.onnx.ops.rotary_embedding(x[..., :width], cos, sin)
    return torch.cat([turned, x[..., width:]], dim=-1) if width < x.shape[-1] else turned


def norm_operator(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """ONNX's RMSNormalization; see `Norm`."""
    return functional.rms_norm(hidden, weight.shape, weight, epsilon)


@dataclass(frozen=True)
class Attending:
    """What a target writes for attention in decoders and in towers, rotary embeddings and RMS norms; `look`
    is for decoder layers that read another layer's cache."""

    decoder: Attend
    tower: TowerAttend
    rotary: Rotate = rotary_operator
    norm: Norm = norm_operator
    look: Look | None = None


# What the attention functions read and write while a graph is traced, and how the target writes it.
_active: ContextVar[Any] = ContextVar("active")
_attending: ContextVar[Attending] = ContextVar("attending")


def attending() -> Attending:
    """What the target writes whose graphs are being traced, for modules that attend by themselves."""
    return _attending.get()


@contextmanager
def active(context: Cache | LastRowProbe | TowerProbe) -> Iterator[None]:
    """Make `context` the one that the registered attention functions read and write."""
    token = _active.set(context)
    try:
        yield
    finally:
        _active.reset(token)


def _decoder_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Emit attention on the cache. query [B,H,S,d], key and value [B,G,S,d] (rotated) -> [B,S,H,d]."""
    refused = sorted(name for name, given in kwargs.items() if name not in _HARMLESS and given is not None)
    if refused:
        raise VtpError(f"this decoder's attention uses '{refused[0]}', which the exporter does not serve")
    cache: Cache | LastRowProbe = _active.get()
    layer = module.layer_idx
    scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
    rule, width = Rule(scale, softcap, sliding_window if cache.lengths.windows else None), query.shape[-1]
    lengths = cache.lengths.of(rule)
    if lengths.key_bias is not None:
        if softcap is not None:
            raise VtpError("a bias of keys would be bent with the logits of this decoder")
        query, key, value = biased(query, key, value, lengths.key_bias, scale)
    if cache.probe is not None and layer == cache.probe.layer:
        cache.probe.read(query, key, rule, lengths)
    if isinstance(cache, LastRowProbe):
        return torch.zeros_like(query[..., :width]).transpose(1, 2), None
    target = _attending.get()
    if layer in cache.owners:
        assert target.look is not None  # see `Target.serving`
        return target.look(query, cache.present[cache.owners[layer]], lengths, rule), None
    output, cache.present[layer] = target.decoder(query, key, value, cache.past[layer], lengths, rule)
    return output if output.shape[-1] == width else output[..., :width], None


def _linear_attention(*tensors: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """transformers' `torch_chunk_gated_delta_rule`, and its twin for single tokens."""
    return _active.get().linear_attention(*tensors, **more)


def grouped_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor],
    lengths: Lengths,
    rule: Rule,
    bias: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Emit ONNX Runtime's GroupQueryAttention; see `Attend`. It is causal and sees the whole cache.

    With a bias [B,1,S,T] of the logits that alone says what is seen; see `masked_query`.
    """
    attributes: dict[str, Any] = {"scale": rule.scale}
    if bias is not None:
        attributes |= {"softcap": rule.softcap or 0.0, "causal": 0}
    elif lengths.lookahead is not None or rule != Rule(rule.scale):
        raise VtpError("GroupQueryAttention is written for plain causal attention; this decoder's is not")
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
            *(() if bias is None else (None, None, None, bias)),  # rotary embedding is not its work here
        ),
        attrs={"num_heads": heads, "kv_num_heads": groups, **attributes},
        dtypes=(query.dtype, key.dtype, value.dtype),
        shapes=((batch, sequence, heads * width), past[0].shape, past[1].shape),
        version=1,
    )
    return output.reshape(batch, sequence, heads, width), (present[0], present[1])


def _merge_heads(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).flatten(2)


def last_row(query: Tensor, key: Tensor, rule: Rule, lengths: Lengths) -> Tensor:
    """The last real token's attention row over this run's tokens, float32 [B,H,S].

    Only this one row is computed; the fused attention beside it never materialises S x S. It is the whole
    row when the cache was empty (prefill), which is when pruners read it.
    """
    last = lengths.last_index(query.shape[2]).unsqueeze(1)
    return attention_rows(query, key, rule, lengths, last)[:, :, 0]


def attention_rows(query: Tensor, key: Tensor, rule: Rule, lengths: Lengths, rows: Tensor) -> Tensor:
    """The attention rows float32 [B,H,R,S] of the tokens at `rows` int64 [B,R] among this run's S.

    query [B,H,S,d] and key [B,G,S,d], rotated. As `last_row`, of a run on an empty cache.
    """
    batch, heads, sequence, width = query.shape
    groups, count = key.shape[1], rows.shape[1]
    places = rows.clamp(0, sequence - 1)
    asked = torch.gather(query, 2, places.view(batch, 1, count, 1).expand(batch, heads, count, width))
    asked = asked.reshape(batch, groups, heads // groups * count, width)
    logits = rule.bend(torch.matmul(asked, key.transpose(2, 3)))
    logits = logits.reshape(batch, heads, count, sequence)
    lookahead = None if lengths.lookahead is None else torch.gather(lengths.lookahead, 1, places)
    hidden = ~lengths.seen(places, sequence, rule, lookahead)
    logits = logits.masked_fill(hidden.unsqueeze(1), torch.finfo(torch.float32).min)
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
    """Fused attention for a vision tower; probed modules also leave their cues with the probe."""
    probe: TowerProbe = _active.get()
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    queries, keys, values = (apart(heads, probe.views) for heads in (query, key, value))
    parts = list(zip(queries, keys, values, strict=True))
    for cue in probe.wanted.get(module, ()):
        read = [_tower_cue(cue, query, key, scale, probe.has_cls) for query, key, _ in parts]
        probe.read[cue] = in_order(read, probe.views)
    attend = _attending.get().tower
    answers = [attend(query, key, value, attention_mask, scale) for query, key, value in parts]
    return together(answers, probe.views).transpose(1, 2), None


def _tower_cue(cue: str, query: Tensor, key: Tensor, scale: float, has_cls: bool) -> Tensor:
    """One cue of `vtp.export.tower_cues` from a block's query and key [B,H,S,d], patches only."""
    if cue != KEYS and reads_cls(cue, has_cls):
        return cls_row(query, key, scale)
    rows = _merge_heads(key) if cue == KEYS else attention_received(query, key, scale)
    return rows[:, 1:] if has_cls else rows


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """ONNX's Attention operator; see `TowerAttend`."""
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


# ONNX Runtime's.
GROUPED_QUERY = Attending(grouped_query_attention, fused_attention)


def cls_row(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """CLS' attention to the patches, mean over heads: one row per head, float32 [B,N]."""
    logits = torch.matmul(query[:, :, :1], key.transpose(2, 3)).float() * scale
    return torch.softmax(logits, dim=-1)[:, :, 0, 1:].mean(dim=1)


def attention_received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention that every row receives, mean over heads and rows, float32 [B,S]."""
    views, heads, *_ = query.shape
    views = views if isinstance(views, int) else 1  # a batch, whose size is not known here
    if views * heads * query.shape[2] * key.shape[2] > _MOST_SCORES:  # a large tower's: head by head
        rows = [_received(query[:, head : head + 1], key[:, head : head + 1], scale) for head in range(heads)]
        return torch.stack(rows).mean(dim=0)
    return _received(query, key, scale)


def _received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    logits = torch.matmul(query, key.transpose(2, 3)).float() * scale
    return torch.softmax(logits, dim=-1).mean(dim=(1, 2))


# What layers with a state call, by its name in transformers' modules -> what is traced instead.
_STATEFUL: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_convolution,
    "torch_chunk_gated_delta_rule": _linear_attention,
    "torch_recurrent_gated_delta_rule": _linear_attention,
}


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
    cos, sin, turn = cos[..., :half], sin[..., :half], _attending.get().rotary
    return turn(query, cos, sin), turn(key, cos, sin)


def _rotate_rows(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
    """The same where transformers turns one tensor at a time: x [B,H,S,d], or [B,S,H,d] with 2."""
    half = cos.shape[-1] // 2
    turned = x.transpose(1, 2) if unsqueeze_dim == 2 else x
    turned = _attending.get().rotary(turned, cos[..., :half], sin[..., :half])
    return turned.transpose(1, 2) if unsqueeze_dim == 2 else turned


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    return _attending.get().norm(hidden, module.weight, module.variance_epsilon)


def _centred_rms_norm(module: Any, hidden: Tensor) -> Tensor:
    """Of `_CENTRED`: weights lie around 0, and the product with 1 + weight is taken in float32."""
    weight = module.weight.float() + 1.0
    return _attending.get().norm(hidden.float(), weight, module.eps).type_as(hidden)


def _wide_rms_norm(module: Any, hidden: Tensor) -> Tensor:
    """Gemma 4's: in float32, some without a weight."""
    weight = module.weight.float() if module.with_scale else torch.ones(hidden.shape[-1])
    return _attending.get().norm(hidden.float(), weight, module.eps).type_as(hidden)


def _norm_of(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """How a transformers norm is written as one operator; None for what is not known here."""
    name = type(module).__name__
    if not name.endswith("RMSNorm"):
        return None
    if hasattr(module, "with_scale"):
        return _wide_rms_norm
    if name.startswith(_CENTRED):
        return _centred_rms_norm
    return _rms_norm if hasattr(module, "variance_epsilon") else None


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
        stack.callback(_attending.reset, _attending.set(attending))
        for part, name in ((decoder, DECODER_ATTENTION), (tower, TOWER_ATTENTION)):
            if part is not None:
                stack.enter_context(_attention_implementation(part, name))
        for module in [*decoder.modules(), *(tower.modules() if tower is not None else ())]:
            if norm := _norm_of(module):
                stack.enter_context(patched(module, "forward", MethodType(norm, module)))
        modeling = _modeling(decoder)
        single = "x" in signature(modeling.apply_rotary_pos_emb).parameters
        stack.enter_context(patched(modeling, "apply_rotary_pos_emb", _rotate_rows if single else _rotate))
        for name, written in _STATEFUL.items():
            if hasattr(modeling, name):
                stack.enter_context(patched(modeling, name, written))
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
