"""downsample: the picture at a smaller size, with the tower's positions resampled to it.

The baseline that a pruning method must beat (VTC-Bench, arXiv 2510.07143: a smaller picture beats many of
them). For towers that were trained at one size, CLIP and SigLIP: their learned positions are interpolated as
transformers' `interpolate_pos_encoding` does it, bicubic, CLS' apart. The model then has fewer visual tokens,
and a method chooses among these.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtp.export.towers.base import TowerReduction, TowerShape
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.clip import ClipSpec

_WHOLE_EDGE = 336


class Downsample(TowerReduction):
    """size, pixels along an edge of the picture that the tower is given."""

    name = "downsample"
    paper = "arXiv 2510.07143"
    main = "size"
    options: ClassVar[dict[str, Any]] = {"size": 224}

    @classmethod
    def left(cls, count: int) -> int:
        """Of CLIP's 336 pixels an edge, as LLaVA-1.5 has them with 576 tokens: 256 at 224."""
        return count * cls.options["size"] ** 2 // _WHOLE_EDGE**2

    def check_settings(self) -> None:
        if self.settings["size"] < 1:
            raise self.wrong("size", "choose a picture's edge in pixels")

    def check(self, shape: TowerShape) -> None:
        del shape  # the model has the smaller picture's already

    def rows(self, shape: TowerShape) -> int:
        return shape.rows

    def resample(self, embeddings: Any, config: Any, image: ImageSpec) -> ImageSpec:
        """Give a CLIP or SigLIP tower's embeddings and config the smaller size; how pictures are cut then.

        Raises UsageError for a size that is not smaller, or not whole patches.
        """
        size, patch, before = self.settings["size"], config.patch_size, config.image_size
        if size % patch or not patch <= size < before:
            raise self.wrong(
                "size", f"choose a multiple of the patches' {patch} pixels, from {patch} to {before - patch}"
            )
        has_cls = hasattr(embeddings, "class_embedding")
        embeddings.position_embedding = ResampledPositions(
            embeddings.position_embedding, before // patch, size // patch, has_cls
        )
        count = (size // patch) ** 2
        for name, value in (("image_size", size), ("num_patches", count), ("num_positions", count + has_cls)):
            setattr(embeddings, name, value)
        embeddings.position_ids = torch.arange(count + has_cls).unsqueeze(0)
        config.image_size = size
        return smaller(image, size)


def smaller(image: ImageSpec, size: int) -> ImageSpec:
    """The same cut of pictures for a tower that takes `size` x `size` pixels: every length in proportion."""
    assert isinstance(image, ClipSpec)  # what the families that serve this take
    before = max(image.fixed_size)

    def scaled(length: int | None) -> int | None:
        return None if length is None else round(length * size / before)

    return replace(
        image,
        shortest_edge=scaled(image.shortest_edge),
        height=scaled(image.height),
        width=scaled(image.width),
        crop_height=scaled(image.crop_height),
        crop_width=scaled(image.crop_width),
    )


class ResampledPositions(nn.Module):
    """position_ids int64 [1,n] -> [1,n,C]: all positions of a smaller square, from a table of a larger one's.

    Every position is a sum of sixteen of the table's, by constant weights: bicubic interpolation is linear.
    """

    taps: Tensor
    weights: Tensor

    def __init__(self, table: nn.Module, side: int, smaller: int, has_cls: bool) -> None:
        super().__init__()
        self.table = table
        along = _bicubic(side, smaller)  # [m,side]
        whole = torch.einsum("yr,xc->yxrc", along, along).reshape(smaller * smaller, side * side)
        if has_cls:
            whole = functional.pad(whole, (1, 0, 1, 0))
            whole[0, 0] = 1.0
        most = int((whole != 0).sum(dim=1).max())
        order = torch.argsort((whole == 0).int(), dim=1, stable=True)[:, :most]
        self.register_buffer("taps", order, persistent=False)
        self.register_buffer("weights", whole.gather(1, order).unsqueeze(-1), persistent=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        del position_ids  # all of them, in order
        rows = self.table(self.taps)
        return (rows * self.weights.to(rows.dtype)).sum(dim=1).unsqueeze(0)


def _bicubic(size: int, smaller: int) -> Tensor:
    """Weights float32 [smaller,size] of bicubic interpolation along one axis, as torch has it."""
    lines = torch.eye(size).reshape(1, size, size, 1).expand(1, size, size, 4)
    shrunk = functional.interpolate(lines, size=(smaller, 4), mode="bicubic", align_corners=False)
    return shrunk[0, :, :, 0].T.contiguous()


REDUCTION = Downsample
