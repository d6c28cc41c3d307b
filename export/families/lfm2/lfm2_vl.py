"""LFM2-VL: a SigLIP 2 tower that takes patches of any grid, and a decoder most of whose layers convolve.

Source: transformers' modeling_lfm2_vl.py, modeling_lfm2.py and modeling_siglip2.py (Liquid AI's LFM2, arXiv
2511.23404; SigLIP 2 with NaFlex, arXiv 2502.14786), and processing_lfm2_vl.py. Two by two patches of a view
become one visual token in front of the projector. A large picture is shown in tiles, then as a whole, with a
mark in the prompt in front of each. Layers of the decoder that do not attend carry the last inputs of their
convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtp.engines import VtpError
from vtp.export.families.lfm2.places import resampling
from vtp.export.families.lfm2.reference import Lfm2Reference
from vtp.export.families.qwen_vl.tower import PlaceTable
from vtp.export.families.tiled.marked import UnlikeViews
from vtp.export.families.tiled.shuffle import ShuffledEncoder
from vtp.export.families.tiles import TILED
from vtp.export.graphs.decoder import Decoder, LayerState
from vtp.export.graphs.encoder import Projector, VisionEncoder
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.fit import Size
from vtp.runtime.preprocess.naflex import NaflexSpec, NaflexTilesSpec

CONV = "conv"  # of text_config.layer_types
# The tokenizer's names of the marks of a picture, and what they are if it does not say.
_MARKS = (
    *(("image_start_token", "<|image_start|>"), ("image_end_token", "<|image_end|>")),
    ("image_thumbnail_token", "<|img_thumbnail|>"),
)


class Lfm2VL(UnlikeViews):
    """Lfm2VlForConditionalGeneration."""

    name = "lfm2_vl"
    architectures = ("Lfm2VlForConditionalGeneration",)
    sites = ("vision", "projector", "decoder")
    several = True
    decoders = ("lfm2",)
    limits = (
        "one image size per bundle: by default one that is seen in one piece, in tiles where the processor "
        "cuts a picture of that size; K is for the whole picture, dealt to tiles with --share tile; tile "
        "separators are never pruned; methods that need a grid only in one piece or with --share tile; "
        "decoder methods read attention only in layers that have it; no prefix caching"
    )
    unreduced = "its tower takes patches of any size of picture; choose a smaller --image-size"
    image_kinds = ("naflex", "naflex_tiles")
    reference = Lfm2Reference
    _tiles: Size | None = None  # (rows, columns) of the tiles of a picture; None: one piece

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
        assert isinstance(image, NaflexSpec | NaflexTilesSpec)  # see image_kinds
        for name, side, own in (
            ("encoder_patch_size", image.patch_size, self._vision.patch_size),
            ("downsample_factor", image.merge_size, self._factor),
        ):
            if own != side:
                raise VtpError(
                    f"the image processor's {name} is {side}, the model's {own}; fix the image processor's "
                    "settings"
                )
        self.size, self._grids = image.fixed_size, image.view_grids
        if isinstance(image, NaflexTilesSpec):
            self._tiles, self.lacks = image.layout.grid, TILED

    def read_marks(self, tokenizer: Any) -> None:
        start, end, whole = (getattr(tokenizer, name, None) or usual for name, usual in _MARKS)
        marks = [""] if self._tiles is None else _marks_of_tiles(self._tiles, whole)[: len(self._grids)]
        needed = [start, *filter(None, marks), end]
        known = dict(zip(needed, tokenizer.convert_tokens_to_ids(needed), strict=True))
        if missing := [mark for mark in needed if known[mark] in (None, tokenizer.unk_token_id)]:
            named = ", ".join(missing[:3])
            raise VtpError(f"the tokenizer does not know {named}; fix tokenizer_config.json")
        image = tokenizer.convert_ids_to_tokens(self.image_token_id)
        self.read_block(tokenizer, start + "".join(mark + image for mark in marks) + end)

    @property
    def patches(self) -> tuple[int, int]:
        vision = self._vision
        return sum(map(_product, self._grids)), vision.num_channels * vision.patch_size**2

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
    def tower(self) -> Any:
        return self.model.model.vision_tower

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        tower = self.tower
        embed = _Patches(tower.embeddings, self._grids)
        views = [] if self._tiles is None else [_product(grid) for grid in self._grids]
        layers = list(tower.encoder.layers)
        encoder = VisionEncoder(embed, layers, False, cues, tower.post_layernorm, views=views)
        return ShuffledEncoder(encoder, cues, self._factor, True, self._grids)

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
    def token_edge(self) -> int:
        return self._factor


def _marks_of_tiles(tiles: Size, whole: str) -> list[str]:
    """What stands in front of the tokens of every tile, and of the picture as a whole."""
    rows, columns = (range(1, count + 1) for count in tiles)
    return [*(f"<|img_row_{row}_col_{column}|>" for row in rows for column in columns), whole]


def _product(grid: Size) -> int:
    return grid[0] * grid[1]


class _Patches(nn.Module):
    """pixel_values [P,values] -> hidden [1,P,C]: patches embedded, and what is learned of their places.

    The patches of views lie one view after another; `grids` are their (rows, columns).
    """

    def __init__(self, embeddings: Any, grids: Sequence[Size]) -> None:
        super().__init__()
        self.patch = embeddings.patch_embedding
        self.alike = [(grid, len(list(views))) for grid, views in groupby(grids)]
        taps, weights = resampling(embeddings.position_embedding_size, [grid for grid, _ in self.alike])
        self.places = PlaceTable(embeddings.position_embedding, taps, weights)

    def forward(self, pixel_values: Tensor) -> Tensor:
        rows = functional.linear(pixel_values, self.patch.weight, self.patch.bias)
        parts = rows.split([_product(grid) * views for grid, views in self.alike])
        places = self.places().to(rows.dtype).split([_product(grid) for grid, _ in self.alike])
        placed = [
            (part.reshape(views, *place.shape) + place).flatten(0, 1)
            for part, place, (_, views) in zip(parts, places, self.alike, strict=True)
        ]
        return torch.cat(placed).unsqueeze(0)


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
