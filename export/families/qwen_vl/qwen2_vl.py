"""Qwen2-VL: a tower that takes a picture's patches at its own size, rotary positions by row and column.

Source: transformers' modeling_qwen2_vl.py (Wang et al., arXiv 2409.12191). Four patches are merged into one
visual token. The merger's norm belongs to the vision encoder and its MLP is the projector, so that a
vision-site method drops tokens before the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vtp.engines import VtpError
from vtp.export.families.base import Family
from vtp.export.families.qwen_vl.positions import GridSplice
from vtp.export.families.qwen_vl.reference import PatchReference
from vtp.export.families.qwen_vl.tower import PatchGrid, PatchTower, TowerParts
from vtp.export.graphs.decoder import Decoder
from vtp.export.graphs.encoder import Projector
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.qwen import QwenSpec


class Qwen2VL(Family):
    """Qwen2VLForConditionalGeneration."""

    name = "qwen2_vl"
    unreduced = "its tower takes patches of any size of picture; choose a smaller --image-size"
    architectures = ("Qwen2VLForConditionalGeneration",)
    sites = ("vision", "projector", "decoder")
    several = True
    limits = "one image size per bundle; kept tokens keep their positions; no video"
    image_kinds = ("qwen",)
    positions = ("original",)
    reference = PatchReference
    picture: PatchGrid
    size: tuple[int, int]

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        del (
            config
        )  # what the family lacks shows in the loaded config alone: older files are laid out otherwise

    def prepare(self, image: ImageSpec) -> None:
        """Check that the processor cuts patches as the tower takes them, and count them."""
        assert isinstance(image, QwenSpec)  # see image_kinds
        vision = self._vision
        for name, side in (
            ("patch_size", image.patch_size),
            ("temporal_patch_size", image.temporal_patch_size),
            ("merge_size", image.merge_size),
        ):
            own = getattr(vision, "spatial_merge_size" if name == "merge_size" else name)
            if own != side:
                raise VtpError(
                    f"the image processor's {name} is {side}, the vision tower's {own}; "
                    "fix the image processor's settings"
                )
        self.size, patch = image.image_size, vision.patch_size
        self.picture = PatchGrid(self.size[0] // patch, self.size[1] // patch, vision.spatial_merge_size)

    @property
    def grid(self) -> tuple[int, int]:
        return self.picture.merged

    @property
    def image_size(self) -> tuple[int, int]:
        return self.size

    @property
    def patches(self) -> tuple[int, int]:
        vision = self._vision
        return self.picture.count, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    @property
    def feature_width(self) -> int:
        return self.picture.merge**2 * self.tower.patch_embed.embed_dim

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.model.model.language_model, self.model.lm_head, axes=3)

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def tower(self) -> Any:
        return self.model.model.visual

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        return PatchTower(self.tower, self.picture, self.tower_parts(), cues)

    def tower_parts(self) -> TowerParts:
        """What its tower has that other Qwen towers have not."""
        return TowerParts(self.tower.merger.ln_q)

    def projector(self, whole: bool) -> nn.Module:
        del whole  # it has no tokens but its patches
        return Projector(self.tower.merger.mlp)

    def splice(self, positions: str) -> GridSplice:
        del positions  # always the original ones; without a method all tokens come
        return GridSplice(self.placeholders, self.grid)

    @property
    def _vision(self) -> Any:
        return self.model.config.vision_config


FAMILY = Qwen2VL
