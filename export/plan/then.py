"""A second cut inside the decoder, `--then METHOD[:LAYER]`, of what a method kept behind the tower.

The method keeps K of N visual tokens before the decoder reads any; in front of one of its layers a second
method keeps a share of those K. Sources: VScan (arXiv 2505.22654), whose published settings are 96 of 576
behind the tower and 32 of these from layer 16 of 32 on, chosen as `pyramiddrop` chooses; and ApET (arXiv
2602.19870), with the same numbers and its own choice in both places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vtp.engines.errors import UsageError, quoted
from vtp.export.method_files import is_outside
from vtp.export.named_options import read_options
from vtp.export.pruners import NONE, Site, find_method, method_names, resolve_method
from vtp.export.pruners.base import Pruner

FLAG = "--then"
# Cues that a part of the decoder gives of the tokens that arrive. Others are of the whole picture, or of the
# text, whose places are those of a prompt with all N visual tokens.
_ARRIVING = {"attention_scores", "next_scores", "keys", "hidden_states"}


@dataclass(frozen=True)
class Then:
    """What prunes a second time, where, and how much it leaves.

    needs   the cues that its `forward` takes there
    layer   the decoder layer before which it prunes; 0: half of the decoder's layers are before it
    share   of the K tokens that arrive, as a fraction
    """

    method: type[Pruner]
    needs: tuple[str, ...]
    layer: int
    share: float
    settings: dict[str, Any]

    OPTIONS: ClassVar[dict[str, Any]] = {"layer": 0, "share": 1 / 3}

    def pruner(self, arriving: int, layers: int) -> Pruner:
        """The pruner of K = `arriving` tokens in a decoder of `layers` layers. UsageError if it has no such
        layer, or for options that do not fit that number of tokens."""
        layer = self.layer or layers // 2
        if not 0 < layer < layers:
            raise UsageError(
                f"{FLAG} {self.method.name}: layer is {layer}, and this model's decoder has {layers} layers; "
                f"give 1 to {layers - 1}"
                if layers > 1
                else f"{FLAG} prunes between two decoder layers, and this model has one; leave it out"
            )
        made = self.method((1, arriving), self.keep(arriving), **self.settings)
        made.site, made.needs = f"decoder:{layer}", self.needs  # type: ignore[misc]
        return made

    def keep(self, arriving: int) -> int:
        """How many of `arriving` tokens go on: the nearest whole number, at least one."""
        return max(1, int(arriving * self.share + 0.5))


def parse_then(text: str | None, options: Sequence[str] = ()) -> Then | None:
    """What `--then METHOD[:LAYER]` and `--then-option NAME=VALUE` mean; None without.

    Raises UsageError for a method that does not prune inside the decoder, and for an option that is unknown,
    given twice or out of range.
    """
    if text is None:
        if options:
            raise UsageError(f"{FLAG}-option {quoted(options[0])} is an option of {FLAG}; give {FLAG} METHOD")
        return None
    name, colon, value = text.rpartition(":")
    if not colon or (is_outside(text) and not value.isdecimal()):  # FILE.py:CLASS has a colon as well
        name, colon = text, ""
    method = resolve_method(name)
    if method is None or not needs_inside(method):
        raise UsageError(
            f"{FLAG} {quoted(name)} cannot prune a second time inside the decoder; choose one of "
            f"{', '.join(served())}"
        )
    if twice := Then.OPTIONS.keys() & method.options.keys():
        raise UsageError(
            f"{FLAG} {method.name}: its own option {min(twice)} has a name of {FLAG}'s; call it otherwise"
        )
    pairs = [f"layer={value}"] if colon else []
    known = {**Then.OPTIONS, **method.options}
    given = read_options([*pairs, *options], known, f"{FLAG} {method.name}", "then-option")
    layer, share = (given.pop(option, default) for option, default in Then.OPTIONS.items())
    if layer < 0:
        raise UsageError(f"{FLAG} {method.name}: layer is {layer}; give 1 or more, or 0 for half of them")
    if not 0 < share <= 1:
        raise UsageError(f"{FLAG} {method.name}: share is {share:g}; give a fraction above 0, 1 at most")
    return Then(method, needs_inside(method), layer, share, given)


def needs_inside(method: type[Pruner]) -> tuple[str, ...]:
    """The cues that a method takes as a second cut; () for one that cannot be one."""
    if method.inside:
        return method.inside
    fits = Site.parse(method.site).in_decoder and not method.reads_grid and set(method.needs) <= _ARRIVING
    return method.needs if fits else ()


def served() -> list[str]:
    """Names of the methods that can be a second cut."""
    return [name for name in method_names() if name != NONE and needs_inside(find_method(name))]
