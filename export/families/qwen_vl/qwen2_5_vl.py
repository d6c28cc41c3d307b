"""Qwen2.5-VL: Qwen2-VL with a tower most of whose blocks attend within windows.

Source: transformers' modeling_qwen2_5_vl.py (Bai et al., arXiv 2502.13923). Windows are laid over the grid of
visual tokens; at one image size they are constant. Released models end with a block that attends to
everything; where one does not, the attention that a token receives is its own window's.
"""

from __future__ import annotations

from vtp.export.families.qwen_vl.qwen2_vl import Qwen2VL
from vtp.export.families.qwen_vl.reference import WindowReference
from vtp.export.families.qwen_vl.tower import TowerParts


class Qwen2_5VL(Qwen2VL):
    """Qwen2_5_VLForConditionalGeneration."""

    name = "qwen2_5_vl"
    unreduced = "most of its tower's blocks attend within windows; choose a smaller --image-size"
    architectures = ("Qwen2_5_VLForConditionalGeneration",)
    reference = WindowReference

    def tower_parts(self) -> TowerParts:
        vision = self._vision
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        return TowerParts(
            self.tower.merger.ln_q,
            windows=self.picture.windows(side),
            whole=tuple(vision.fullatt_block_indexes),
        )


FAMILY = Qwen2_5VL
