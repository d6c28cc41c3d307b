"""The image side as graphs: the vision tower and the projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vtp.export.graphs.attention.operators import TowerProbe, active
from vtp.export.tower_cues import by_block
from vtp.export.towers.base import RowReduction
from vtp.export.towers.blocks import Block


class VisionEncoder(nn.Module):
    """pixel_values [B,3,H,W] -> image_features [B,N,C], then the cues asked for, in their order.

    `embed` turns pixels into the first hidden states; `layers` are only those that the features need, `norm`
    what follows them in some towers. Cues are those of `vtp.export.tower_cues`. With a
    `reduction` the layers work on fewer rows, see `vtp.export.towers`. `views` are the rows of each view
    where a picture's views are of unlike sizes: they then follow one another, and `embed` gives [1,N,C].
    """

    def __init__(
        self,
        embed: nn.Module,
        layers: Sequence[nn.Module],
        has_cls: bool,
        cues: Sequence[str] = (),
        norm: nn.Module | None = None,
        reduction: RowReduction | None = None,
        views: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.views = tuple(views)
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.has_cls = has_cls
        self.cues = tuple(cues)
        self.reduction = reduction

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        run = self._run if self.reduction is None else self._run_reduced
        hidden, read = run(self.embed(pixel_values))
        hidden = hidden if self.norm is None else self.norm(hidden)
        features = hidden[:, 1:] if self.has_cls else hidden
        return (features, *(read[name] for name in self.cues))

    def _run(self, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        wanted = by_block(self.cues, len(self.layers))
        reads = {self.layers[at].self_attn: cues for at, cues in wanted.items()}
        probe = TowerProbe(self.has_cls, reads, views=self.views)  # type: ignore[arg-type]
        with active(probe):
            for layer in self.layers:
                hidden = layer(hidden, None)
        return hidden, probe.read

    def _run_reduced(self, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        assert self.reduction is not None
        blocks = [Block(getattr(layer, "layer", layer)) for layer in self.layers]
        with active(TowerProbe(self.has_cls)):
            made = self.reduction.encode(blocks, hidden, self.has_cls, bool(self.cues))
        return made.hidden, {"attention_scores": made.scores, "vision_keys": made.keys}


class PooledEncoder(nn.Module):
    """What an encoder gives for every patch, [B,P,C] or [B,P], as means over squares of patches."""

    def __init__(self, encoder: nn.Module, side: int, edge: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.side = side
        self.edge = edge

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._pool(values) for values in self.encoder(pixel_values))

    def _pool(self, values: Tensor) -> Tensor:
        side, edge = self.side, self.edge
        squares = values.reshape(values.shape[0], side, edge, side, edge, *values.shape[2:])
        return squares.mean(dim=(2, 4)).flatten(1, 2)


class Projector(nn.Module):
    """image_features [B,M,C] -> image_embeds [B,M,D]; M is N or, after a vision-site pruner, K."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, image_features: Tensor) -> Tensor:
        return self.projector(image_features)
