"""States of decoder layers: what is carried from run to run where a layer has no keys and values.

They are written in plain operators, for all targets alike: a row's padding never enters a state, and a run on
an empty cache does not look at what the state's tensor holds (see `StateTensors`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

CONV = "conv"  # the last inputs of a convolution along the tokens
RECURRENT = "recurrent"  # the matrix that linear attention sums keys and values up in
LINEAR = "LinearAttention"  # ONNX Runtime's operator; no other engine has one


class StateCache:
    """The part of a cache that layers without keys and values ask, by transformers' names.

    states, carried  what layers had before this run, and have after it: (kind, layer) -> [B,...]
    lengths          where rows end, see `Lengths`
    """

    states: dict[tuple[str, int], Tensor]
    carried: dict[tuple[str, int], Tensor]
    lengths: Any

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        """None, upon which transformers' layers do what they do with prompts; it serves steps as well."""

    def update_conv_state(self, rows: Tensor, layer: int, *_: Any, **__: Any) -> Tensor:
        """New inputs of a convolution [B,D,S], behind the last ones before them; see `append_rows`."""
        count, place = rows.shape[2], (CONV, layer)
        before = begun(self.states[place], self.lengths.fresh(count))
        joined, self.carried[place] = append_rows(before, rows, self.lengths.last_index(count) + 1)
        return joined

    def get_recurrent_state(self, layer: int, *_: Any, **__: Any) -> Tensor:
        """A layer's matrix [B,H,d,v] as the run before left it."""
        return self.states[RECURRENT, layer]

    def update_recurrent_state(self, state: Tensor, layer: int, *_: Any, **__: Any) -> None:
        """What it is after this run."""
        self.carried[RECURRENT, layer] = state

    def linear_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """See `gated_delta_rule`; padding is kept out here."""
        count = query.shape[1]
        real = torch.arange(count) <= self.lengths.last_index(count).unsqueeze(1)
        before = begun(initial_state, self.lengths.fresh(count))
        return gated_delta_rule(query, key, value, g, beta, before, real.unsqueeze(2))


def begun(state: Tensor, fresh: Tensor) -> Tensor:
    """A state [B,...] before a run; zeros where the run is on an empty cache, `fresh` bool []."""
    return state.masked_fill(fresh, 0.0)


def append_rows(state: Tensor, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The last L inputs [B,D,L] before new ones [B,D,S]: all of them [B,D,L+S], and the last L real ones.

    ends  int64 [B]: how many of the S are not padding
    """
    joined = torch.cat([state, rows], dim=2)
    places = ends.unsqueeze(1) + torch.arange(state.shape[2])  # [B,L]
    places = places.unsqueeze(1).expand(joined.shape[0], joined.shape[1], state.shape[2])
    return joined, torch.gather(joined, 2, places)


def causal_convolution(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """transformers' `causal_conv1d_fn` of what `append_rows` joined, [B,D,L+S] -> the S new ones [B,D,S].

    A channel is convolved with its own weight [D,L]: L products and their sum, which engines fuse, where a
    grouped convolution is slow on most of them.
    """
    length = weight.shape[1]
    count = rows.shape[2] - length
    parts = [rows[:, :, 1 + tap : 1 + tap + count] * weight[:, tap : tap + 1] for tap in range(length)]
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    out = out if bias is None else out + bias.unsqueeze(1)
    return out if activation is None else ACT2FN[activation](out)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    real: Tensor,
) -> tuple[Tensor, Tensor]:
    """Emit ONNX Runtime's LinearAttention with the gated delta rule, in float32.

    query, key [B,S,G,d], normalised here; value [B,S,H,v]; decay (in log space) and beta [B,S,H]; state
    float32 [B,H,d,v] before the run; real bool [B,S,1], false for padding, which neither decays a state nor
    is written into it -> output [B,S,H,v] in the dtype of query, state after the run.
    """
    batch, count, heads, width = value.shape
    groups, depth = key.shape[2:]
    query, key = (_normalised(rows.float(), heads // groups).flatten(2) for rows in (query, key))
    decay, beta = (torch.where(real, numbers.float(), 0.0) for numbers in (decay, beta))
    output, after = torch.onnx.ops.symbolic_multi_out(
        f"com.microsoft::{LINEAR}",
        (query, key, value.float().flatten(2), state, decay, beta),
        attrs={
            "q_num_heads": heads,
            "kv_num_heads": heads,
            "update_rule": "gated_delta",
            "scale": float(depth**-0.5),
        },
        dtypes=(torch.float32, torch.float32),
        shapes=((batch, count, heads * width), state.shape),
        version=1,
    )
    return output.reshape(batch, count, heads, width).to(value.dtype), after


def _normalised(rows: Tensor, times: int) -> Tensor:
    """Rows [B,S,G,d] of length one, each of them `times` times: [B,S,G*times,d]."""
    rows = rows * torch.rsqrt((rows * rows).sum(dim=-1, keepdim=True) + 1e-6)
    batch, count, groups, width = rows.shape
    return rows.unsqueeze(3).expand(batch, count, groups, times, width).flatten(2, 3)
