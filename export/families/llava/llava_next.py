"""LLaVA-NeXT (LLaVA-1.6): LLaVA's tower and projector, on a picture and on its parts.

Source: transformers' modeling_llava_next.py. The picture as a whole and its parts at a higher resolution go
through the tower one by one. The patches of the parts form one grid, cut to what is not padding, and every
row of it ends with the learned `image_newline`. At one image size that order is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from torch import Tensor, nn

from vtp.engines import VtpError
from vtp.export.families.llava.llava import Llava
from vtp.export.families.llava.tiles import LinesProjector, Views, ViewsEncoder
from vtp.export.families.reference import TiledReference
from vtp.export.families.tiles import UNREUSED_TILES, Tile
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.anyres import AnyresSpec, best_resolution


class LlavaNext(Llava):
    """LlavaNextForConditionalGeneration."""

    name = "llava_next"
    architectures = ("LlavaNextForConditionalGeneration",)
    limits = (
        "one image size per bundle; CLIP or SigLIP tower; K is for the whole picture, dealt to tiles with "
        "--share tile; vision and projector sites drop the ends of lines"
    )
    lacks = MappingProxyType({"grid": "its tokens lie in several tiles"})
    image_kinds = ("anyres",)
    reference = TiledReference
    reductions = ("ipcv", "tome")
    unreduced = "how its tiles are packed depends on their size"
    unreused = UNREUSED_TILES

    def prepare(self, image: ImageSpec) -> None:
        """Note how the tiles of this picture size are packed.

        Raises VtpError if config.json and the image processor choose other tiles for it.
        """
        assert isinstance(image, AnyresSpec)  # see image_kinds
        points = [(point[0], point[1]) for point in self.model.config.image_grid_pinpoints]
        if best_resolution(image.image_size, points) != image.resolution:
            raise VtpError(
                "image_grid_pinpoints of the image processor and of config.json disagree about a picture of "
                f"{image.image_size[1]}x{image.image_size[0]}; fix the image processor's settings"
            )
        self.packing = Views(self.image_size[0] // self._vision.patch_size, image.tiles, image.image_size)

    @property
    def views(self) -> int:
        return self.packing.count

    @property
    def grid(self) -> tuple[int, int]:
        return 1, len(self.packing.lines())

    @property
    def patch_grid(self) -> tuple[int, int]:
        return 1, len(self.packing.order())

    @property
    def tiles(self) -> Sequence[Tile]:
        return self.packing.parts()

    def places(self) -> Tensor:
        return self.packing.places()

    def vision_encoder(self, cues: Sequence[str]) -> nn.Module:
        return ViewsEncoder(super().vision_encoder(cues), self.packing)

    def projector(self, whole: bool) -> nn.Module:
        projector = super().projector(whole)
        return LinesProjector(projector, self.packing, self.model.model.image_newline) if whole else projector


FAMILY = LlavaNext
