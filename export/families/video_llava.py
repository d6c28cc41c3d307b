"""Video-LLaVA's pictures: LLaVA-1.5 with a tower of its own for pictures beside the one for videos.

Source: transformers' modeling_video_llava.py (Lin et al., arXiv 2311.10122). Both towers share the projector;
the video tower and its frames are not exported.
"""

from __future__ import annotations

from typing import Any

from vtp.export.families.llava import Llava
from vtp.export.seams import Seams


class PictureSeams(Seams):
    """LLaVA-1.5's, with the picture tower."""

    @property
    def tower(self) -> Any:
        return self.model.model.image_tower


class VideoLlava(Llava):
    """VideoLlavaForConditionalGeneration."""

    name = "video_llava"
    architectures = ("VideoLlavaForConditionalGeneration",)
    limits = "pictures only, one per prompt: no video; CLIP or SigLIP tower; one vision_feature_layer"
    several = False
    seams = PictureSeams

    @property
    def tower(self) -> Any:
        return self.model.model.image_tower


FAMILY = VideoLlava
