"""A second cut of the visual tokens, inside the decoder, as the manifest describes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

THEN = ".then"  # ends the names of tensors around the second cut
KEPT = f"keep_indices{THEN}"  # int64 [B,K']: which of a picture's N tokens are left behind it


@dataclass(frozen=True)
class ThenInfo:
    """Before decoder layer `layer` the method `name` leaves `keep` tokens of each of the keep-counts in turn:
    the `share` of them that was asked for, as whole numbers."""

    name: str
    layer: int
    share: float
    keep: list[int]
    options: dict[str, Any]
    paper: str

    def to_json(self, keeps: Sequence[int], keep: int) -> dict[str, Any]:
        """What results say of it; `keep` is one of the bundle's keep-counts `keeps`."""
        return {"name": self.name, "layer": self.layer, "tokens": self.keep[keeps.index(keep)]}


def then_problem(then: ThenInfo | None, keeps: Sequence[int]) -> str:
    """What a manifest says of a second cut that cannot be; "" for nothing."""
    if then is None:
        return ""
    fits = len(then.keep) == len(keeps) and all(
        1 <= left <= keep for left, keep in zip(then.keep, keeps, strict=True)
    )
    return "" if fits and then.layer > 0 else "manifest.method.then does not fit the keep-counts"
