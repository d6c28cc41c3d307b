"""LFM2-VL: a SigLIP 2 tower that takes patches of any grid, and a decoder most of whose layers convolve.

Source: transformers' modeling_lfm2_vl.py, modeling_lfm2.py and modeling_siglip2.py (Liquid AI's LFM2, arXiv
2511.23404; SigLIP 2 with NaFlex, arXiv 2502.14786). Two by two patches of the grid become one visual token in
front of the projector. Layers of the decoder that do not attend carry the last inputs of their convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from vtp.engines import VtpError
from vtp.export.families.base import Family
from vtp.export.families.lfm2.places import resampling
from vtp.export.families.lfm2.reference import Lfm2Reference
from vtp.export.families.qwen_vl.tower import PlaceTable
from vtp.export.families.tiled.shuffle import ShuffledEncoder
from vtp.export.graphs.decoder import Decoder, LayerState
from vtp.export.graphs.encoder import Projector, VisionEncoder
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.naflex import NaflexSpec

CONV = "conv"  # of text_config.layer_types
# The tokenizer's names of the marks around a picture, and what they are if it does not say.
_MARKS = (("image_start_token", "<|image_start|>"), ("image_end_token", "<|image_end|>"))


class Lfm2VL(Family):
    """Lfm2VlForConditionalGeneration."""

    name = "lfm2_vl"
    architectures = ("Lfm2VlForConditionalGeneration",)
    sites = ("vision", "projector", "decoder")
    several = True
    decoders = ("lfm2",)
    limits = (
        "one image size per bundle, seen in one piece, without tiles; decoder methods read attention only in "
        "layers that have it; no prefix caching"
    )
    unreduced = "its tower takes patches of any size of picture; choose a smaller --image-size"
    image_kinds = ("naflex",)
    reference = Lfm2Reference
    size: tuple[int, int]

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        """VtpError for a decoder, tower or kinds of layers that are not served."""
        text, vision = (config.get(f"{name}_config") or {} for name in ("text", "vision"))
        cls.check_decoder(text.get("model_type", "lfm2"))
        if vision.get("model_type", "siglip2_vision_model") != "siglip2_vision_model":
            raise VtpError(
                f"this model's tower is '{vision['model_type']}'; supported towers: siglip2_vision_model"
            )
        factor = config.get("downsample_factor", 2)
        if type(factor) is not int or factor < 1:
            raise VtpError(f"downsample_factor is {factor!r}; it must be a positive whole number")

    def prepare(self, image: ImageSpec) -> None:
        """Check that the processor cuts patches as the tower and the projector take them."""
        assert isinstance(image, NaflexSpec)  # see image_kinds
        for name, side, own in (
            ("encoder_patch_size", image.patch_size, self._vision.patch_size),
            ("downsample_factor", image.merge_size, self._factor),
        ):
            if own != side:
                raise VtpError(
                    f"the image processor's {name} is {side}, the model's {own}; fix the image processor's "
                    "settings"
                )
        self.size = image.image_size

    def read_marks(self, tokenizer: Any) -> None:
        marks = [getattr(tokenizer, name, None) or usual for name, usual in _MARKS]
        self._around = tokenizer.convert_tokens_to_ids(marks)
        if None in self._around or tokenizer.unk_token_id in self._around:
            raise VtpError(f"the tokenizer does not know {' and '.join(marks)}; fix tokenizer_config.json")

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self._patch_rows
        return rows // self._factor, columns // self._factor

    @property
    def image_size(self) -> tuple[int, int]:
        return self.size

    @property
    def patches(self) -> tuple[int, int]:
        (rows, columns), vision = self._patch_rows, self._vision
        return rows * columns, vision.num_channels * vision.patch_size**2

    @property
    def feature_width(self) -> int:
        return self._vision.hidden_size * self._factor**2

    @property
    def decoder(self) -> Decoder:
        """Its layers: those of kind "conv" keep a state [hidden_size, conv_L_cache], the others a cache."""
        text = self.model.model.language_model
        kinds = text.config.layer_types
        layers = tuple(number for number, kind in enumerate(kinds) if kind == CONV)
        state = LayerState(CONV, layers, (text.config.hidden_size, text.config.conv_L_cache))
        return Decoder(
            text,
            self.model.lm_head,
            norm=text.embedding_norm,
            entering="operator_norm",
            states=(state,) if layers else (),
        )

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def placeholder_ids(self) -> list[int]:
        start, end = self._around
        return [start, self.image_token_id, end]

    @property
    def tower(self) -> Any:
        return self.model.model.vision_tower

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        tower = self.tower
        embed = _Patches(tower.embeddings, self._patch_rows)
        encoder = VisionEncoder(embed, list(tower.encoder.layers), False, cues, tower.post_layernorm)
        return ShuffledEncoder(encoder, cues, self._factor, True, self._patch_rows[1])

    def projector(self, whole: bool) -> nn.Module:
        del whole  # it has no tokens but its patches
        return Projector(_Mlp(self.model.model.multi_modal_projector))

    @property
    def _vision(self) -> Any:
        return self.model.config.vision_config

    @property
    def _factor(self) -> int:
        """Patches of a token along an edge."""
        return self.model.config.downsample_factor

    @property
    def _patch_rows(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.size[0] // self._vision.patch_size, self.size[1] // self._vision.patch_size


class _Patches(nn.Module):
    """pixel_values [P,values] -> hidden [1,P,C]: patches embedded, and what is learned of their places."""

    def __init__(self, embeddings: Any, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patch = embeddings.patch_embedding
        side = embeddings.position_embedding_size
        self.places = PlaceTable(embeddings.position_embedding, *resampling(side, grid))

    def forward(self, pixel_values: Tensor) -> Tensor:
        rows = functional.linear(pixel_values, self.patch.weight, self.patch.bias)
        return (rows + self.places().to(rows.dtype)).unsqueeze(0)


class _Mlp(nn.Module):
    """The model's projector behind its pixel shuffle: image_features [B,M,f²·C] -> image_embeds [B,M,D]."""

    def __init__(self, projector: Any) -> None:
        super().__init__()
        self.norm = projector.layer_norm
        self.linear_1, self.act, self.linear_2 = projector.linear_1, projector.act, projector.linear_2

    def forward(self, image_features: Tensor) -> Tensor:
        rows = image_features if self.norm is None else self.norm(image_features)
        return self.linear_2(self.act(self.linear_1(rows)))


FAMILY = Lfm2VL
