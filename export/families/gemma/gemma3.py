"""Gemma 3: PaliGemma's tower, patches pooled to 256 tokens, a decoder with windows and two rotary embeddings.

Source: transformers' modeling_gemma3.py and processing_gemma3.py (arXiv 2503.19786). The visual tokens of a
picture see one another; text is read from left to right. What a method chooses from are the pooled patches:
what the tower gives, its scores and its keys are means over the patches that make one token. The processor
puts line ends and markers around a picture before the text is tokenized, so that line ends join.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from vtp.engines import VtpError
from vtp.export.families.gemma.lookahead import LookaheadPruner, LookaheadSplice
from vtp.export.families.gemma.paligemma import PaliGemma
from vtp.export.families.gemma.reference import Gemma3Reference
from vtp.export.graphs.decoder import Decoder
from vtp.export.graphs.encoder import PooledEncoder
from vtp.export.graphs.splice import Splice
from vtp.export.pruners.base import Pruner


class Gemma3(PaliGemma):
    """Gemma3ForConditionalGeneration."""

    name = "gemma3"
    architectures = ("Gemma3ForConditionalGeneration",)
    reductions = ("ipcv", "tome")
    unreduced = "its projector pools a whole tower's patches"
    unreused = "what it keeps of a picture's 4,096 patches would take 2 GB"
    decoders = ("gemma3_text",)
    limits = "without pan and scan; attention in single operators without --oldest-onnxruntime 1.30"
    reference = Gemma3Reference
    template = None

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        super().check(config)
        if (config.get("text_config") or {}).get("use_bidirectional_attention"):
            raise VtpError(
                "text_config sets use_bidirectional_attention; only text read in order is supported"
            )

    @property
    def grid(self) -> tuple[int, int]:
        side = self._projector.tokens_per_side
        return side, side

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.model.model.language_model, self.model.lm_head, mask_kind="image", windows=True)

    def image_text(self, token: Callable[[int], str]) -> tuple[str, str]:
        config = self.model.config
        begin, end, soft = (
            token(number) for number in (config.boi_token_index, config.eoi_token_index, self.image_token_id)
        )
        return begin, f"\n\n{begin}{soft}{end}\n\n"

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        projector = self._projector
        return PooledEncoder(super().vision_encoder(cues), projector.tokens_per_side, projector.kernel_size)

    def projector(self, whole: bool) -> nn.Module:
        del whole  # it has no tokens but its pooled patches
        return _Projector(self._projector)

    def splice(self, positions: str) -> Splice:
        return LookaheadSplice(self.placeholders, self.grid[0] * self.grid[1], positions)

    def decoder_pruner(self, pruner: Pruner, others: Sequence[str]) -> LookaheadPruner:
        return LookaheadPruner(pruner, others)

    @property
    def _projector(self) -> Any:
        return self.model.model.multi_modal_projector


class _Projector(nn.Module):
    """The model's projector after its pooling: image_features [B,M,C] -> image_embeds [B,M,D]."""

    def __init__(self, projector: Any) -> None:
        super().__init__()
        self.norm = projector.mm_soft_emb_norm
        self.weight = projector.mm_input_projection_weight

    def forward(self, image_features: Tensor) -> Tensor:
        return (self.norm(image_features) @ self.weight).type_as(image_features)


FAMILY = Gemma3
