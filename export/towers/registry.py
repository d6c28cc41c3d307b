"""The registry of tower reductions: one file each, its name the reduction's on the command line."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from vtp.engines.errors import UsageError, nearest, quoted
from vtp.export.method_files import NONE, reduction_names
from vtp.export.named_options import read_options
from vtp.export.towers.base import TowerReduction

_PACKAGE = __name__.rpartition(".")[0]


def find_reduction(name: str) -> type[TowerReduction]:
    """The class of a reduction by its name; UsageError, with the nearest name, for one that is not known."""
    known = reduction_names()
    if name not in known:
        raise UsageError(
            f"unknown tower reduction {quoted(name)}{nearest(name, known)}; choose none, {', '.join(known)}"
        )
    found: type[TowerReduction] = importlib.import_module(f"{_PACKAGE}.{name}").REDUCTION
    return found


def parse_reduction(text: str, options: Sequence[str] = ()) -> TowerReduction | None:
    """What `--tower NAME[:VALUE]` and `--tower-option NAME=VALUE` mean; None for "none".

    VALUE is the reduction's main option. Raises UsageError for an unknown name or option, one that is given
    twice, and a value that is not of its kind or fits no tower.
    """
    name, colon, value = text.partition(":")
    if name == NONE:
        if colon or options:
            given = quoted(value or next(iter(options), colon))
            raise UsageError(f"tower none has no options; leave out {given}, or choose a reduction")
        return None
    kind = find_reduction(name)
    pairs = [f"{kind.main}={value}"] if colon else []
    return kind(read_options([*pairs, *options], kind.options, f"tower {name}", "tower-option"))
