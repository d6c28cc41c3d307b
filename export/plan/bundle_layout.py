"""What a plan is written from: one model, one method, and how the decoder is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from vtp.export.families.base import Family
from vtp.export.graphs.decoder import TEXT_CUES
from vtp.export.graphs.restore import COLUMNS
from vtp.export.plan.names import pruner_name
from vtp.export.plan.schedule import Schedule, site_of
from vtp.export.pruners.site import Site


@dataclass(frozen=True)
class BundleLayout:
    """A family and the pruners of every keep-count (none of them for method `none`), and what follows.

    positions   how kept tokens are numbered: "compact" or "original"
    max_length  positions of one conversation
    restore     whether kept visual tokens draw the attention of the dropped ones (`graphs.restore`)
    """

    family: Family
    schedules: Sequence[Schedule]
    positions: str
    dtype: torch.dtype
    max_length: int
    restore: bool = False

    @property
    def site(self) -> Site | None:
        return site_of(self.schedules[0]) if self.schedules else None

    @property
    def kind(self) -> str:
        """The site's kind; "none" without a method."""
        return self.site.kind if self.site else "none"

    @property
    def on_features(self) -> bool:
        """Whether tokens are dropped before they reach the prompt."""
        return self.kind in ("vision", "projector")

    @property
    def cuts(self) -> tuple[int, ...]:
        """The decoder layers before which tokens are dropped."""
        return self.site.layers if self.site else ()

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(first, end) layer of every part of the decoder."""
        return list(pairwise([0, *self.cuts, len(self.family.decoder.layers)]))

    @property
    def needs(self) -> tuple[str, ...]:
        """The method's cues."""
        return self.schedules[0][0].needs if self.schedules else ()

    @property
    def reads_text(self) -> bool:
        return any(name.startswith("text_") for name in self.needs)

    @property
    def normed_keys(self) -> bool:
        return bool(self.schedules) and self.schedules[0][0].settings.get("keys") == "normed"

    @property
    def has_lookahead(self) -> bool:
        return self.family.decoder.mask_kind == "image"

    @property
    def embeds(self) -> list[str]:
        """What embed_tokens gives."""
        return ["inputs_embeds", *(["key_bias"] if self.restore else [])]

    def kv_shape(self, layer: int) -> tuple[int, int]:
        """(heads, width) of a layer's keys in the cache."""
        heads, width = self.family.decoder.kv_shape(layer)
        return heads, width + (COLUMNS if self.restore else 0)

    @property
    def splice_positions(self) -> str:
        """Before a decoder-site pruner, or without one, nothing is missing: places and positions agree."""
        return self.positions if self.on_features else "compact"

    @property
    def count(self) -> int:
        """N, the visual tokens of one picture."""
        return self.family.grid[0] * self.family.grid[1]

    @property
    def patches(self) -> int:
        """P, the patches that vision and projector sites choose from."""
        return self.family.patch_grid[0] * self.family.patch_grid[1]

    @property
    def features(self) -> int:
        """Width of image_features, with what becomes deepstack features in the decoder."""
        return self.family.feature_width * (1 + self.family.decoder.deepstack)

    def pruner_file(self, schedule: Schedule, number: int) -> str:
        """The graph of a schedule's pruner; the keep-count is in its name where there are several."""
        return pruner_name(number, len(schedule), schedule[-1].keep if len(self.schedules) > 1 else None)

    def capacity(self, number: int) -> int:
        """Of a part's cache. A head sees all N visual tokens; what comes after pruning holds at most what the
        largest keeps."""
        if not self.schedules or (self.cuts and number == 0):
            return self.max_length
        site = number - 1 if self.cuts else 0
        return self.max_length - self.count + max(schedule[site].keep for schedule in self.schedules)


def reads_rows(cues: Sequence[str]) -> bool:
    """Whether a part of the decoder that gives `cues` must know where the text is."""
    return bool(set(cues) & set(TEXT_CUES))
