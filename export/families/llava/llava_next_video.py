"""LLaVA-NeXT-Video: LLaVA-NeXT's tiles for a picture, pooled frames for a video.

Source: transformers' modeling_llava_next_video.py. The tower's patches of a frame are pooled, 2 x 2 to one,
before they are projected; nothing stands between frames or behind them. What methods choose from are the
pooled patches: features, scores and keys are means over the patches that make one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn
from torch.nn import functional

from vtp.engines import VtpError
from vtp.export.families.llava.clips import Clips
from vtp.export.families.llava.llava import Llava
from vtp.export.families.llava.llava_next import LlavaNext
from vtp.export.families.reference import FrameReference
from vtp.export.graphs.encoder import PooledEncoder
from vtp.export.graphs.frames import Frames, FramesEncoder
from vtp.runtime.preprocess import ImageSpec


class ClipReference(FrameReference):
    """With the model's own pooling, frame by frame."""

    def vision(self, pixel_values: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        cues = super(FrameReference, self).vision(pixel_values, wanted)
        pooled = {name: self._pooled(values) for name, values in cues.items()}
        return {name: values.flatten(0, 1).unsqueeze(0) for name, values in pooled.items()}

    def _pooled(self, values: Tensor) -> Tensor:
        """What every patch of every frame has, [F,n,C] or [F,n]: means over squares of them."""
        if values.dim() == 3:
            return self.model.model.vision_resampler(values)
        side, stride = int(values.shape[1] ** 0.5), self.model.config.spatial_pool_stride
        return functional.avg_pool2d(values.reshape(-1, 1, side, side), stride).flatten(1)

    def tokens(self, pixel_values: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        clip = pixel_values.to(self.model.dtype).unsqueeze(0)
        whole = self.model.model.get_video_features(clip, return_dict=True).pooler_output  # [1,N,D]
        return super().tokens(pixel_values, whole)


class LlavaNextVideoClips(Clips):
    """LlavaNextVideoForConditionalGeneration for videos."""

    name = "llava_next_video"
    architectures = ("LlavaNextVideoForConditionalGeneration",)
    reference = ClipReference

    def prepare(self, image: ImageSpec) -> None:
        mode, stride = self.model.config.spatial_pool_mode, self.model.config.spatial_pool_stride
        if mode != "average" or self.seen[0] % stride:
            raise VtpError(
                f"spatial_pool_mode {mode!r} with stride {stride} over {self.seen[0]} patches is not "
                "supported for videos; supported: 'average' over whole squares"
            )
        self.frames = Frames(image.frames or 1, (self.seen[0] // stride, self.seen[1] // stride))

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        encoder = Llava.vision_encoder(self, cues)
        return FramesEncoder(
            PooledEncoder(encoder, self.frames.grid[0], self.model.config.spatial_pool_stride)
        )


class LlavaNextVideo(LlavaNext):
    """LlavaNextVideoForConditionalGeneration."""

    name = "llava_next_video"
    architectures = ("LlavaNextVideoForConditionalGeneration",)
    limits = (
        "as llava_next; with --frames one video, K for all frames together, and methods that need a grid "
        "are refused"
    )
    clips = LlavaNextVideoClips


FAMILY = LlavaNextVideo
