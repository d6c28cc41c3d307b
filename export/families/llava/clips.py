"""What families share that answer about videos through LLaVA's tower: frames, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor, nn

from vtp.export.families.llava.llava import Llava
from vtp.export.graphs.frames import Frames, FramesEncoder


class Clips(Llava):
    """Videos of F frames. A family says in `prepare` what its `layout` is."""

    several = False
    lacks = MappingProxyType({"grid": "its tokens lie in several frames"})
    media = "video"
    reductions: ClassVar[tuple[str, ...]] = ("ipcv", "tome")
    unreused = "it is for single pictures of a camera, not for clips"
    frames: Frames

    @property
    def seen(self) -> tuple[int, int]:
        """(rows, columns) of the patches of a frame in the tower."""
        return super().grid

    @property
    def layout(self) -> Frames:
        return self.frames

    @property
    def image_token_id(self) -> int:
        return self.model.config.video_token_id

    @property
    def views(self) -> int:
        return self.frames.count

    @property
    def grid(self) -> tuple[int, int]:
        return 1, self.frames.tokens

    @property
    def patch_grid(self) -> tuple[int, int]:
        return 1, self.frames.patches

    def places(self) -> Tensor:
        return self.frames.places()

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        return FramesEncoder(super().vision_encoder(cues))
