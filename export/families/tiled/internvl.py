"""InternVL 2.5, 3 and 3.5, in transformers' own form: a tower with CLS, four patches to a token, tiles.

Source: transformers' modeling_internvl.py (Chen et al., arXiv 2412.05271; Zhu et al., arXiv 2504.10479; Wang
et al., arXiv 2508.18265). The picture's parts, then the picture as a whole go through the tower one by one;
2 x 2 neighbouring patches of a view become one visual token in front of the projector. The tokens of all
views follow one another between `<img>` and `</img>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vtp.engines import VtpError
from vtp.export.families.base import Family, marks_of
from vtp.export.families.tiled.reference import InternVLReference
from vtp.export.families.tiled.shuffle import ShuffledEncoder
from vtp.export.families.tiles import TILED, UNREUSED_TILES, Tile, equal_tiles
from vtp.export.graphs.decoder import Decoder
from vtp.export.graphs.encoder import Projector, VisionEncoder
from vtp.export.towers.base import TowerShape
from vtp.runtime.preprocess import ImageSpec

_MARKS = ("start_image_token", "end_image_token")


class InternVL(Family):
    """InternVLForConditionalGeneration."""

    name = "internvl"
    architectures = ("InternVLForConditionalGeneration",)
    sites = ("vision", "projector", "decoder")
    several = True
    limits = (
        "one image size per bundle; K is for the whole picture, dealt to tiles with --share tile; methods "
        "that need a grid only at one tile or with --share tile; no video; no experts (of InternVL 3.5 "
        "the dense ones)"
    )
    reductions = ("ipcv", "tome")
    unreduced = "a smaller --image-size gives it fewer tiles"
    unreused = UNREUSED_TILES
    image_kinds = ("internvl", "clip")  # the second at an image size of one tile
    reference = InternVLReference
    _views = 1

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        """VtpError for a decoder, feature layer or strategy that is not served."""
        cls.check_decoder((config.get("text_config") or {}).get("model_type", "qwen2"))
        layer = config.get("vision_feature_layer", -1)
        if not isinstance(layer, int):
            raise VtpError(f"vision_feature_layer is {layer!r}; only one layer, a whole number, is supported")
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy != "default":
            raise VtpError(
                f"vision_feature_select_strategy is {strategy!r}; only 'default', which leaves CLS out, is "
                "supported for InternVL"
            )

    def prepare(self, image: ImageSpec) -> None:
        self._views = image.views
        if self._views > 1:
            self.lacks = TILED

    @property
    def views(self) -> int:
        return self._views

    @property
    def apart(self) -> bool:
        return self._views > 1

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self._tile
        return (rows, columns) if self._views == 1 else (1, self._views * rows * columns)

    @property
    def tiles(self) -> Sequence[Tile]:
        return equal_tiles(self._views, self._tile)

    @property
    def _tile(self) -> tuple[int, int]:
        """(rows, columns) of the tokens of one tile."""
        rows, columns = (
            size // patch // self._factor
            for size, patch in zip(self.image_size, self._vision.patch_size, strict=True)
        )
        return rows, columns

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self._vision.image_size
        return height, width

    @property
    def feature_width(self) -> int:
        return self._vision.hidden_size * self._factor**2

    @property
    def tower_shape(self) -> TowerShape:
        rows, columns = (
            size // patch for size, patch in zip(self.image_size, self._vision.patch_size, strict=True)
        )
        return TowerShape(rows * columns, self._feature_layer(), True)

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.model.model.language_model, self.model.lm_head)

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    def read_marks(self, tokenizer: Any) -> None:
        self._around = tokenizer.convert_tokens_to_ids(marks_of(tokenizer, _MARKS))

    @property
    def placeholder_ids(self) -> list[int]:
        start, end = self._around
        return [start, self.image_token_id, end]

    @property
    def tower(self) -> Any:
        return self.model.model.vision_tower

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        number = self._feature_layer()
        layers = [_Layer(layer) for layer in list(self.tower.encoder.layer)[:number]]
        norm = self.tower.layernorm if self.model.config.vision_feature_layer == -1 else None
        embed = self.tower.embeddings
        encoder = VisionEncoder(embed, layers, True, cues, norm, self.row_reduction)
        return ShuffledEncoder(encoder, cues, self._factor, self._views == 1)

    def projector(self, whole: bool) -> nn.Module:
        del whole  # it has no tokens but its patches
        return Projector(self.model.model.multi_modal_projector)

    @property
    def _vision(self) -> Any:
        return self.model.config.vision_config

    @property
    def _factor(self) -> int:
        """Patches of a token along an edge."""
        return int(1 / self.model.config.downsample_ratio)

    def _feature_layer(self) -> int:
        """How many encoder layers run: hidden_states[0] is the embedding, [i] comes out of the i-th layer."""
        layer, count = self.model.config.vision_feature_layer, self._vision.num_hidden_layers
        number = layer if layer >= 0 else count + 1 + layer
        if not 1 <= number <= count:
            raise VtpError(f"vision_feature_layer {layer} is not one of the tower's {count} layers")
        return number


class _Layer(nn.Module):
    """A tower's layer with the names that `VisionEncoder` knows."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    @property
    def self_attn(self) -> nn.Module:
        """The attention: not registered a second time, or tracing would take it for another module."""
        return self.layer.attention

    def forward(self, hidden: Tensor, mask: None) -> Tensor:
        del mask
        return self.layer(hidden)


FAMILY = InternVL
