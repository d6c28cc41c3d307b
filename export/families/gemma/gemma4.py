"""Gemma 4: patches of any size of picture, squares of them as tokens, a decoder with windows.

Source: transformers' modeling_gemma4.py and processing_gemma4.py. Its processor knows budgets of 70 to 1120
visual tokens; a bundle has one image size, which goes with one of them. In larger models the visual tokens of
a picture see one another in the layers with a window, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vtp.engines import VtpError
from vtp.export.checkpoint.weights import source_of
from vtp.export.families.base import Family, marks_of
from vtp.export.families.gemma.gemma4_decoder import Gemma4Decoder
from vtp.export.families.gemma.gemma4_reference import Gemma4Reference
from vtp.export.families.gemma.gemma4_tower import Gemma4Projector, Gemma4Tower
from vtp.export.families.gemma.lookahead import LookaheadPruner, LookaheadSplice
from vtp.export.graphs.pruner import DecoderPruner
from vtp.export.graphs.splice import Splice
from vtp.export.pruners.base import Pruner
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.gemma4 import Gemma4Spec

_MARKS = ("boi_token", "eoi_token")


class Gemma4(Family):
    """Gemma4ForConditionalGeneration."""

    name = "gemma4"
    architectures = ("Gemma4ForConditionalGeneration",)
    sites = ("vision", "projector", "decoder")
    several = True
    decoders = ("gemma4_text",)
    image_kinds = ("gemma4",)
    reference = Gemma4Reference
    unreduced = "its tower takes patches of any size of picture; choose a smaller --image-size"
    limits = (
        "one image size per bundle, with the token budget that it goes with; no experts (26B-A4B), audio or "
        "video; decoder sites before layers that share keys and values; attention in single operators "
        "without --oldest-onnxruntime 1.30, and with it in layers that read others' keys"
    )
    picture: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        """VtpError for a decoder that is not served, and for a model without eyes."""
        text, vision = config.get("text_config") or {}, config.get("vision_config")
        cls.check_decoder(text.get("model_type", cls.decoders[0]))
        if vision is None:
            raise VtpError("this Gemma 4 has no vision tower: vision_config of its config.json is missing")
        if text.get("enable_moe_block"):
            raise VtpError(
                "this Gemma 4 has experts (text_config.enable_moe_block), and no graph is written yet that "
                "runs a token's own experts alone; only models without them are supported"
            )
        if text.get("use_bidirectional_attention") not in (None, "vision"):
            raise VtpError(
                f"text_config.use_bidirectional_attention is {text['use_bidirectional_attention']!r}; "
                "supported: null and 'vision'"
            )
        heads = vision.get("num_attention_heads", 12)
        if vision.get("num_key_value_heads", 12) != heads:
            raise VtpError(f"vision_config.num_key_value_heads is not its num_attention_heads, {heads}")

    def prepare(self, image: ImageSpec) -> None:
        """Check that the processor cuts patches as the tower takes them, and count them."""
        assert isinstance(image, Gemma4Spec)  # see image_kinds
        vision = self._vision
        for name, given, own in (
            ("patch_size", image.patch_size, vision.patch_size),
            ("pooling_kernel_size", image.pooling_size, vision.pooling_kernel_size),
        ):
            if given != own:
                raise VtpError(
                    f"the image processor's {name} is {given}, the vision tower's {own}; fix the image "
                    "processor's settings"
                )
        self.size = image.image_size
        self.picture = self.size[0] // vision.patch_size, self.size[1] // vision.patch_size
        if max(self.picture) > vision.position_embedding_size:
            raise VtpError(f"the vision tower knows {vision.position_embedding_size} places along an edge")
        if vision.num_attention_heads * vision.head_dim != vision.hidden_size:
            self.lacks = {"vision_keys": "its tower's keys are not as wide as its features"}

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = (edge // self._vision.pooling_kernel_size for edge in self.picture)
        return rows, columns

    @property
    def image_size(self) -> tuple[int, int]:
        return self.size

    @property
    def patches(self) -> tuple[int, int]:
        return self.picture[0] * self.picture[1], 3 * self._vision.patch_size**2

    @property
    def feature_width(self) -> int:
        return self._vision.hidden_size

    @property
    def decoder(self) -> Gemma4Decoder:
        """Its layers: windows, keys and values that later layers share, logits bent by a soft cap."""
        text = self.model.model.language_model
        return Gemma4Decoder(
            text,
            self.model.lm_head,
            mask_kind="image" if self._looks_ahead else "causal",
            windows=True,
            near=True,
            softcap=text.config.final_logit_softcapping,
            image=self.image_token_id,
        )

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
        return Gemma4Tower(self.tower, self.picture, cues)

    def projector(self, whole: bool) -> nn.Module:
        del whole  # it has no tokens but its pooled patches
        return Gemma4Projector(self.model.model.embed_vision, self._padding())

    def splice(self, positions: str) -> Splice:
        kind = LookaheadSplice if self._looks_ahead else Splice
        return kind(self.placeholders, self.grid[0] * self.grid[1], positions)

    def decoder_pruner(self, pruner: Pruner, others: Sequence[str]) -> DecoderPruner:
        kind = LookaheadPruner if self._looks_ahead else DecoderPruner
        return kind(pruner, others, self.widths)

    def _padding(self) -> Tensor | None:
        """What the padding token has in the second table, as a visual token takes it; None without one."""
        text = self.model.model.language_model
        if not text.config.hidden_size_per_layer_input:
            return None
        table, source = text.embed_tokens_per_layer, source_of(text.embed_tokens_per_layer.weight)
        rows = table.weight if source is None else source.view()  # one of gigabytes is wanted
        return rows[text.config.pad_token_id].detach().to(table.weight.dtype) * table.scalar_embed_scale

    @property
    def _looks_ahead(self) -> bool:
        return self.model.config.text_config.use_bidirectional_attention == "vision"

    @property
    def _vision(self) -> Any:
        return self.model.config.vision_config


FAMILY = Gemma4
