"""MiniCPM-V 4.6: a SigLIP tower that merges its patches between two blocks, and Qwen3.5's decoder.

Source: transformers' modeling_minicpmv4_6.py and processing_minicpmv4_6.py. Two by two patches become one
behind a block of the tower, by attention within each four and an MLP; two by two of these become one visual
token in front of the projector. In the prompt a picture's number stands in front of it; a large picture is
shown as a whole, then in slices, with marks around each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vtp.engines import VtpError
from vtp.export.families.base import marks_of
from vtp.export.families.minicpm.reference import MiniCPMReference
from vtp.export.families.minicpm.tower import FACTOR, MergerMlp, MergingTower
from vtp.export.families.qwen_vl.qwen3_5 import LIMITS, delta_states
from vtp.export.families.tiled.marked import UnlikeViews
from vtp.export.families.tiles import TILED
from vtp.export.graphs.decoder import Decoder
from vtp.export.graphs.encoder import Projector
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.navit import NavitSlicesSpec, NavitSpec

_SLICE_MARKS = ("slice_start_token", "slice_end_token")
_MARKS = ("image_id_start_token", "image_id_end_token", "image_start_token", "image_end_token")
# Keys of config.json that say how patches are merged -> the only value served.
_MERGING: dict[str, Any] = {"downsample_mode": "16x", "merge_kernel_size": [2, 2], "merger_times": 1}


class MiniCPMV4_6(UnlikeViews):
    """MiniCPMV4_6ForConditionalGeneration."""

    name = "minicpmv4_6"
    architectures = ("MiniCPMV4_6ForConditionalGeneration",)
    sites = ("vision", "projector", "decoder")
    decoders = ("qwen3_5_text",)
    limits = (
        "one image size per bundle: by default one that is seen in one piece, in slices where the processor "
        "cuts a picture of that size; K is for the whole picture, dealt to slices with --share tile; slice "
        "separators are never pruned; methods that need a grid only in one piece or with --share tile; one "
        f"picture per prompt, since its number is among the marks around it; {LIMITS}; no video"
    )
    unreduced = "its tower merges patches between two of its blocks"
    image_kinds = ("navit", "navit_slices")
    reference = MiniCPMReference
    _slices: tuple[int, int] | None = None  # (rows, columns) of the slices of a picture; None: one piece

    @classmethod
    def check(cls, config: dict[str, Any]) -> None:
        """VtpError for a decoder, or a way to merge patches, that is not served."""
        cls.check_decoder((config.get("text_config") or {}).get("model_type", "qwen3_5_text"))
        vision = config.get("vision_config") or {}
        said = {**config, "window_kernel_size": vision.get("window_kernel_size", [2, 2])}
        for key, served in {**_MERGING, "window_kernel_size": [2, 2]}.items():
            if said.get(key, served) != served:
                raise VtpError(f"{key} is {said[key]!r}; supported: {served!r}")

        blocks, insert = vision.get("num_hidden_layers") or 12, config.get("insert_layer_id", 6)
        if type(insert) is not int or not 0 <= insert < blocks:
            raise VtpError(f"insert_layer_id is {insert!r}; it must be one of the tower's {blocks} blocks")

    def prepare(self, image: ImageSpec) -> None:
        """Check that the processor cuts patches as the tower takes them."""
        assert isinstance(image, NavitSpec | NavitSlicesSpec)  # see image_kinds
        if image.patch_size != self._vision.patch_size:
            raise VtpError(
                f"the image processor's patch_size is {image.patch_size}, the vision tower's "
                f"{self._vision.patch_size}; fix the image processor's settings"
            )
        self.size, self._grids = image.fixed_size, image.view_grids
        if isinstance(image, NavitSlicesSpec):
            self._slices, self.lacks = image.layout.grid, TILED

    def read_marks(self, tokenizer: Any) -> None:
        number, over, start, end = marks_of(tokenizer, _MARKS)
        image = tokenizer.convert_ids_to_tokens(self.image_token_id)
        block = f"{number}0{over}{start}{image}{end}"
        if self._slices is not None:
            one, other = marks_of(tokenizer, _SLICE_MARKS)
            rows, columns = self._slices
            block += "\n".join([f"{one}{image}{other}" * columns] * rows)
        self.read_block(tokenizer, block)

    @property
    def patches(self) -> tuple[int, int]:
        count, vision = sum(rows * columns for rows, columns in self._grids), self._vision
        return count, vision.num_channels * vision.patch_size**2

    @property
    def feature_width(self) -> int:
        return self._vision.hidden_size * FACTOR**2

    @property
    def decoder(self) -> Decoder:
        text = self.model.model.language_model
        return Decoder(text, self.model.lm_head, states=delta_states(text.config))

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def tower(self) -> Any:
        return self.model.model.vision_tower

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        return MergingTower(self.tower, self._grids, cues)

    def projector(self, whole: bool) -> nn.Module:
        del whole  # it has no tokens but its patches
        return Projector(MergerMlp(self.model.model.merger.mlp[0]))

    @property
    def _vision(self) -> Any:
        return self.model.config.vision_config

    @property
    def token_edge(self) -> int:
        return FACTOR**2


FAMILY = MiniCPMV4_6
