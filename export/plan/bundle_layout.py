"""What a plan is written from: one model, one method, and how the decoder is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from vtp.export.families.base import Family
from vtp.export.graphs.decoder import TEXT_CUES
from vtp.export.graphs.restore import COLUMNS
from vtp.export.plan.names import SECOND, pruner_name, tail
from vtp.export.plan.schedule import Schedule, cuts_of, keep_of, site_of
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
        return cuts_of(self.schedules[0]) if self.schedules else ()

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(first, end) layer of every part of the decoder."""
        return list(pairwise([0, *self.cuts, len(self.family.decoder.layers)]))

    @property
    def needs(self) -> tuple[str, ...]:
        """The method's cues."""
        return self.schedules[0][0].needs if self.schedules else ()

    @property
    def cut_needs(self) -> tuple[str, ...]:
        """The cues of what drops tokens inside the decoder."""
        return self.schedules[0][-1].needs if self.cuts else ()

    @property
    def reads_text(self) -> bool:
        return any(name.startswith("text_") for name in self.needs)

    @property
    def normed_keys(self) -> bool:
        return bool(self.schedules) and self.schedules[0][-1].settings.get("keys") == "normed"

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
        keep = keep_of(schedule) if len(self.schedules) > 1 else None
        return pruner_name(number, len(schedule), keep)

    def after_part(self, number: int) -> int:
        """Which of a schedule's pruners follows part `number` of the decoder; that many come before."""
        return number + self.on_features

    def tail(self, number: int) -> str:
        """What is added to the pipeline's names around a cut: see `names.tail`. Those of a second cut differ
        from the method's own, whose tensors are read to the end of the prompt."""
        return SECOND if self.on_features else tail(number, self.cuts)

    def arriving(self, number: int, schedule: Schedule) -> int:
        """How many visual tokens of a picture reach part `number`."""
        before = self.after_part(number)
        return schedule[before - 1].keep if before else self.count

    def capacity(self, number: int) -> int:
        """Of a part's cache. A head sees all N visual tokens; what comes after pruning holds at most what the
        largest keeps."""
        most = max((self.arriving(number, schedule) for schedule in self.schedules), default=self.count)
        return self.max_length - self.count + most


def reads_rows(cues: Sequence[str]) -> bool:
    """Whether a part of the decoder that gives `cues` must know where the text is."""
    return bool(set(cues) & set(TEXT_CUES))
