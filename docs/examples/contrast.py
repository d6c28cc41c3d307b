"""A method of your own: vtp-export --method docs/examples/contrast.py:Contrast --keep-tokens 64"""

from typing import ClassVar

from torch.nn import functional

from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner


class Contrast(Pruner):
    """Keeps the K tokens with the most attention times contrast: how far a token is from its neighbourhood.

    The neighbourhood is the mean direction of the 3 x 3 tokens around it, fewer at the border.
    """

    name = "contrast"
    site = "vision"
    needs = ("image_features", "attention_scores")
    reads_grid = True  # it looks at neighbours
    options: ClassVar = {"power": 1.0}  # of the contrast; 0 leaves attention alone

    def forward(self, image_features, attention_scores):
        """image_features [B,N,C], attention_scores float32 [B,N] -> keep_indices int64 [B,K], ascending."""
        rows = ops.normalize(image_features)
        picture = rows.transpose(1, 2).reshape(-1, rows.shape[2], *self.grid)
        around = functional.avg_pool2d(picture, 3, stride=1, padding=1, count_include_pad=False)
        around = ops.normalize(around.flatten(2).transpose(1, 2))
        contrast = (1 - (rows * around).sum(dim=2)).clamp(min=0)
        return ops.raster(ops.top_k(attention_scores * contrast ** self.settings["power"], self.keep))
