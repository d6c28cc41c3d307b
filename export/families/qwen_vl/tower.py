"""Qwen-VL's vision towers at one image size: patches in, merged tokens out, all about places constant.

Source: transformers' modeling_qwen2_vl.py, modeling_qwen2_5_vl.py, modeling_qwen3_vl.py. The blocks' own
parts (norms, qkv, proj, mlp) are used as they are; what transformers works out from `grid_thw` for every
picture (rotary angles, windows) is known at export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtp.export.graphs.attention.operators import attending, attention_received
from vtp.export.tower_cues import KEYS, by_block


@dataclass(frozen=True)
class PatchGrid:
    """`rows` x `columns` patches of a picture, merged `merge` x `merge` into visual tokens.

    Patches come token by token, in the order in which the tokens lie in the picture.
    """

    rows: int
    columns: int
    merge: int

    @property
    def count(self) -> int:
        """P, the number of patches."""
        return self.rows * self.columns

    @property
    def merged(self) -> tuple[int, int]:
        """(rows, columns) of visual tokens."""
        return self.rows // self.merge, self.columns // self.merge

    def places(self) -> Tensor:
        """int64 [P,2]: row and column of every patch."""
        rows, columns = torch.meshgrid(torch.arange(self.rows), torch.arange(self.columns), indexing="ij")
        (high, wide), merge = self.merged, self.merge
        places = torch.stack([rows, columns], dim=-1).view(high, merge, wide, merge, 2)
        return places.transpose(1, 2).reshape(-1, 2)

    def windows(self, side: int) -> list[list[int]]:
        """Visual tokens of each window of `side` x `side` of them; those at the far edges are cut short."""
        high, wide = self.merged
        return [
            [
                y * wide + x
                for y in range(top, min(top + side, high))
                for x in range(left, min(left + side, wide))
            ]
            for top in range(0, high, side)
            for left in range(0, wide, side)
        ]


class PatchAttention(nn.Module):
    """One block's attention over P patches, each window's w patches among themselves.

    cos, sin  [P,d/2] of the rotary embedding; constants
    sizes     patches of each window, one window after another; w is the most. Shorter windows are filled up
              with their own last patch, which nobody looks at and which is dropped again.
    """

    cos: Tensor
    sin: Tensor
    fill: Tensor | None
    mask: Tensor | None
    back: Tensor | None

    def __init__(self, cos: Tensor, sin: Tensor, sizes: Sequence[int]) -> None:
        super().__init__()
        self.count, self.windows, self.width = len(cos), len(sizes), max(sizes)
        lengths = torch.tensor(sizes).unsqueeze(1)
        slots = torch.arange(self.width).expand(self.windows, -1)
        fill = (lengths.cumsum(0) - lengths + torch.minimum(slots, lengths - 1)).flatten()
        real = slots < lengths
        uneven = len(set(sizes)) > 1
        for name, table in (("cos", cos[fill]), ("sin", sin[fill])):
            self.register_buffer(name, table.view(self.windows, self.width, -1), persistent=False)
        for name, table in (
            ("fill", fill),
            ("mask", real[:, None, None].repeat(1, 1, self.width, 1)),  # [W,1,w,w]: whom a query may see
            ("back", real.flatten().nonzero().flatten()),
        ):
            self.register_buffer(name, table if uneven else None, persistent=False)

    def forward(self, attention: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a block's `attention` gives [P,C] for its qkv rows [P,3C]; query, key [W,H,w,d], turned."""
        rows = rows if self.fill is None else rows.index_select(0, self.fill)
        parts = rows.view(self.windows, self.width, 3, attention.num_heads, attention.head_dim)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        target, cos, sin = attending(), self.cos.to(rows.dtype), self.sin.to(rows.dtype)
        query, key = target.rotary(query, cos, sin), target.rotary(key, cos, sin)
        answer = target.tower(query, key, value, self.mask, attention.scaling)
        answer = answer.transpose(1, 2).reshape(self.windows * self.width, -1)
        return attention.proj(answer if self.back is None else answer.index_select(0, self.back)), query, key

    def received(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Attention that every patch receives, mean over heads and all P rows, float32 [P].

        Rows of other windows give nothing.
        """
        if self.mask is None or self.back is None:
            return attention_received(query, key, scale).flatten() / self.windows
        logits = torch.matmul(query, key.transpose(2, 3)).float() * scale
        weights = torch.softmax(logits.masked_fill(~self.mask, torch.finfo(torch.float32).min), dim=-1)
        weights = weights.masked_fill(~self.mask.transpose(2, 3), 0.0)  # rows of what fills a window up
        return weights.sum(dim=2).mean(dim=1).flatten().index_select(0, self.back) / self.count


@dataclass(frozen=True)
class TowerParts:
    """What the towers differ in.

    norm     of the merger: hidden [P,C] -> [P,C]
    windows  the visual tokens of each window, if not all blocks attend to everything
    whole    numbers of the blocks that do
    places   () -> what is added to the patches for their places, [P,C]
    deep     block number -> norm of features that the decoder takes besides: [P,C] -> [N,merge²·C]
    """

    norm: nn.Module
    windows: Sequence[Sequence[int]] = ()
    whole: Sequence[int] = ()
    places: nn.Module | None = None
    deep: Mapping[int, nn.Module] = field(default_factory=dict)


class PatchTower(nn.Module):
    """pixel_values [P,values] -> image_features [1,N,merge²·C], then the cues asked for, in their order.

    A visual token's features are those of its patches side by side, normed as the merger does it: what the
    merger's MLP takes; then those of the blocks in `deep`, in the same way. Scores float32 [1,N] are means
    over the token's patches of the attention received in a block (mean over heads and rows); vision_keys
    [1,N,merge²·C] are the last block's keys before the rotary embedding, the patches side by side.
    """

    order: Tensor | None
    back: Tensor

    def __init__(self, visual: Any, grid: PatchGrid, parts: TowerParts, cues: Sequence[str]) -> None:
        super().__init__()
        self.blocks = visual.blocks
        self.patch = visual.patch_embed.proj
        self.norm, self.places, self.whole = parts.norm, parts.places, tuple(parts.whole)
        self.deep = nn.ModuleDict({str(number): norm for number, norm in parts.deep.items()})
        self.merged = grid.merge**2
        self.cues = tuple(cues)
        self.reads = by_block(cues, len(visual.blocks))
        tokens = torch.tensor([token for window in parts.windows for token in window], dtype=torch.int64)
        tokens = tokens if parts.windows else torch.arange(grid.count // self.merged)
        order = (tokens.unsqueeze(1) * self.merged + torch.arange(self.merged)).flatten()
        self.register_buffer("order", order if parts.windows else None, persistent=False)
        self.register_buffer("back", tokens.argsort(), persistent=False)
        turned = turns(visual, grid.places()[order])
        self.over_all = PatchAttention(*turned, [grid.count])
        sizes = [self.merged * len(window) for window in parts.windows]
        self.in_windows = PatchAttention(*turned, sizes) if sizes else self.over_all

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Features, then the cues asked for, in their order."""
        if self.order is not None:
            pixel_values = pixel_values.index_select(0, self.order)
        # A patch is as large as the convolution's kernel: one product for all of them.
        hidden = functional.linear(pixel_values, self.patch.weight.flatten(1), self.patch.bias)
        if self.places is not None:
            hidden = hidden + self.places().to(hidden.dtype)
        cues: dict[str, Tensor] = {}
        deep: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            hidden = self._block(number, block, hidden, cues)
            if str(number) in self.deep:
                deep.append(self._tokens(self.deep[str(number)](hidden)))
        features = torch.cat([self._tokens(self.norm(hidden)), *deep], dim=-1)
        return (features, *(cues[name] for name in self.cues))

    def _block(self, number: int, block: Any, hidden: Tensor, cues: dict[str, Tensor]) -> Tensor:
        """What a block makes of `hidden` [P,C]; some leave cues."""
        rows, width = block.attn.qkv(block.norm1(hidden)), hidden.shape[1]
        attend = self.over_all if number in self.whole else self.in_windows
        added, query, key = attend(block.attn, rows)
        for cue in self.reads.get(number, ()):
            if cue == KEYS:
                cues[cue] = self._tokens(rows[:, width : 2 * width])
            else:
                cues[cue] = self._tokens(attend.received(query, key, block.attn.scaling)).mean(dim=2)
        hidden = hidden + added
        return hidden + block.mlp(block.norm2(hidden))

    def _tokens(self, patches: Tensor) -> Tensor:
        """Values of the patches in the tower's order [P,.] -> of the tokens in the picture's [1,N,.]."""
        tokens = patches.reshape(len(self.back), -1)
        return (tokens if self.order is None else tokens.index_select(0, self.back)).unsqueeze(0)


class PlaceTable(nn.Module):
    """() -> float [P,C]: a learned square table of places, resampled to a picture's grid by constant weights.

    table    Embedding of the square's places
    taps     int64 [P,t], which of them each patch takes, and `weights` float32 [P,t], how much of each
    """

    taps: Tensor
    weights: Tensor

    def __init__(self, table: nn.Module, taps: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("taps", taps, persistent=False)
        self.register_buffer("weights", weights.unsqueeze(-1), persistent=False)

    def forward(self) -> Tensor:
        return (self.table(self.taps) * self.weights).sum(dim=1)


class JoinedNorm(nn.Module):
    """[P,C] -> [N,merge²·C]: the patches of a visual token side by side, normed together."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.reshape(-1, *self.norm.normalized_shape))


class DeepProjector(nn.Module):
    """image_features [B,M,(1+L)·C] -> image_embeds [B,M,(1+L)·D]: each of the parts by a merger's MLP."""

    def __init__(self, mergers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.mergers = nn.ModuleList(mergers)

    def forward(self, image_features: Tensor) -> Tensor:
        """Project each part by its merger, side by side again."""
        count = len(self.mergers)
        parts = image_features.chunk(count, dim=-1) if count > 1 else (image_features,)
        mergers: list[Any] = list(self.mergers)
        return torch.cat(
            [
                merger.linear_fc2(merger.act_fn(merger.linear_fc1(part)))
                for merger, part in zip(mergers, parts, strict=True)
            ],
            dim=-1,
        )


def turns(visual: Any, places: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [P,d/2] of a tower's rotary embedding at `places` [P,2]: half the angles are the row's."""
    angles = (places.float().unsqueeze(2) * visual.rotary_pos_emb.inv_freq.float()).flatten(1)
    return angles.cos(), angles.sin()
