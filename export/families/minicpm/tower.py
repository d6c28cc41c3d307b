"""MiniCPM-V's vision tower at one image size: patches in, four times four of them in a token's features.

A picture is one view, or the whole and slices one after another, each of which attends to itself alone.

Source: transformers' modeling_minicpmv4_6.py. The blocks' own parts are used as they are; what transformers
works out from `target_sizes` for every picture (places, windows) is known at export.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtp.export.families.tiled.shuffle import shuffled_views
from vtp.export.graphs.attention.operators import attending, attention_received
from vtp.export.graphs.attention.views import apart, in_order, together
from vtp.export.tower_cues import KEYS, by_block

FACTOR = 2  # patches along an edge that become one, in the tower and again behind it


class MergingTower(nn.Module):
    """pixel_values [P,values] -> image_features [1,N,4·C], then the cues asked for, in their order.

    A token's features are those of its four merged patches side by side: what the projector takes. Scores
    float32 [1,N] are means over the rows that make a token (4 behind the merging, 16 in front of it) of the
    attention received in a block, mean over heads and rows; vision_keys [1,N,4·C] are the last block's keys.
    """

    places: Tensor

    def __init__(self, tower: Any, grids: Sequence[tuple[int, int]], cues: Sequence[str]) -> None:
        """`grids` are the (rows, columns) of patches of every view."""
        super().__init__()
        self.patch, self.table = tower.embeddings.patch_embedding, tower.embeddings.position_embedding
        self.layers, self.merger, self.norm = tower.encoder.layers, tower.vit_merger, tower.post_layernorm
        self.insert, self.grids = tower.config.insert_layer_id, tuple(grids)
        self.merged = tuple((rows // FACTOR, columns // FACTOR) for rows, columns in grids)
        self.cues, self.reads = tuple(cues), by_block(cues, len(self.layers))
        side = tower.embeddings.num_patches_per_side
        places = torch.cat([nearest_places(grid, side) for grid in grids])
        self.register_buffer("places", places, persistent=False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Features, then the cues asked for, in their order."""
        # A patch is as large as the convolution's kernel: one product for all of them.
        rows = functional.linear(pixel_values, self.patch.weight.flatten(1), self.patch.bias)
        hidden = (rows + self.table(self.places)).unsqueeze(0)
        cues: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers):
            added, read = self._attend(number, layer.self_attn, layer.layer_norm1(hidden))
            cues |= {name: self._tokens(rows, number) for name, rows in read.items()}
            hidden = hidden + added
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
            if number == self.insert:
                hidden = self._merge(hidden)
        features = shuffled_views(self.norm(hidden), FACTOR, self.merged)
        return (features, *(cues[name] for name in self.cues))

    def _attend(self, number: int, attention: Any, normed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What a block's attention adds to hidden [B,R,C], and the cues that are read in it."""
        views, attend = self._views(number), attending().tower
        queries, keys, values = (apart(heads, views) for heads in _heads(attention, normed))
        parts = list(zip(queries, keys, values, strict=True))
        read: dict[str, Tensor] = {}
        for cue in self.reads.get(number, ()):
            if cue == KEYS:
                read[cue] = attention.k_proj(normed)
            else:
                rows = [attention_received(query, key, attention.scaling) for query, key, _ in parts]
                read[cue] = in_order(rows, views)
        answers = [attend(query, key, value, None, attention.scaling) for query, key, value in parts]
        return attention.out_proj(together(answers, views).transpose(1, 2).flatten(2)), read

    def _grids(self, number: int) -> Sequence[tuple[int, int]]:
        """(rows, columns) of every view in a block."""
        return self.merged if 0 <= self.insert < number else self.grids

    def _views(self, number: int) -> Sequence[int]:
        """Rows of every view in a block; none where there is one view."""
        grids = self._grids(number)
        return [rows * columns for rows, columns in grids] if len(grids) > 1 else []

    def _merge(self, hidden: Tensor) -> Tensor:
        """[1,P,C] -> [1,P/4,C]: each four attend to one another, and an MLP makes one of them."""
        merger, width = self.merger, hidden.shape[2]
        fours, normed = (
            shuffled_views(rows, FACTOR, self.grids).reshape(-1, FACTOR**2, width)
            for rows in (hidden, merger.layer_norm1(hidden))
        )
        query, key, value = _heads(merger.self_attn, normed)
        answer = attending().tower(query, key, value, None, merger.self_attn.scaling)
        fours = fours + merger.self_attn.out_proj(answer.transpose(1, 2).flatten(2))
        one = merger.linear_2(merger.act(merger.linear_1(merger.pre_norm(fours.flatten(1)))))
        return (one + fours.mean(dim=1)).unsqueeze(0)

    def _tokens(self, rows: Tensor, number: int) -> Tensor:
        """Scores [1,R] or keys [1,R,C] of a block's rows -> of the tokens."""
        grids = self._grids(number)
        factor = FACTOR if grids is self.merged else FACTOR**2
        if rows.dim() == 2:
            return shuffled_views(rows.unsqueeze(2), factor, grids).mean(dim=2)
        return shuffled_views(rows, factor, grids)


class MergerMlp(nn.Module):
    """The projector: image_features [B,M,4·C] -> image_embeds [B,M,D]."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.norm, self.linear_1, self.act, self.linear_2 = mlp.pre_norm, mlp.linear_1, mlp.act, mlp.linear_2

    def forward(self, image_features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(self.norm(image_features))))


def nearest_places(grid: tuple[int, int], side: int) -> Tensor:
    """int64 [P]: which of the table's side x side places every patch takes.

    In float32 and with `bucketize`, as transformers does it, whose roundings decide at the borders.
    """
    borders = torch.arange(1 / side, 1.0, 1 / side)
    rows, columns = (torch.bucketize(torch.arange(length) / length, borders, right=True) for length in grid)
    return (rows[:, None] * side + columns).flatten()


def _heads(attention: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B,H,R,d] of normed rows [B,R,C]."""
    batch, count, _ = normed.shape
    shape = (batch, count, attention.num_heads, attention.head_dim)
    projected = (part(normed) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    query, key, value = (rows.reshape(shape).transpose(1, 2) for rows in projected)
    return query, key, value
