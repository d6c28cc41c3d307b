"""Pixtral 12B, in transformers' form a LLaVA with Pixtral's tower: one patch to a token, marks after rows.

Source: transformers' modeling_llava.py, modeling_pixtral.py and processing_pixtral.py (arXiv 2410.07073).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vtp.engines import VtpError
from vtp.export.families.base import DECODERS
from vtp.export.families.pixtral.mistral3 import Mistral3
from vtp.export.families.pixtral.reference import PixtralReference
from vtp.export.graphs.encoder import Projector


class LlavaPixtralReference(PixtralReference):
    """LLaVA's projector, which takes patches as they come."""

    @property
    def edge(self) -> int:
        return 1

    def normed(self, states: Tensor) -> Tensor:
        return states

    def project(self, image_features: Tensor) -> Tensor:
        return self.projector(image_features)


class Pixtral(Mistral3):
    """LlavaForConditionalGeneration with Pixtral's tower."""

    name = "pixtral"
    architectures = ("LlavaForConditionalGeneration",)
    decoders: ClassVar[tuple[str, ...]] = DECODERS
    reference = LlavaPixtralReference
    limits = "a LLaVA with Pixtral's tower; else as mistral3"

    @classmethod
    def takes(cls, config: dict[str, Any]) -> bool:
        vision = config.get("vision_config")
        return isinstance(vision, dict) and vision.get("model_type") == "pixtral"

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        """VtpError for what Mistral3's refuses, and for a strategy that would cut a CLS off."""
        super().check(config)
        if config.get("vision_feature_select_strategy") != "full":
            raise VtpError("a Pixtral tower has no CLS; vision_feature_select_strategy must be 'full'")

    def projector(self, whole: bool) -> nn.Module:
        del whole  # it has no tokens but its patches
        return Projector(self.model.model.multi_modal_projector)

    @property
    def _norm(self) -> nn.Module:
        return nn.Identity()

    @property
    def _edge(self) -> int:
        return 1


FAMILY = Pixtral
