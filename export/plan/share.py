"""A budget for every tile or frame: K dealt to a picture's tiles or a video's frames, so that none starves.

Of N visual tokens in tiles of n tokens, each tile keeps K·n/N: whole numbers by the largest remainder, at
least one. The method then chooses within each tile alone, among its tokens and their cues, as it would in a
picture of that size. F frames are dealt to in the same way, as tiles of equal size: ⌊K / F⌋ each, and one
more for each of the first K mod F. Whole pictures of a prompt need nothing of the kind: each is pruned by
itself, to K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtp.engines.errors import UsageError
from vtp.export.families.tiles import Tile
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner
from vtp.export.pruners.merge import in_raster_order
from vtp.runtime.bundle.manifest import FRAME, TILE

_OF_PROMPTS = ("text_embeds", "text_mask")  # cues that are not of tokens
_DEALT_TO = {TILE: "tiles of a picture", FRAME: "frames of a video"}


def dealt(sizes: Sequence[int], keep: int, share: str = TILE) -> list[int]:
    """K = `keep` split by the tiles' sizes: the largest remainder, the first of equal ones; at least 1 each.

    share  what the parts are: "tile" or "frame"

    Raises UsageError where K is less than the tiles.
    """
    if keep < len(sizes):
        raise UsageError(
            f"keep-tokens {keep} is fewer than the {len(sizes)} {_DEALT_TO[share]}; with --share {share} "
            f"each keeps at least one: choose {len(sizes)} or more, or --share picture"
        )
    total = sum(sizes)
    shares = [keep * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda tile: -(keep * sizes[tile] % total))
    for tile in order[: keep - sum(shares)]:
        shares[tile] += 1
    while 0 in shares:  # tiles that are cut to a few tokens
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(0)] += 1
    return shares


class Shared(Pruner):
    """A method that chooses in every tile, or frame, for itself; it stands for the method wherever that is
    asked."""

    def __init__(
        self,
        method: type[Pruner],
        tiles: Sequence[Tile],
        keep: int,
        settings: Mapping[str, Any],
        share: str = TILE,
    ) -> None:
        """One pruner of `method` for each of the `tiles`, which hold all P patches; `share` says in an error
        what they are."""
        self.name, self.site, self.needs = method.name, method.site, method.needs  # type: ignore[misc]
        self.merges, self.paper = method.merges, method.paper  # type: ignore[misc]
        shares = dealt([len(tile.places) for tile in tiles], keep, share)
        places = [place for tile in tiles for place in tile.places]
        super().__init__((1, len(places)), keep)
        self.parts = nn.ModuleList(
            method(tile.grid, part, **settings) for tile, part in zip(tiles, shares, strict=True)
        )
        self.settings = self.parts[0].settings  # type: ignore[assignment]
        self.default_keep = method.default_keep  # type: ignore[method-assign]
        self.ordered = places == sorted(places)
        for number, tile in enumerate(tiles):
            self.register_buffer(f"tile_{number}", torch.tensor(tile.places), persistent=False)

    def forward(self, **cues: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """keep_indices int64 [B,K] among the P patches, and rows [B,K,C] of a method that merges."""
        chosen: list[Tensor] = []
        rows: list[Tensor] = []
        for number, part in enumerate(self.parts):
            places = self.get_buffer(f"tile_{number}")
            answer = part(**{name: _own(name, cue, places) for name, cue in cues.items()})
            keep = answer[0] if self.merges else answer
            rows += [answer[1]] if self.merges else []
            chosen.append(functional.embedding(keep, places.unsqueeze(1)).squeeze(2))
        whole = torch.cat(chosen, dim=1)
        if self.merges:
            return in_raster_order(whole, torch.cat(rows, dim=1))
        return whole if self.ordered else ops.raster(whole)


def _own(name: str, cue: Tensor, places: Tensor) -> Tensor:
    """A cue [B,P,...] of the tokens of one tile."""
    return cue if name in _OF_PROMPTS else cue.index_select(1, places)
