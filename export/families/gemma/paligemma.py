"""PaliGemma and PaliGemma 2: a whole SigLIP tower, a linear projector, a Gemma or Gemma 2 decoder.

Source: transformers' modeling_paligemma.py (Beyer et al., arXiv 2407.07726). The prompt, picture and question
alike, is read in both directions; the answer from left to right. Positions count from 1. The processor writes
the `<image>` tokens of all pictures, BOS, the question and a line's end; there is no conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from vtp.engines import VtpError
from vtp.export.families.base import Family
from vtp.export.families.gemma.lookahead import OneBasedSplice
from vtp.export.families.gemma.reference import PaliGemmaReference
from vtp.export.families.reference import Reference
from vtp.export.graphs.decoder import Decoder
from vtp.export.graphs.encoder import Projector, VisionEncoder
from vtp.export.graphs.splice import Splice
from vtp.export.graphs.stream import LaterEncoder, ReferenceEncoder
from vtp.export.towers.base import TowerShape


class PaliGemma(Family):
    """PaliGemmaForConditionalGeneration."""

    name = "paligemma"
    architectures = ("PaliGemmaForConditionalGeneration",)
    sites = ("vision", "projector", "decoder")
    decoders: ClassVar[tuple[str, ...]] = ("gemma", "gemma2")
    several = True
    reductions: ClassVar[tuple[str, ...]] = ("ipcv", "tome", "downsample", "stc")
    limits = (
        "one question, no conversation; a prompt no longer than Gemma 2's window; attention in single "
        "operators without --oldest-onnxruntime 1.30"
    )
    reference: ClassVar[type[Reference]] = PaliGemmaReference
    template: ClassVar[str | None] = (
        "{% if messages | length > 1 %}{{ raise_exception('it takes one question, and no conversation') }}"
        "{% endif %}{% set parts = messages[0]['content'] %}"
        "{% for part in parts if part['type'] == 'image' %}<image>{% endfor %}{{ bos_token }}"
        "{% for part in parts if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ '\\n' }}"
    )

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
        cls.check_decoder(text.get("model_type", cls.decoders[0]))
        tower = vision.get("model_type", "siglip_vision_model")
        if tower != "siglip_vision_model":
            raise VtpError(f"this model's vision tower is '{tower}'; supported towers: siglip_vision_model")

    @property
    def grid(self) -> tuple[int, int]:
        side = self._vision.image_size // self._vision.patch_size
        return side, side

    @property
    def image_size(self) -> tuple[int, int]:
        return self._vision.image_size, self._vision.image_size

    @property
    def feature_width(self) -> int:
        return self._vision.hidden_size

    @property
    def tower_shape(self) -> TowerShape:
        patches = (self._vision.image_size // self._vision.patch_size) ** 2
        return TowerShape(patches, len(self.tower.encoder.layers), False)

    @property
    def decoder(self) -> Decoder:
        softcap = getattr(self.model.config.text_config, "final_logit_softcapping", None)
        return Decoder(
            self.model.model.language_model, self.model.lm_head, mask_kind="prompt", softcap=softcap
        )

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def tower(self) -> Any:
        return self.model.model.vision_tower

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        tower, norm = self.tower, self.tower.post_layernorm
        if self.stream_reuse is not None:
            return ReferenceEncoder(
                tower.embeddings, tower.encoder.layers, False, cues, self.stream_reuse, norm
            )
        return VisionEncoder(tower.embeddings, tower.encoder.layers, False, cues, norm, self.row_reduction)

    def later_encoder(self, cues: Sequence[str]) -> nn.Module:
        assert self.stream_reuse is not None  # or nobody asks
        tower, norm = self.tower, self.tower.post_layernorm
        return LaterEncoder(tower.embeddings, tower.encoder.layers, False, cues, self.stream_reuse, norm)

    def projector(self, whole: bool) -> nn.Module:
        del whole  # it has no tokens but its patches
        return Projector(self.model.model.multi_modal_projector)

    def splice(self, positions: str) -> Splice:
        return OneBasedSplice(self.placeholders, self.grid[0] * self.grid[1], positions)

    @property
    def _vision(self) -> Any:
        return self.model.config.vision_config


FAMILY = PaliGemma
