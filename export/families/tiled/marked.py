"""Families that name every view of a picture in the prompt: its tokens lie in runs, with marks between them.

Marks are text, and whatever is pruned, they stay.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from vtp.engines import VtpError
from vtp.export.families.base import Family
from vtp.export.families.tiled.runs import Runs, RunsDecoderPruner, RunsSplice, RunsTextCues
from vtp.export.families.tiles import Tile, unlike_tiles
from vtp.export.graphs.pruner import DecoderPruner
from vtp.export.graphs.splice import Splice, TextCues
from vtp.export.pruners.base import Pruner


class MarkedViews(Family):
    """A family whose pictures may have several views, each a run of visual tokens."""

    _ids: list[int]

    @property
    @abstractmethod
    def view_tokens(self) -> Sequence[int]:
        """Visual tokens of every view, in the order of the prompt."""

    def read_block(self, tokenizer: Any, block: str) -> None:
        """Take note of transformers' prompt of one picture, with one image token for a view's many."""
        self._ids = [int(number) for number in tokenizer(block, add_special_tokens=False)["input_ids"]]
        if self._ids.count(self.image_token_id) != len(self.view_tokens):
            raise VtpError(f"the tokenizer does not know the marks of tiles in {block[:60]!r}")

    @property
    def placeholder_ids(self) -> list[int]:
        return self._ids

    @property
    def placeholders(self) -> int:
        return len(self._span)

    @property
    def picture_ids(self) -> list[int]:
        lengths, image = iter(self.view_tokens), self.image_token_id
        runs = [[number] * (next(lengths) if number == image else 1) for number in self._span]
        return [number for run in runs for number in run]

    @property
    def runs(self) -> Runs:
        """The tokens of the views, and the marks between them."""
        groups = [(key, len(list(items))) for key, items in groupby(self._span, self.image_token_id.__eq__)]
        return Runs(tuple(self.view_tokens), tuple(count for is_image, count in groups if not is_image))

    def splice(self, positions: str) -> Splice:
        if self._in_one_piece:
            return super().splice(positions)
        return RunsSplice(self.placeholders, self.runs, positions)

    def text_cues(self) -> TextCues:
        return super().text_cues() if self._in_one_piece else RunsTextCues(self.placeholders, self.runs)

    def decoder_pruner(self, pruner: Pruner, others: Sequence[str]) -> DecoderPruner:
        if self._in_one_piece:
            return super().decoder_pruner(pruner, others)
        return RunsDecoderPruner(pruner, others, self.runs)

    @property
    def _in_one_piece(self) -> bool:
        return len(self.view_tokens) == 1

    @property
    def _span(self) -> list[int]:
        """The block from its first image id to its last."""
        image = self.image_token_id
        return self._ids[self._ids.index(image) : len(self._ids) - self._ids[::-1].index(image)]


class UnlikeViews(MarkedViews):
    """One whose views are patches of unlike grids, and a visual token a square of them.

    size    (height, width) of the picture
    _grids  (rows, columns) of every view's patches
    """

    size: tuple[int, int]
    _grids: Sequence[tuple[int, int]]

    @property
    @abstractmethod
    def token_edge(self) -> int:
        """Patches on one side of a visual token."""

    @property
    def token_grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of the visual tokens of every view."""
        edge = self.token_edge
        return [(rows // edge, columns // edge) for rows, columns in self._grids]

    @property
    def grid(self) -> tuple[int, int]:
        return self.token_grids[0] if self._in_one_piece else (1, sum(self.view_tokens))

    @property
    def view_tokens(self) -> Sequence[int]:
        return [rows * columns for rows, columns in self.token_grids]

    @property
    def tiles(self) -> Sequence[Tile]:
        return unlike_tiles(self.token_grids)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.size
