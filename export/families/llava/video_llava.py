"""Video-LLaVA: LLaVA-1.5 with a tower for pictures, another for the frames of videos, and one projector.

Source: transformers' modeling_video_llava.py (Lin et al., arXiv 2311.10122). A frame's CLS token is one of
its visual tokens, whatever `vision_feature_select_strategy` says; a picture's is not. A bundle answers either
about pictures or about videos, and holds the one tower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtp.export.families.llava.clips import Clips
from vtp.export.families.llava.llava import Llava
from vtp.export.families.reference import FrameReference, Reference
from vtp.export.graphs.frames import Frames, FramesEncoder
from vtp.runtime.preprocess import ImageSpec


class PictureReference(Reference):
    """LLaVA-1.5's, with the picture tower."""

    @property
    def tower(self) -> Any:
        return self.model.model.image_tower


class ClipReference(FrameReference):
    """With the video tower, whose CLS tokens go on."""

    @property
    def tower(self) -> Any:
        return self.model.model.video_tower

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        clip = pixel_values.to(self.model.dtype).unsqueeze(0)
        tokens = self.model.model.get_video_features(clip, return_dict=True).pooler_output  # [F,n,D]
        more = tokens.shape[1] - patches.shape[1] // len(tokens)  # in front of a frame's patches
        places = torch.arange(tokens.shape[0] * tokens.shape[1]).reshape(len(tokens), -1)
        return tokens.flatten(0, 1).unsqueeze(0), places[:, more:].flatten()


class VideoLlavaClips(Clips):
    """VideoLlavaForConditionalGeneration for videos."""

    name = "video_llava"
    architectures = ("VideoLlavaForConditionalGeneration",)
    reference = ClipReference
    reductions = ()
    unreduced = "the CLS rows of a video's frames are visual tokens, too"

    def prepare(self, image: ImageSpec) -> None:
        self.frames = Frames(image.frames or 1, self.seen, before=int(self._has_cls()))

    @property
    def tower(self) -> Any:
        return self.model.model.video_tower

    def whole_encoder(self) -> nn.Module:
        return FramesEncoder(self._encoder((), leave_cls=False))


class VideoLlava(Llava):
    """VideoLlavaForConditionalGeneration."""

    name = "video_llava"
    architectures = ("VideoLlavaForConditionalGeneration",)
    limits = (
        "one picture per prompt or, with --frames, one video; CLIP or SigLIP tower; one "
        "vision_feature_layer; of a video K is for all frames together, vision and projector sites drop the "
        "frames' CLS tokens, and methods that need a grid are refused"
    )
    several = False
    reductions = ("ipcv", "tome")
    reference = PictureReference
    clips = VideoLlavaClips

    @property
    def tower(self) -> Any:
        return self.model.model.image_tower


FAMILY = VideoLlava
