"""What `vtp.bench.scaling.study` found: docs/scaling.json, docs/scaling.md and docs/scaling.png.

    python -m vtp.bench.scaling.report      writes page and picture again from docs/scaling.json

What stands between the page's marks is written by hand, and kept.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.common.checkout import checkout
from vtp.bench.common.figures import milliseconds, spread
from vtp.runtime.commands.console import run_command
from vtp.runtime.commands.tables import markdown_table

BEGIN, END = "<!-- why: begin -->", "<!-- why: end -->"
UNREAD = "Not written yet."
TITLES = {
    "visual tokens": "Visual tokens, pruned",
    "visual tokens, all kept": "Visual tokens, all kept",
    "tokens kept": "Tokens kept",
    "text tokens": "Length of the prompt",
    "batch": "Prompts in a batch",
    "streams": "Streams in parallel",
}
_SAID = {
    "visual tokens": "Before pruning; {keep} of each picture's {count} are kept. More pictures in the "
    "prompt, which is the work of as many tiles of one picture.",
    "visual tokens, all kept": "The same pictures, nothing dropped.",
    "tokens kept": "Of {count}, one picture.",
    "text tokens": "One picture, {keep} tokens kept.",
    "batch": "Each its own picture, {keep} tokens kept, through the graphs together. The first tokens of all "
    "come at once.",
    "streams": "A process each with one thread, which begin at the same time; {keep} tokens kept. The first "
    "token is the slowest stream's.",
}
_INTRODUCTION = """\
Made by `{command}` at {time}: {processor}, {cores} cores, {memory} GB; {system}; Python {python}; {versions}.

Model `{model}`, {dtype}, {method}, {threads} threads, greedy, {tokens} tokens an answer. One axis changes \
at a time, from one picture with {keep} of {count} visual tokens kept, a prompt of {text} text tokens, batch \
1, one stream. Every point was measured {rounds} times, all points in turn; figures are medians, with \
quartiles in brackets.

