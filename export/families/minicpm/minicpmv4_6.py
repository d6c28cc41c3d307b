"""MiniCPM-V 4.6: a SigLIP tower that merges its patches between two blocks, and Qwen3.5's decoder.

Source: transformers' modeling_minicpmv4_6.py and processing_minicpmv4_6.py. Two by two patches become one
behind a block of the tower, by attention within each four and an MLP; two by two of these become one visual
token in front of the projector. In the prompt a picture's number stands in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vtp.engines import VtpError
from vtp.export.families.base import Family, marks_of
from vtp.export.families.minicpm.reference import MiniCPMReference
from vtp.export.families.minicpm.tower import FACTOR, MergerMlp, MergingTower
from vtp.export.families.qwen_vl.qwen3_5 import LIMITS, delta_states
from vtp.export.graphs.decoder import Decoder
from vtp.export.graphs.encoder import Projector
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.navit import NavitSpec

_MARKS = ("image_id_start_token", "image_id_end_token", "image_start_token", "image_end_token")
# Keys of config.json that say how patches are merged -> the only value served.
_MERGING: dict[str, Any] = {"downsample_mode": "16x", "merge_kernel_size": [2, 2], "merger_times": 1}


class MiniCPMV4_6(Family):
    """MiniCPMV4_6ForConditionalGeneration."""

    name = "minicpmv4_6"
    architectures = ("MiniCPMV4_6ForConditionalGeneration",)
    sites = ("vision", "projector", "decoder")
    decoders = ("qwen3_5_text",)
    limits = (
        "one image size per bundle, seen in one piece, without slices; one picture per prompt, since its "
        f"number is among the marks around it; {LIMITS}; no video"
    )
    unreduced = "its tower merges patches between two of its blocks"
    image_kinds = ("navit",)
    reference = MiniCPMReference
    size: tuple[int, int]

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
        assert isinstance(image, NavitSpec)  # see image_kinds
        if image.patch_size != self._vision.patch_size:
            raise VtpError(
                f"the image processor's patch_size is {image.patch_size}, the vision tower's "
                f"{self._vision.patch_size}; fix the image processor's settings"
            )
        self.size = image.image_size

    def read_marks(self, tokenizer: Any) -> None:
        number, over, start, end = marks_of(tokenizer, _MARKS)
        image = tokenizer.convert_ids_to_tokens(self.image_token_id)
        block = tokenizer(f"{number}0{over}{start}{image}{end}", add_special_tokens=False)["input_ids"]
        self._ids = [int(one) for one in block]
        if self._ids.count(self.image_token_id) != 1:
            raise VtpError(f"the tokenizer does not know {image}; fix tokenizer_config.json")

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self._patch_rows
        return rows // FACTOR**2, columns // FACTOR**2

    @property
    def image_size(self) -> tuple[int, int]:
        return self.size

    @property
    def patches(self) -> tuple[int, int]:
        (rows, columns), vision = self._patch_rows, self._vision
        return rows * columns, vision.num_channels * vision.patch_size**2

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
    def placeholder_ids(self) -> list[int]:
        return self._ids

    @property
    def tower(self) -> Any:
        return self.model.model.vision_tower

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        return MergingTower(self.tower, self._patch_rows, cues)

    def projector(self, whole: bool) -> nn.Module:
        del whole  # it has no tokens but its patches
        return Projector(MergerMlp(self.model.model.merger.mlp[0]))

    @property
    def _vision(self) -> Any:
        return self.model.config.vision_config

    @property
    def _patch_rows(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.size[0] // self._vision.patch_size, self.size[1] // self._vision.patch_size


FAMILY = MiniCPMV4_6
