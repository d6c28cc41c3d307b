"""What this vtp serves, as tables: the methods and the families."""

from __future__ import annotations

import json
from typing import Any

from vtp.export import families as family_registry
from vtp.export import pruners, towers
from vtp.export.pruners.base import Pruner
from vtp.runtime.commands.console import table


def methods() -> list[dict[str, Any]]:
    """A row per method: name, site, selects or merges, needs, default K of 576 tokens, options, paper; then
    a row per tower reduction, whose site is "--tower"."""
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
    return [*rows, *_reductions()]


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


def render(rows: list[dict[str, Any]], form: str) -> str:
    """Rows as "json", "markdown" or "text"."""
    if form == "json":
        return json.dumps(rows, indent=1)
    header = list(rows[0])
    cells = [[_cell(value) for value in row.values()] for row in rows]
    if form == "text":
        return table(header, cells)
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={default}" for key, default in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return str(value) or "-"
