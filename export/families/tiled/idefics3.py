"""Idefics3: a SigLIP tower on tiles, factor x factor patches to a token, and every tile named in the prompt.

Source: transformers' modeling_idefics3.py and processing_idefics3.py (Laurençon et al., arXiv 2408.12637).
The parts of a picture, then the picture as a whole go through the tower one by one. In the prompt a mark says
which part the tokens behind it show; marks are text, and whatever is pruned, they stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtp.engines import VtpError
from vtp.export.families.tiled.marked import MarkedViews
from vtp.export.families.tiled.reference import Idefics3Reference
from vtp.export.families.tiled.shuffle import ShuffledEncoder
from vtp.export.families.tiles import TILED, UNREUSED_TILES, Tile, equal_tiles
from vtp.export.graphs.decoder import Decoder
from vtp.export.graphs.encoder import Projector, VisionEncoder
from vtp.export.towers.base import TowerShape
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.idefics3 import Idefics3Spec


class Idefics3(MarkedViews):
    """Idefics3ForConditionalGeneration."""

    name = "idefics3"
    architectures = ("Idefics3ForConditionalGeneration",)
    sites = ("vision", "projector", "decoder")
    several = True
    limits = (
        "one image size per bundle; K is for the whole picture, dealt to tiles with --share tile; tile "
        "separators are never pruned; methods that need a grid only at one tile or with --share tile; no "
        "video"
    )
    reductions = ("ipcv", "tome")
    unreduced = "a smaller --image-size gives it fewer tiles"
    unreused = UNREUSED_TILES
    image_kinds = ("idefics3",)
    reference = Idefics3Reference

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        cls.check_decoder((config.get("text_config") or {}).get("model_type", "llama"))
        vision = config.get("vision_config") or {}
        for name in ("image_size", "patch_size"):
            if not isinstance(vision.get(name, 1), int):
                raise VtpError(f"vision_config.{name} is {vision[name]!r}; only a whole number is supported")

    def prepare(self, image: ImageSpec) -> None:
        assert isinstance(image, Idefics3Spec)  # see image_kinds
        self._tiles = image.tiles
        self._views = image.views
        if self._views > 1:
            self.lacks = TILED
        if self._side % self._factor:
            raise VtpError(f"{self._side} patches along an edge are not whole tokens of {self._factor}")

    def read_marks(self, tokenizer: Any) -> None:
        self.read_block(tokenizer, self._block(tokenizer))

    def _block(self, tokenizer: Any) -> str:
        """transformers' prompt of one picture, with one image token for a tile's many."""
        fake = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
        whole = fake + getattr(tokenizer, "global_image_token", "<global-img>")
        image = tokenizer.convert_ids_to_tokens(self.image_token_id)
        rows = [
            "".join(f"{fake}<row_{row + 1}_col_{column + 1}>{image}" for column in range(self._tiles[1]))
            for row in range(self._tiles[0] if self._views > 1 else 0)
        ]
        return "".join(f"{row}\n" for row in rows) + ("\n" if rows else "") + whole + image + fake

    @property
    def views(self) -> int:
        return self._views

    @property
    def view_tokens(self) -> Sequence[int]:
        return [(self._side // self._factor) ** 2] * self._views

    @property
    def apart(self) -> bool:
        return self._views > 1

    @property
    def grid(self) -> tuple[int, int]:
        side = self._side // self._factor
        return (side, side) if self._views == 1 else (1, self._views * side * side)

    @property
    def tiles(self) -> Sequence[Tile]:
        side = self._side // self._factor
        return equal_tiles(self._views, (side, side))

    @property
    def image_size(self) -> tuple[int, int]:
        return self._vision.image_size, self._vision.image_size

    @property
    def feature_width(self) -> int:
        return self._vision.hidden_size * self._factor**2

    @property
    def tower_shape(self) -> TowerShape:
        return TowerShape(self._side**2, len(self.tower.encoder.layers), False)

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.model.model.text_model, self.model.lm_head)

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def tower(self) -> Any:
        return self.model.model.vision_model

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        embed, norm = _Patches(self.tower.embeddings), self.tower.post_layernorm
        layers = list(self.tower.encoder.layers)
        encoder = VisionEncoder(embed, layers, False, cues, norm, self.row_reduction)
        return ShuffledEncoder(encoder, cues, self._factor, self._views == 1)

    def projector(self, whole: bool) -> nn.Module:
        del whole  # it has no tokens but its patches
        return Projector(self.model.model.connector.modality_projection)

    @property
    def _vision(self) -> Any:
        return self.model.config.vision_config

    @property
    def _side(self) -> int:
        """Patches along an edge of a tile."""
        return self._vision.image_size // self._vision.patch_size

    @property
    def _factor(self) -> int:
        """Patches of a token along an edge."""
        return self.model.config.scale_factor


class _Patches(nn.Module):
    """pixel_values [V,3,H,W] -> [V,n,C]: patches with the positions that they have in a whole tile."""

    numbers: Tensor

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.patches, self.positions = embeddings.patch_embedding, embeddings.position_embedding
        numbers = position_numbers(embeddings.num_patches_per_side)
        self.register_buffer("numbers", numbers, persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.patches(pixel_values).flatten(2).transpose(1, 2) + self.positions(self.numbers)


def position_numbers(side: int) -> Tensor:
    """int64 [side²]: the learned position of every patch of a tile that nothing is padding in.

    transformers finds them by comparing fractions in float32, where neighbours may fall together.
    """
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    fractions = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor([side]))
    line = torch.bucketize(fractions.clamp(max=1.0 - 1e-6), bounds, right=True)
    return (line.unsqueeze(1) * side + line.unsqueeze(0)).flatten()


FAMILY = Idefics3
