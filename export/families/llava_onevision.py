"""LLaVA-OneVision: LLaVA-NeXT's tiles with a SigLIP tower and a Qwen2 decoder; one picture.

Source: transformers' modeling_llava_onevision.py. It differs from LLaVA-NeXT in one place: beyond
`anyres_max_9`, that is when the parts hold more than 1.21 x 9 times the patches of one view, it shrinks the
parts' grid by bilinear resampling. Image sizes of that kind are refused.
"""

from __future__ import annotations

import math
import re

from vtp.engines import UsageError, VtpError
from vtp.export.families.llava_next import LlavaNext
from vtp.runtime.preprocess import ImageSpec


class LlavaOnevision(LlavaNext):
    """LlavaOnevisionForConditionalGeneration."""

    name = "llava_onevision"
    architectures = ("LlavaOnevisionForConditionalGeneration",)
    several = False  # its processor does not tile the pictures of a prompt that has more than one
    limits = (
        "as llava_next; one picture per prompt, since its processor tiles no more than one; no image size "
        "that the model would resample (anyres_max_9); no video"
    )

    def prepare(self, image: ImageSpec) -> None:
        super().prepare(image)
        named = re.fullmatch(r"anyres_max_(\d+)", self.model.config.vision_aspect_ratio)
        if named is None:
            raise VtpError(
                f"vision_aspect_ratio '{self.model.config.vision_aspect_ratio}' is not supported; "
                "supported: anyres_max_N"
            )
        most, packing = int(named[1]), self.packing
        patches = len(packing.rows) * len(packing.columns)
        if math.sqrt(patches / (most * packing.side**2)) > 1.1:
            raise UsageError(
                f"image size {image.image_size[1]}x{image.image_size[0]} gives {patches} patches beside the "
                f"whole picture's {packing.side**2}, which this model would resample ({named[0]}); choose a "
                "smaller image size"
            )


FAMILY = LlavaOnevision