*Slope* is d log(ms) / d log(x) from the row above: 1 is proportional, 0 costs nothing more, above 1 is \
worse than proportional. *Each more* is what one more of x adds, in ms: where it stays the same, the cost is \
linear with a fixed part. GFLOP are counted from the graphs at the shapes that ran, so that more work and \
slower work can be told apart."""


def write_report(results: Mapping[str, Any], root: Path) -> str:
    """Write the three files; returns the page's tables."""
    docs = root / "docs"
    docs.mkdir(parents=True, exist_ok=True)
    old = docs / "scaling.md"
    why = reasons(old.read_text(encoding="utf-8")) if old.exists() else UNREAD
    (docs / "scaling.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    old.write_text(page(results, why), encoding="utf-8")
    plot(results, docs / "scaling.png")
    return "\n\n".join(_tables(results))


def reasons(text: str) -> str:
    """What was written by hand between a page's marks."""
    _, found, rest = text.partition(BEGIN)
    return rest.partition(END)[0].strip() if found else UNREAD


def page(results: Mapping[str, Any], why: str) -> str:
    """docs/scaling.md."""
    machine, base = results["machine"], _base(results)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    known = {**machine, **results, **base, "versions": versions, "memory": machine["memory_gb"]}
    parts = ["# What a request costs as it grows", _INTRODUCTION.format(**known), "![](scaling.png)"]
    parts += ["## Where it stops being linear, and why", f"{BEGIN}\n{why}\n{END}", *_tables(results)]
    if results["dropped"]:
        parts += ["## Not measured", "\n".join(f"- {what}" for what in results["dropped"])]
    return "\n\n".join(parts) + "\n"


def rows(results: Mapping[str, Any], axis: str) -> list[dict[str, Any]]:
    """An axis' points in order: x, and the spread of ttft, tpot, encoder, prefill and wall (ms), and the
    prefill's operations."""
    found = []
    alone = axis == "streams"
    points = results["axes"][axis]
    for point in ([{**points[0], "streams": 1}] if alone and points else []) + points:
        runs = [
            run
            for run in results["runs"]
            if run["point"] == point and run["threads"] == (1 if alone else results["threads"])
        ]
        if runs:
            found.append({"x": _x(axis, runs[0]), **_figures(runs)})
    return sorted(found, key=lambda row: row["x"])


def _figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    whole = {name: spread([run[name] for run in runs]) for name in ("ttft", "tpot", "wall")}
    parts = {name: spread([run["parts"][name] for run in runs]) for name in ("encoder", "prefill")}
    return {**whole, **parts, "flops": runs[0]["flops"].get("prefill", 0)}


def _x(axis: str, run: Mapping[str, Any]) -> int:
    if axis in ("batch", "streams"):
        return int(run["point"][axis])
    what = {"tokens kept": "after", "text tokens": "text"}.get(axis, "before")
    return int(run[what])


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """d log(y) / d log(x) between two points."""
    return math.log(ys[1] / ys[0]) / math.log(xs[1] / xs[0])


def _base(results: Mapping[str, Any]) -> dict[str, Any]:
    """The point where all axes begin."""
    return results["axes"]["visual tokens"][0]


def _tables(results: Mapping[str, Any]) -> list[str]:
    parts: list[str] = []
    for axis, title in TITLES.items():
        lines = rows(results, axis)
        if lines:
            said = _SAID[axis].format(**_base(results), count=results["count"])
            parts += [f"## {title}", said, _streams(lines) if axis == "streams" else _requests(axis, lines)]
    return parts


def _requests(axis: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """The table of one axis: times and work of each size, and how they grew from the size before."""
    header = [
        axis.partition(",")[0],
        "first token, ms",
        "slope",
        "each more, ms",
        "encoder, ms",
        "prefill, ms",
    ]
    header += ["slope", "prefill, GFLOP", "slope", "GFLOP/s", "each further token, ms", "slope"]
    table = []
    for place, row in enumerate(lines):
        before = lines[place - 1] if place else None
        seconds = row["prefill"]["median"] / 1e3
        table.append(
            [
                str(row["x"]),
                _spread(row["ttft"]),
                _slope(before, row, "ttft"),
                _more(before, row),
                milliseconds(row["encoder"]["median"]),
                milliseconds(row["prefill"]["median"]),
                _slope(before, row, "prefill"),
                f"{row['flops'] / 1e9:.3g}",
                _slope(before, row, "flops"),
                f"{row['flops'] / 1e9 / seconds:.3g}",
                _spread(row["tpot"]),
                _slope(before, row, "tpot"),
            ]
        )
    return markdown_table(header, table, left=0)


def _streams(lines: Sequence[Mapping[str, Any]]) -> str:
    header = ["streams", "first token, ms", "slope", "all answered, ms", "slope", "answers a second"]
    header += ["each further token, ms", "slope"]
    table = []
    for place, row in enumerate(lines):
        before = lines[place - 1] if place else None
        table.append(
            [
                str(row["x"]),
                _spread(row["ttft"]),
                _slope(before, row, "ttft"),
                _spread(row["wall"]),
                _slope(before, row, "wall"),
                f"{1e3 * row['x'] / row['wall']['median']:.3g}",
                _spread(row["tpot"]),
                _slope(before, row, "tpot"),
            ]
        )
    return markdown_table(header, table, left=0)


def _slope(before: Mapping[str, Any] | None, row: Mapping[str, Any], what: str) -> str:
    if before is None:
        return ""
    ys = [one[what]["median"] if isinstance(one[what], dict) else one[what] for one in (before, row)]
    return f"{slope([before['x'], row['x']], ys):.2f}" if min(ys) > 0 else ""


def _more(before: Mapping[str, Any] | None, row: Mapping[str, Any]) -> str:
    if before is None:
        return ""
    return f"{(row['ttft']['median'] - before['ttft']['median']) / (row['x'] - before['x']):.3g}"


def _spread(found: Mapping[str, Any]) -> str:
    return f"{milliseconds(found['median'])} ({milliseconds(found['low'])} to {milliseconds(found['high'])})"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Five small plots; dashed: the straight line that fits best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 5, figsize=(17, 3.4))
    drawn = [["visual tokens", "visual tokens, all kept"], *[[axis] for axis in list(TITLES)[2:]]]
    for panel, names in zip(panels, drawn, strict=True):
        for colour, axis in enumerate(names):
            _draw(panel, rows(results, axis), "wall" if axis == "streams" else "ttft", f"C{colour}", axis)
        panel.set(xlabel=names[0], ylim=(0, None))
        panel.set_title("all answered, s" if names == ["streams"] else "first token, s", fontsize=9)
        if len(names) > 1:
            panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _draw(panel: Any, lines: Sequence[Mapping[str, Any]], what: str, colour: str, label: str) -> None:
    if not lines:
        return
    xs = np.array([row["x"] for row in lines], float)
    low, middle, high = (
        np.array([row[what][end] for row in lines]) / 1e3 for end in ("low", "median", "high")
    )
    away = [middle - low, high - middle]
    panel.errorbar(xs, middle, yerr=away, color=colour, marker="o", ms=3, ls="", capsize=2, label=label)
    line = np.polyfit(xs, middle, min(1, len(xs) - 1))
    panel.plot(xs, np.polyval(line, xs), color=colour, ls="--", lw=0.8)


def main() -> int:
    """Write the page and the picture again from docs/scaling.json."""
    return run_command("scaling_report", _rewrite, debug=False)


def _rewrite() -> None:
    root = checkout("the folder of one")
    write_report(json.loads((root / "docs/scaling.json").read_text(encoding="utf-8")), root)


if __name__ == "__main__":
    sys.exit(main())
