"""LLaVA-1.5: a CLIP or SigLIP tower, a two-layer projector, any decoder of the Llama kind.

Source: transformers' modeling_llava.py (Liu et al., arXiv 2310.03744). The features are the tower's
`hidden_states[vision_feature_layer]`; what comes after that layer is not in the graph. Method papers read the
attention of the layer that *produces* those hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtp.engines import VtpError
from vtp.export.families.base import Family
from vtp.export.graphs.decoder import Decoder
from vtp.export.graphs.encoder import Projector, VisionEncoder
from vtp.export.graphs.stream import LaterEncoder, ReferenceEncoder
from vtp.export.towers.base import TowerShape


class Llava(Family):
    """LlavaForConditionalGeneration."""

    name = "llava"
    architectures = ("LlavaForConditionalGeneration",)
    sites: ClassVar[tuple[str, ...]] = ("vision", "projector", "decoder")
    several = True
    limits = "CLIP or SigLIP tower; one vision_feature_layer"
    reductions: ClassVar[tuple[str, ...]] = ("ipcv", "tome", "downsample", "stc")

    @classmethod
    def takes(cls, config: dict[str, Any]) -> bool:
        """Not with Pixtral's tower: family pixtral."""
        vision = config.get("vision_config")
        return cls is not Llava or not isinstance(vision, dict) or vision.get("model_type") != "pixtral"

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
        cls.check_decoder(text.get("model_type", "llama"))
        _check_tower(vision.get("model_type", "clip_vision_model"))
        _check_layer(config.get("vision_feature_layer", -2))

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = (size // self._vision.patch_size for size in self.image_size)
        return rows, columns

    @property
    def image_size(self) -> tuple[int, int]:
        size = self._vision.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def feature_width(self) -> int:
        return self._vision.hidden_size

    @property
    def tower_shape(self) -> TowerShape:
        rows, columns = (size // self._vision.patch_size for size in self.image_size)
        return TowerShape(rows * columns, self._feature_layer(), self._has_cls())

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.model.model.language_model, self.model.lm_head)

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def tower(self) -> Any:
        return self.model.model.vision_tower

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        return self._encoder(cues, leave_cls=self._has_cls())

    def later_encoder(self, cues: Sequence[str]) -> nn.Module:
        assert self.stream_reuse is not None  # or nobody asks
        return LaterEncoder(*self._used, self._has_cls(), cues, self.stream_reuse)

    def projector(self, whole: bool) -> nn.Module:
        del whole  # it has no tokens but its patches
        return Projector(self.model.model.multi_modal_projector)

    def _encoder(self, cues: Sequence[str], leave_cls: bool) -> VisionEncoder:
        """The tower up to the layer that makes the features, which leaves a CLS token out or passes it on."""
        if self.stream_reuse is not None:
            return ReferenceEncoder(*self._used, leave_cls, cues, self.stream_reuse)
        return VisionEncoder(*self._used, leave_cls, cues, reduction=self.row_reduction)

    @property
    def _used(self) -> tuple[nn.Module, list[nn.Module]]:
        """What embeds pixels, and the blocks that the features need."""
        layers = list(self.tower.encoder.layers)[: self._feature_layer()]
        return _TOWERS[self._vision.model_type](self.tower), layers

    @property
    def _vision(self) -> Any:
        return self.model.config.vision_config

    def _has_cls(self) -> bool:
        kind, strategy = self._vision.model_type, self.model.config.vision_feature_select_strategy
        _check_tower(kind)
        fits = (strategy == "default") == (kind == "clip_vision_model")
        if not fits:
            raise VtpError(
                f"vision_feature_select_strategy '{strategy}' with a '{kind}' tower is not supported; "
                "CLIP towers take 'default', SigLIP towers 'full'"
            )
        return kind == "clip_vision_model"

    def _feature_layer(self) -> int:
        """How many encoder layers run: hidden_states[0] is the embedding, [i] comes out of the i-th layer."""
        layer, count = self.model.config.vision_feature_layer, self._vision.num_hidden_layers
        _check_layer(layer)
        number = layer if layer >= 0 else count + 1 + layer
        if not 1 <= number <= count:
            raise VtpError(f"vision_feature_layer {layer} is not one of the tower's {count} layers")
        return number


def _check_tower(kind: str) -> None:
    if kind not in _TOWERS:
        raise VtpError(f"this LLaVA's vision tower is '{kind}'; supported towers: {', '.join(_TOWERS)}")


def _check_layer(layer: Any) -> None:
    if not isinstance(layer, int):
        raise VtpError(f"vision_feature_layer is {layer!r}; only one layer, a whole number, is supported")


class _ClipEmbeddings(nn.Module):
    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.embeddings, self.norm = tower.embeddings, tower.pre_layrnorm

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.norm(self.embeddings(pixel_values))


class _SiglipEmbeddings(nn.Module):
    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.embeddings = tower.embeddings

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.embeddings(pixel_values)


_TOWERS = {"clip_vision_model": _ClipEmbeddings, "siglip_vision_model": _SiglipEmbeddings}
FAMILY = Llava
