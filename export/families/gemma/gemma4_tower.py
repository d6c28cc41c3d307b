"""Gemma 4's vision tower at one image size: patches in, squares of patches as visual tokens out.

Source: transformers' modeling_gemma4.py. The tower's own layers are used as they are; what transformers works
out from `image_position_ids` for every picture (places, rotary angles, squares) is known at export.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtp.export.checkpoint.weights import real
from vtp.export.graphs.attention.operators import TowerProbe, active
from vtp.export.patched import patched
from vtp.export.pruners import ops
from vtp.export.tower_cues import KEYS, by_block


class Gemma4Tower(nn.Module):
    """pixel_values [P,values] -> image_features [1,N,C], then the cues asked for, in their order.

    grid  (rows, columns) of patches, `edge` of which along an edge make one of the N tokens

    A token's features are the mean of its patches', scaled and standardised as the model does it. Scores
    float32 [1,N] and vision_keys [1,N,C] (of the last layer, normed, not turned) are means as well.
    """

    numbers: Tensor
    across: Tensor
    down: Tensor

    def __init__(self, tower: Any, grid: tuple[int, int], cues: Sequence[str]) -> None:
        super().__init__()
        (rows, columns), table = grid, real(tower.patch_embedder.position_embedding_table)
        self.grid, self.edge = grid, tower.config.pooling_kernel_size
        self.project, self.rotary = tower.patch_embedder.input_proj, tower.encoder.rotary_emb
        self.layers = nn.ModuleList(tower.encoder.layers)
        self.bounded = [
            (module, _bounds(module, "input"), _bounds(module, "output"))
            for module in self.layers.modules()
            if getattr(module, "use_clipped_linears", False)
        ]
        self.cues, self.reads = tuple(cues), by_block(cues, len(tower.encoder.layers))
        self.scale = tower.pooler.root_hidden_size
        self.register_buffer("numbers", places(grid), persistent=False)
        self.register_buffer("across", table[0, :columns].clone().unsqueeze(0), persistent=False)
        self.register_buffer("down", table[1, :rows].clone().unsqueeze(1), persistent=False)
        standard = tower.config.standardize
        self.register_buffer("bias", tower.std_bias if standard else None, persistent=False)
        self.register_buffer("spread", tower.std_scale if standard else None, persistent=False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Features, then the cues asked for, in their order."""
        wanted = {
            self.layers[at].self_attn: [cue for cue in cues if cue != KEYS] for at, cues in self.reads.items()
        }
        probe = TowerProbe(False, wanted)  # type: ignore[arg-type]
        hidden = self.project(2 * (pixel_values - 0.5)) + (self.down + self.across).flatten(0, 1)
        hidden = hidden.unsqueeze(0)
        turns, keys = self.rotary(hidden, self.numbers), hidden
        with active(probe), self._constant_bounds():
            for number, layer in enumerate(self.layers):
                if KEYS in self.reads.get(number, ()):
                    keys = self._keys(layer, hidden)
                hidden = layer(
                    hidden, position_embeddings=turns, attention_mask=None, position_ids=self.numbers
                )
        read = {**probe.read, KEYS: keys}
        return (self._features(hidden), *(self._pool(read[cue]) for cue in self.cues))

    @contextmanager
    def _constant_bounds(self) -> Iterator[None]:
        """Linear layers that clip by numbers, not by tensors."""
        with ExitStack() as stack:
            for module, before, after in self.bounded:
                stack.enter_context(patched(module, "forward", partial(_clipped, module, before, after)))
            yield

    def _features(self, hidden: Tensor) -> Tensor:
        pooled = self._pool(hidden.float()).to(hidden.dtype).float() * self.scale
        if self.bias is not None and self.spread is not None:
            pooled = (pooled - self.bias.float()) * self.spread.float()
        return pooled.to(hidden.dtype)

    def _pool(self, patches: Tensor) -> Tensor:
        """Means over squares of patches: [1,P,.] or [1,P] -> [1,N,.] or [1,N]."""
        (rows, columns), edge = self.grid, self.edge
        squares = patches.reshape(1, rows // edge, edge, columns // edge, edge, *patches.shape[2:])
        return squares.mean(dim=(2, 4)).flatten(1, 2)

    def _keys(self, layer: Any, hidden: Tensor) -> Tensor:
        attention, rows = layer.self_attn, layer.input_layernorm(hidden)
        return attention.k_norm(attention.k_proj(rows).unflatten(-1, (-1, attention.head_dim))).flatten(2)


def _bounds(module: Any, side: str) -> tuple[float, float]:
    """Between which numbers a linear layer clips its "input" or "output"."""
    least, most = (float(real(getattr(module, f"{side}_{end}"))) for end in ("min", "max"))
    return least, most


def _clipped(module: Any, before: tuple[float, float], after: tuple[float, float], rows: Tensor) -> Tensor:
    return torch.ops.vtp.bounded(module.linear(torch.ops.vtp.bounded(rows, *before)), *after)


@torch.library.custom_op("vtp::bounded", mutates_args=())
def _bounded(rows: Tensor, least: float, most: float) -> Tensor:
    return rows.clamp(least, most).clone()


@_bounded.register_fake
def _(rows: Tensor, least: float, most: float) -> Tensor:
    return torch.empty_like(rows)


@ops.translates(torch.ops.vtp.bounded.default)
def _write_bounded(rows: Any, least: float, most: float) -> Any:
    """Clip, whose bounds are constants of its own: torch's clamp becomes Max and Min, and onnxscript joins
    these under names by which it takes one layer's bounds for another's."""
    op = ops.onnx_ops()
    bounds = [op.CastLike(op.Constant(value_float=value), rows) for value in (least, most)]
    return op.Clip(rows, *bounds)


class Gemma4Projector(nn.Module):
    """image_features [B,M,C] -> image_embeds [B,M,D], and `row` [R] beside each of them if there is one."""

    row: Tensor | None

    def __init__(self, projector: nn.Module, row: Tensor | None) -> None:
        super().__init__()
        self.projector = projector
        self.register_buffer("row", row, persistent=False)

    def forward(self, image_features: Tensor) -> Tensor:
        embeds = self.projector(image_features)
        if self.row is None:
            return embeds
        batch, count, _ = embeds.shape
        return torch.cat([embeds, self.row.to(embeds.dtype).expand(batch, count, -1)], dim=-1)


def places(grid: tuple[int, int]) -> Tensor:
    """int64 [1,P,2]: column and row of every patch."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([columns, rows], dim=-1).reshape(1, -1, 2)
