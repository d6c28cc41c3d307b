"""docs/methods.json made readable: the tables in docs/measured.md and docs/methods.md, and the plot.

python -m vtp.bench.studies.methods_report      writes them again from docs/methods.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtp.runtime.commands.tables import markdown_table
from vtp.scenes.exam import wilson

ROOT = Path(__file__).resolve().parents[2]  # through the link in vtp/
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
COMMAND = "make methods"
_INTRODUCTION = """\
Made by `{command}` on {cores} CPU cores ({machine}): the built-in model, ONNX Runtime CPU, float32, greedy; \
{questions} held-out questions (seed {seed}), the same for all. K is the number of visual tokens kept of \
576; at several sites, after the last. In brackets the 95 % Wilson interval: gaps of less than about two \
points mean nothing here. The built-in model answers four kinds of question about simple scenes; it ranks \
methods, it does not foretell a 7B model's score."""
_TIMES = """\
Median of {rounds} runs, all bundles in turn; preprocessing and every stage counted, in brackets the \
pruner's part. All tokens kept: {unpruned:.0f}."""


def write_report(results: Mapping[str, Any], root: Path) -> None:
    """Write docs/methods.json, docs/measured.md and docs/methods.png, and the table in docs/methods.md."""
    (root / "docs").mkdir(parents=True, exist_ok=True)
    (root / "docs/methods.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (root / "docs/measured.md").write_text(page(results), encoding="utf-8")
    plot(results, root / "docs/methods.png")
    methods = root / "docs/methods.md"
    if methods.exists():
        text = with_table(methods.read_text(encoding="utf-8"), summary(results))
        methods.write_text(text, encoding="utf-8")


def with_table(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what stands between the marks replaced."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{table}\n{end}{after}" if rest else text


def summary(results: Mapping[str, Any]) -> str:
    """The table of docs/methods.md: exact match in percent by keep-count, best first at the middle one."""
    methods, keeps = _methods(results), _keeps(results)
    cells = {(row["method"], row["keep"]): row for row in results["rows"]}
    header = ["method", "site", *(f"K = {keep}" for keep in keeps), f"TTFT at {_middle(keeps)}, ms"]
    none = next(row for row in results["rows"] if row["method"] == "none" and row["keep"] != "blank")
    empty, whole = [""] * (len(keeps) - 1), f"{_percent(none, results):.1f}"
    rows = [[f"none (all {none['keep']})", "-", whole, *empty, f"{none['ttft']:.0f}"]]
    for method in methods:
        rates = [f"{_percent(cells[method, keep], results):.1f}" for keep in keeps]
        row = cells[method, _middle(keeps)]
        rows.append([method, row["site"], *rates, f"{row['ttft']:.0f}"])
    return markdown_table(header, rows, left=2, tight=True)


def page(results: Mapping[str, Any]) -> str:
    """docs/measured.md: intervals, kinds of question, and milliseconds."""
    rows = results["rows"]
    none = {row["keep"]: row for row in rows if row["method"] == "none"}
    unpruned = next(row["ttft"] for row in none.values() if "ttft" in row)
    parts = [
        "# The methods, measured",
        _INTRODUCTION.format(**results, command=COMMAND),
        "![accuracy and time to first token against tokens kept](methods.png)",
        "\n".join(
            f"- {'a grey picture' if keep == 'blank' else 'every token kept'}: {_interval(row, results)}"
            for keep, row in none.items()
        ),
        "## Exact match, %",
        _table(results, lambda row: _interval(row, results)),
        "## Time to first token, ms",
        _TIMES.format(**results, unpruned=unpruned),
        _table(results, lambda row: f"{row['ttft']:.0f} ({row['pruner']:.1f})"),
    ]
    for kind in rows[0]["kinds"]:
        parts += [f"## {kind}, %", _table(results, lambda row, kind=kind: _kind(row, kind))]
    return "\n\n".join(parts) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy with its intervals and TTFT, both against tokens kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keeps, total = _keeps(results), results["questions"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6.5), sharex=True)
    marks = {"vision": "o", "projector": "s", "decoder": "^"}
    for number, method in enumerate(_methods(results)):
        rows = [row for row in results["rows"] if row["method"] == method]
        rows.sort(key=lambda row: row["keep"])
        colour, mark = f"C{number % 10}", marks[rows[0]["site"].partition(":")[0]]
        style = "-" if number < 10 else "--"
        kept = [row["keep"] for row in rows]
        rates = [100 * row["right"] / total for row in rows]
        ends = [[100 * end for end in wilson(row["right"], total)] for row in rows]
        away = [[rate - low for rate, (low, _) in zip(rates, ends, strict=True)]]
        away.append([high - rate for rate, (_, high) in zip(rates, ends, strict=True)])
        left.errorbar(
            kept, rates, away, label=method, color=colour, marker=mark, ls=style, ms=4, lw=1, capsize=2
        )
        right.plot(kept, [row["ttft"] for row in rows], color=colour, marker=mark, ls=style, ms=4, lw=1)
    none = next(row for row in results["rows"] if row["method"] == "none" and row["keep"] != "blank")
    left.axhline(100 * none["right"] / total, color="black", lw=0.8, ls=":")
    right.axhline(none["ttft"], color="black", lw=0.8, ls=":")
    for axes, title in ((left, "exact match, %"), (right, "time to first token, ms")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(keeps, [str(keep) for keep in keeps])
        axes.set_xlabel("visual tokens kept of 576")
        axes.set_title(f"{title} (dotted: all tokens)")
        axes.grid(alpha=0.3)
    right.set_ylim(bottom=0)
    figure.legend(loc="center right", fontsize=9, title="o vision  s projector  ^ decoder", title_fontsize=7)
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _methods(results: Mapping[str, Any]) -> list[str]:
    """Methods other than none, best first at the middle keep-count."""
    middle = _middle(_keeps(results))
    rows = [row for row in results["rows"] if row["keep"] == middle and row["method"] != "none"]
    return [row["method"] for row in sorted(rows, key=lambda row: (-row["right"], row["method"]))]


def _keeps(results: Mapping[str, Any]) -> list[int]:
    return sorted({row["keep"] for row in results["rows"] if row["method"] != "none"}, reverse=True)


def _middle(keeps: Sequence[int]) -> int:
    return keeps[len(keeps) // 2]


def _table(results: Mapping[str, Any], cell: Any) -> str:
    keeps, cells = _keeps(results), {(row["method"], row["keep"]): row for row in results["rows"]}
    header = ["method", *(f"K = {keep}" for keep in keeps)]
    rows = [[method, *(cell(cells[method, keep]) for keep in keeps)] for method in _methods(results)]
    return markdown_table(header, rows, left=1, tight=True)


def _percent(row: Mapping[str, Any], results: Mapping[str, Any]) -> float:
    return 100 * row["right"] / results["questions"]


def _interval(row: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    low, high = wilson(row["right"], results["questions"])
    return f"{_percent(row, results):.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _kind(row: Mapping[str, Any], kind: str) -> str:
    right, total = row["kinds"][kind]
    return f"{100 * right / total:.1f}"


def main() -> int:
    """Write the report again from docs/methods.json."""
    write_report(json.loads((ROOT / "docs/methods.json").read_text(encoding="utf-8")), ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
