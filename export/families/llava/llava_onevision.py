"""LLaVA-OneVision: LLaVA-NeXT's tiles with a SigLIP tower and a Qwen2 decoder; one picture, or one video.

Source: transformers' modeling_llava_onevision.py. It differs from LLaVA-NeXT in one place: beyond
`anyres_max_9`, that is when the parts hold more than 1.21 x 9 times the patches of one view, it shrinks the
parts' grid by bilinear resampling. Image sizes of that kind are refused. The frames of a video are not
tiled; their projected patches are shrunk to half the rows and columns, and one `image_newline` ends the clip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtp.engines import UsageError, VtpError
from vtp.export.families.llava.clips import Clips
from vtp.export.families.llava.llava_next import LlavaNext
from vtp.export.families.reference import FrameReference
from vtp.export.graphs.frames import Frames, PoolingProjector
from vtp.runtime.preprocess import ImageSpec


class ClipReference(FrameReference):
    """Projected patches are pooled frame by frame."""

    def project(self, image_features: Tensor) -> Tensor:
        vision = self.model.config.vision_config
        frames = image_features.reshape(
            -1, (vision.image_size // vision.patch_size) ** 2, image_features.shape[-1]
        )
        pooled = self.model.model.apply_pooling(super().project(frames))
        return pooled.flatten(0, 1).unsqueeze(0)

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        clip = pixel_values.to(self.model.dtype).unsqueeze(0)
        tokens = self.model.model.get_video_features(clip, return_dict=True).pooler_output
        return tokens, torch.arange(patches.shape[1])  # the end of the line comes last


class LlavaOnevisionClips(Clips):
    """LlavaOnevisionForConditionalGeneration for videos."""

    name = "llava_onevision"
    architectures = ("LlavaOnevisionForConditionalGeneration",)
    sites = ("projector", "decoder")
    reference = ClipReference

    def prepare(self, image: ImageSpec) -> None:
        half = math.ceil(self.seen[0] / 2)
        self.frames = Frames(image.frames or 1, (half, half), after=1)

    @property
    def pooled(self) -> int:
        return self.frames.count * self.seen[0] * self.seen[1]

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        if cues:
            raise UsageError(
                f"this method needs {', '.join(cues)} of the vision tower, which family {self.name} does not "
                "have for videos: their tokens are pooled from several patches"
            )
        return super().vision_encoder(())

    def projector(self, whole: bool) -> nn.Module:
        line_end = self.model.model.image_newline if whole else None
        return PoolingProjector(super().projector(whole), self.seen[0], self.frames.grid[0], line_end)


class LlavaOnevision(LlavaNext):
    """LlavaOnevisionForConditionalGeneration."""

    name = "llava_onevision"
    architectures = ("LlavaOnevisionForConditionalGeneration",)
    several = False  # its processor does not tile the pictures of a prompt that has more than one
    limits = (
        "as llava_next; one picture per prompt, since its processor tiles no more than one; no image size "
        "that the model would resample (anyres_max_9); with --frames one video, at projector and decoder "
        "sites, K for all frames together"
    )
    clips = LlavaOnevisionClips

    def prepare(self, image: ImageSpec) -> None:
        """Refuse settings other than "anyres_max_N", and sizes that transformers would resample."""
        super().prepare(image)
        named = re.fullmatch(r"anyres_max_(\d+)", self.model.config.vision_aspect_ratio)
        if named is None:
            raise VtpError(
                f"vision_aspect_ratio '{self.model.config.vision_aspect_ratio}' is not supported; "
                "supported: anyres_max_N"
            )
        most, packing = int(named[1]), self.packing
        height, width = packing.image_size
        patches = len(packing.rows) * len(packing.columns)
        if math.sqrt(patches / (most * packing.side**2)) > 1.1:
            raise UsageError(
                f"image size {width}x{height} gives {patches} patches beside the "
                f"whole picture's {packing.side**2}, which this model would resample ({named[0]}); choose a "
                "smaller image size"
            )


FAMILY = LlavaOnevision
