"""Several views of one picture as one row of visual tokens: the order, and the ends of lines.

LLaVA-NeXT and LLaVA-OneVision look at a picture as a whole and at its parts. The parts' features are laid
side by side into one large grid, what lies behind padding is cut off, and every row of the grid is closed by
a learned token. At one image size all of that is a fixed order. Source: transformers' `pack_image_features`
and `unpad_image`, which the tests hold these tables against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtp.export.families.tiles import Tile
from vtp.export.pruners.ops import gather_rows


@dataclass(frozen=True)
class Views:
    """How the views of a picture become P patches and, with the ends of lines, N tokens.

    side        patches along an edge of one view
    tiles       (rows, columns) of views after the first, which shows the whole picture
    image_size  (height, width) of the picture
    """

    side: int
    tiles: tuple[int, int]
    image_size: tuple[int, int]

    @property
    def rows(self) -> range:
        """Rows of the parts' grid that lie on the picture, not on padding."""
        return self._cut(0)

    @property
    def columns(self) -> range:
        """Columns of the parts' grid that lie on the picture."""
        return self._cut(1)

    @property
    def count(self) -> int:
        """V, the number of views."""
        return 1 + self.tiles[0] * self.tiles[1]

    def order(self) -> Tensor:
        """int64 [P]: which of the V x side x side patches, view after view, comes where."""
        whole = list(range(self.side**2))
        parts = [self._patch(row, column) for row in self.rows for column in self.columns]
        return torch.tensor(whole + parts, dtype=torch.int64)

    def places(self) -> Tensor:
        """int64 [P]: the places of the patches among the N tokens."""
        whole, width = self.side**2, len(self.columns)
        parts = [whole + line * (width + 1) + cell for line in range(len(self.rows)) for cell in range(width)]
        return torch.tensor([*range(whole), *parts], dtype=torch.int64)

    def parts(self) -> list[Tile]:
        """The whole picture, then its parts, row by row; parts that are all padding hold nothing and go."""
        whole, width = self.side**2, len(self.columns)
        found = [Tile(range(whole), (self.side, self.side))]
        for tile_row in range(self.tiles[0]):
            lines = [n for n, row in enumerate(self.rows) if row // self.side == tile_row]
            for tile_column in range(self.tiles[1]):
                cells = [n for n, column in enumerate(self.columns) if column // self.side == tile_column]
                places = [whole + line * width + cell for line in lines for cell in cells]
                found += [Tile(places, (len(lines), len(cells)))] if places else []
        return found

    def lines(self) -> Tensor:
        """int64 [N]: which patch, counted from 1, is at each place; 0 is the end of a line."""
        places = self.places()
        table = torch.zeros(len(places) + len(self.rows), dtype=torch.int64)
        table[places] = torch.arange(1, len(places) + 1)
        return table

    def _cut(self, axis: int) -> range:
        """transformers' unpad_image: along the axis where the picture falls short of the grid's aspect."""
        grid = [self.side * tiles for tiles in self.tiles]
        height, width = self.image_size
        short = 0 if width / height > grid[1] / grid[0] else 1
        if axis != short:
            return range(grid[axis])
        scale = grid[1 - short] / self.image_size[1 - short]
        kept = int(round(self.image_size[short] * scale, 7))
        padding = (grid[short] - kept) // 2
        return range(padding, grid[short] - padding)

    def _patch(self, row: int, column: int) -> int:
        (tile_row, y), (tile_column, x) = divmod(row, self.side), divmod(column, self.side)
        view = 1 + tile_row * self.tiles[1] + tile_column
        return (view * self.side + y) * self.side + x


class ViewsEncoder(nn.Module):
    """pixel_values [V,3,H,W] -> image_features [1,P,C] and the cues asked for, in the order of the tokens.

    Attention is within one view: scores of different views are compared as they are.
    """

    order: Tensor

    def __init__(self, encoder: nn.Module, views: Views) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("order", views.order(), persistent=False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.encoder(pixel_values)
        return tuple(output.flatten(0, 1).index_select(0, self.order).unsqueeze(0) for output in outputs)


class LinesProjector(nn.Module):
    """image_features [B,P,C] -> image_embeds [B,N,D]: every row of the parts' grid ends with `line_end`."""

    table: Tensor

    def __init__(self, projector: nn.Module, views: Views, line_end: nn.Parameter) -> None:
        super().__init__()
        self.projector = projector
        self.line_end = line_end
        self.register_buffer("table", views.lines().unsqueeze(0), persistent=False)

    def forward(self, image_features: Tensor) -> Tensor:
        embeds = self.projector(image_features)
        batch, _, width = embeds.shape
        line_end = self.line_end.to(embeds.dtype).view(1, 1, width).expand(batch, 1, width)
        return gather_rows(torch.cat([line_end, embeds], dim=1), self.table.expand(batch, -1))
