"""What methods, reductions and families declare of themselves, read from their classes; this loads torch.

`python -m vtp.export.declared` writes it into listed.json, which `vtp-export --list-methods` shows at once,
and in a checkout into the tables of docs/methods.md and docs/families.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtp.export import families as family_registry
from vtp.export import pruners, towers
from vtp.export.listed import LISTED, files, render, text_of
from vtp.export.plan.then import FLAG, Then
from vtp.export.pruners.base import Pruner

PAGES = ("methods", "families")  # of docs/, which hold the tables
BEGIN, END = "<!-- listed: begin -->", "<!-- listed: end -->"


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
                    "needs": [*method.needs, *(["frames"] if method.reads_frames else [])],
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
        "does": "deals K to tiles, frames",
        "needs": [],
        "K of 576": 576,
        "options": {},
        "paper": "",
    },
    {
        "method": "then",
        "site": FLAG,
        "does": "prunes once more inside the decoder",
        "needs": [],
        "K of 576": 576,
        "options": {name: round(value, 3) for name, value in Then.OPTIONS.items()},
        "paper": "arXiv 2505.22654, 2602.19870",
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
            "K of 576": kind.left(576),
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


def write(file: Path, docs: Path) -> None:
    """Write listed.json, and the tables between the marks of `docs`/methods.md and families.md, if there."""
    found = listed()
    file.write_text(text_of(found), encoding="utf-8")
    for kind in PAGES:
        page = docs / f"{kind}.md"
        if page.is_file():
            table = render(found[kind], "markdown")
            page.write_text(with_table(page.read_text(encoding="utf-8"), table), encoding="utf-8")


def with_table(text: str, table: str) -> str:
    """`text` with what stands between the marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}" if rest else text


if __name__ == "__main__":
    write(LISTED, LISTED.resolve().parents[1] / "docs")
