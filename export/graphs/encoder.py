"""The image side as graphs: the vision tower and the projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vtp.export.graphs.attention.operators import TowerProbe, active


class VisionEncoder(nn.Module):
    """pixel_values [B,3,H,W] -> image_features [B,N,C], then the cues asked for, in their order.

    `embed` turns pixels into the first hidden states; `layers` are only those that the features need, `norm`
    what follows them in some towers. Cues: attention_scores float32 [B,N] and vision_keys [B,N,C], both of
    the last of those layers.
    """

    def __init__(
        self,
        embed: nn.Module,
        layers: Sequence[nn.Module],
        has_cls: bool,
        cues: Sequence[str] = (),
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.has_cls = has_cls
        self.cues = tuple(cues)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        probed = self.layers[-1].self_attn if self.cues else None
        probe = TowerProbe(probed, self.has_cls)  # type: ignore[arg-type]
        hidden = self.embed(pixel_values)
        with active(probe):
            for layer in self.layers:
                hidden = layer(hidden, None)
        hidden = hidden if self.norm is None else self.norm(hidden)
        features = hidden[:, 1:] if self.has_cls else hidden
        read: dict[str, Any] = {"attention_scores": probe.scores, "vision_keys": probe.keys}
        return (features, *(read[name] for name in self.cues))


class Projector(nn.Module):
    """image_features [B,M,C] -> image_embeds [B,M,D]; M is N or, after a vision-site pruner, K."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, image_features: Tensor) -> Tensor:
        return self.projector(image_features)
