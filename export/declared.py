"""What methods, reductions and families declare of themselves, read from their classes; this loads torch.

`python -m vtp.export.declared` writes it into listed.json, which `vtp-export --list-methods` shows at once.
"""

from __future__ import annotations

from typing import Any

from vtp.export import families as family_registry
from vtp.export import pruners, towers
from vtp.export.listed import LISTED, files, text_of
from vtp.export.pruners.base import Pruner


def methods() -> list[dict[str, Any]]:
    """A row per method: name, site, selects or merges, needs, default K of 576 tokens, options, paper; then
    a row per tower reduction, whose site is "--tower", and per add-on, whose site is its flag."""
    rows: list[dict[str, Any]] = [
        {
            "method": pruners.NONE,
            "site": "-",
            "does": "-",
            "needs": [],
            "K of 576": 576,
            "options": {},
            "paper": "",
        }
    ]
    for name in pruners.method_names():
        if name != pruners.NONE:
            method = pruners.find_method(name)
            rows.append(
                {
                    "method": name,
                    "site": method.site,
                    "does": "merges" if method.merges else "selects",
                    "needs": list(method.needs),
                    "K of 576": method.default_keep(576),
                    "options": _options(method),
                    "paper": method.paper,
                }
            )
    return [*rows, *_reductions(), *_ADD_ONS]


# What goes beside a method and has a flag of its own.
_ADD_ONS: tuple[dict[str, Any], ...] = (
    {
        "method": "restore",
        "site": "--restore",
        "does": "adds log(N/K)",
        "needs": [],
        "K of 576": 576,
        "options": {},
        "paper": "arXiv 2606.01711",
    },
    {
        "method": "share",
        "site": "--share",
        "does": "deals K to tiles",
        "needs": [],
        "K of 576": 576,
        "options": {},
        "paper": "",
    },
)


def _reductions() -> list[dict[str, Any]]:
    """One row per tower reduction: what `--tower` takes, beside any method."""
    found = [towers.find_reduction(name) for name in towers.reduction_names()]
    return [
        {
            "method": kind.name,
            "site": "--tower",
            "does": "reduces",
            "needs": [],
            "K of 576": 576,
            "options": dict(kind.options),
            "paper": kind.paper,
        }
        for kind in found
    ]


def _options(method: type[Pruner]) -> dict[str, Any]:
    """A method's own options, and the exporter's `positions` where tokens can be renumbered."""
    at_decoder = pruners.Site.parse(method.site).in_decoder
    return dict(method.options) if at_decoder else {**method.options, "positions": method.positions}


def families() -> list[dict[str, Any]]:
    """One row per family: name, architectures, sites served, limits."""
    return [
        {
            "family": family.name,
            "architectures": list(family.architectures),
            "sites": list(family.sites),
            "limits": family.limits,
        }
        for family in family_registry.families()
    ]


def listed() -> dict[str, Any]:
    """What listed.json holds: the rows, and the files that they were read from."""
    return {"files": files(), "methods": methods(), "families": families()}


if __name__ == "__main__":
    LISTED.write_text(text_of(listed()), encoding="utf-8")
