"""The vision tower of a camera: a graph for reference pictures, and one for those that come after them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vtp.export.graphs.attention.operators import TowerProbe, active
from vtp.export.graphs.encoder import VisionEncoder
from vtp.export.towers.base import Encoded
from vtp.export.towers.blocks import Block
from vtp.export.towers.stc import Stc


class ReferenceEncoder(VisionEncoder):
    """pixel_values [B,3,H,W] -> image_features [B,N,C], the cues asked for, then the state of every block.

    See `vtp.export.towers.stc`; its state is four tensors [B,R,C] a block, of all R rows (CLS among them).
    """

    def __init__(
        self,
        embed: nn.Module,
        layers: Sequence[nn.Module],
        has_cls: bool,
        cues: Sequence[str],
        reuse: Stc,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__(embed, layers, has_cls, cues, norm)
        self.reuse = reuse

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        hidden = self.embed(pixel_values)
        with active(TowerProbe(self.has_cls)):
            made, state = self.reuse.encode(self._blocks(), hidden, self.has_cls, bool(self.cues))
        return (*self._answer(made), *state)

    def _blocks(self) -> list[Block]:
        return [Block(getattr(layer, "layer", layer)) for layer in self.layers]

    def _answer(self, made: Encoded) -> tuple[Tensor, ...]:
        read = {"attention_scores": made.scores, "vision_keys": made.keys}
        hidden = made.hidden if self.norm is None else self.norm(made.hidden)
        features = hidden[:, 1:] if self.has_cls else hidden
        return (features, *(found for name in self.cues if (found := read[name]) is not None))


class LaterEncoder(ReferenceEncoder):
    """pixel_values, then a reference picture's state -> image_features, the cues, which rows each block
    recomputed (int64 [B,u] each), and the mean cosine of the first block's keys, float32 [B]."""

    def forward(self, pixel_values: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        hidden = self.embed(pixel_values)
        with active(TowerProbe(self.has_cls)):
            made, rows, alike = self.reuse.encode_later(
                self._blocks(), hidden, state, self.has_cls, bool(self.cues)
            )
        return (*self._answer(made), *rows, alike)
