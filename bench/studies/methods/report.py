"""docs/methods.json made readable: the tables in docs/measured.md and docs/methods.md, and the plot.

python -m vtp.bench.studies.methods.report      writes them again from docs/methods.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.studies.paired import interval
from vtp.runtime.commands.tables import markdown_table
from vtp.scenes.exam import wilson

ROOT = Path(__file__).resolve().parents[3]  # through the link in vtp/
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
COMMAND = "make methods"
DOWNSAMPLE, RANDOM, BLANK = "downsample", "random", "blank"
_INTRODUCTION = """\
Made by `{command}` on {cores} CPU cores ({machine}): the built-in model, ONNX Runtime CPU, float32, greedy; \
{questions} held-out questions (seed {seed}), the same for all. K is the number of visual tokens kept of \
576; at several sites, after the last. In brackets the 95 % Wilson interval: gaps of less than about two \
points mean nothing here. The built-in model answers four kinds of question about simple scenes; it ranks \
methods, it does not foretell a 7B model's score."""
_SMALLER = """\
`downsample` is not a method but the baseline that VTC-Bench (arXiv 2510.07143) asks every method to beat: \
nothing is pruned, and the picture is made so small (`--tower downsample:SIZE`) that it has as many tokens \
as the others keep, or the nearest number that is a square of patches: {tokens}."""
_LATER = """\
{names} {was} asked later (`--add`), when the model answered as many of the questions as before with every \
token kept, and {has} no times."""
_AGAIN = """\
{names} {was} asked again then, with the answers of that run and the times of the earlier one."""
_TIMES = """\
Median of {rounds} runs, all bundles in turn; preprocessing and every stage counted, in brackets the \
pruner's part. All tokens kept: {unpruned:.0f}."""
_PAIRED = """\
Points by which a method is ahead of {base} on the same questions, with the 95 % interval of a bootstrap \
that draws pictures. A method beats it if the whole interval lies above 0."""
_UNCOUNTED = "Not counted yet: {names}."
_LACKING = "Not in it, for their answers were not kept: {names}."
_LEGEND = "o vision  s projector\n^ decoder  x picture"
_WORK = """\
10⁹ operations up to the first token, counted from the graphs (matrix products, convolutions, attention; a \
multiply-add is two): the vision tower with the projector + the decoder's reading of the prompt. What a \
pruner computes is not in it: its time is above. All tokens kept: {unpruned}."""


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
    """The table of docs/methods.md: exact match in percent by keep-count, best first at the middle one.

    Operations have a column once those of every method were counted.
    """
    methods, keeps = _methods(results), _keeps(results)
    cells = {(row["method"], row["keep"]): row for row in results["rows"]}
    middle = _middle(keeps)
    costs = {f"TTFT at {middle}, ms": _ttft}
    if all("gflop" in row for row in results["rows"] if row["keep"] != BLANK):
        costs = {f"GFLOP at {middle}": _work, **costs}
    header = ["method", "site", *(f"K = {keep}" for keep in keeps), *costs]
    none = _none(results)
    empty, whole = [""] * (len(keeps) - 1), f"{_percent(none, results):.1f}"
    rows = [[f"none (all {none['keep']})", "-", whole, *empty, *(cost(none) for cost in costs.values())]]
    for method in methods:
        own, row = [cells[method, keep] for keep in keeps], cells[method, middle]
        rates = [f"{_percent(one, results):.1f}{_tokens(one, ' ({})')}" for one in own]
        rows.append([method, row["site"], *rates, *(cost(row) for cost in costs.values())])
    return markdown_table(header, rows, left=2, tight=True)


def page(results: Mapping[str, Any]) -> str:
    """docs/measured.md: intervals, kinds of question, and milliseconds."""
    rows = results["rows"]
    none = {row["keep"]: row for row in rows if row["method"] == "none"}
    unpruned = _none(results)
    parts = [
        "# The methods, measured",
        " ".join([_INTRODUCTION.format(**results, command=COMMAND), *_untimed(results)]),
        *_smaller(results),
        "![accuracy and time to first token against tokens kept](methods.png)",
        "\n".join(
            f"- {'a grey picture' if keep == BLANK else 'every token kept'}: {_interval(row, results)}"
            for keep, row in none.items()
        ),
        "## Exact match, %",
        _table(results, lambda row: f"{_interval(row, results)}{_tokens(row)}"),
        *_against(results, DOWNSAMPLE, "a smaller picture"),
        *_against(results, RANDOM, "a random choice"),
        "## Time to first token, ms",
        _TIMES.format(**results, unpruned=unpruned["ttft"]),
        _table(results, lambda row: f"{_ttft(row)} ({row['pruner']:.1f})" if "ttft" in row else ""),
    ]
    if any("gflop" in row for row in rows):
        counted = [name for name in _methods(results) if all("gflop" in row for row in _rows(results, name))]
        lacking = [name for name in _methods(results) if name not in counted]
        said = [_WORK.format(unpruned=_work(unpruned))]
        said += [_UNCOUNTED.format(names=_listed(lacking))] if lacking else []
        parts += ["## Operations", " ".join(said), _table(results, _work, counted)]
    for kind in rows[0]["kinds"]:
        parts += [f"## {kind}, %", _table(results, lambda row, kind=kind: _kind(row, kind))]
    return "\n\n".join(parts) + "\n"


def _smaller(results: Mapping[str, Any]) -> list[str]:
    """What the row of the smaller picture is, where there is one."""
    found = [str(row["tokens"]) for row in results["rows"] if row["method"] == DOWNSAMPLE]
    return [_SMALLER.format(tokens=", ".join(found))] if found else []


def _untimed(results: Mapping[str, Any]) -> list[str]:
    """Who was asked later and so has no times."""
    names = [name for name in _methods(results) if not any("ttft" in row for row in _rows(results, name))]
    one = len(names) == 1
    was, has = ("was", "has") if one else ("were", "have")
    said = [_LATER.format(names=_listed(names), was=was, has=has)] if names else []
    again = [name for name in results.get("again", ()) if name not in names]
    if again:
        said.append(_AGAIN.format(names=_listed(again), was="was" if len(again) == 1 else "were"))
    return said


def _listed(names: Sequence[str]) -> str:
    """`one`, `two` and `three`."""
    quoted = [f"`{name}`" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def _against(results: Mapping[str, Any], base: str, words: str) -> list[str]:
    """By how many points every method is ahead of `base` at every keep-count; nothing without its answers."""
    keeps = _keeps(results)
    theirs = {row["keep"]: row for row in _rows(results, base) if "answers" in row}
    methods = [
        name
        for name in _methods(results)
        if name != base and all("answers" in row for row in _rows(results, name))
    ]
    if set(theirs) != set(keeps) or not methods:
        return []
    cells = {(row["method"], row["keep"]): row for row in results["rows"]}
    lines = [
        [name, *(ahead(cells[name, keep], theirs[keep], results["questions"]) for keep in keeps)]
        for name in methods
    ]
    header = ["method", *(f"K = {keep}{_tokens(theirs[keep])}" for keep in keeps)]
    table = markdown_table(header, lines, left=1, tight=True)
    lacking = [name for name in _methods(results) if name not in (*methods, base)]
    left_out = [_LACKING.format(names=_listed(lacking))] if lacking else []
    said = " ".join([_PAIRED.format(base=f"`{base}`"), *left_out])
    return [f"## Against {words}, points", said, table]


def ahead(mine: Mapping[str, Any], theirs: Mapping[str, Any], questions: int) -> str:
    """How many points one row is ahead of another, with the 95 % interval, from both rows' answers."""
    gap = unpacked(mine["answers"], questions) - unpacked(theirs["answers"], questions)
    of_each = len(mine["kinds"])  # a picture has one question of each kind
    low, high = interval(gap, [number // of_each for number in range(questions)])
    return f"{100 * gap.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def unpacked(answers: str, questions: int) -> np.ndarray:
    """float64 [questions], 1 for a right answer, of the hexadecimal digits that methods.json holds."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(answers), np.uint8))
    return bits[:questions].astype(float)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy with its intervals and TTFT, both against tokens kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keeps, total = _keeps(results), results["questions"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6.5), sharex=True)
    marks = {"vision": "o", "projector": "s", "decoder": "^", "--tower": "x"}
    for number, method in enumerate(_methods(results)):
        rows = sorted(_rows(results, method), key=lambda row: row["keep"])
        colour, mark = f"C{number % 10}", marks[rows[0]["site"].partition(":")[0]]
        colour = "black" if method == DOWNSAMPLE else colour
        style = "-" if number < 10 else "--"
        kept = [row.get("tokens", row["keep"]) for row in rows]
        rates = [100 * row["right"] / total for row in rows]
        ends = [[100 * end for end in wilson(row["right"], total)] for row in rows]
        away = [[rate - low for rate, (low, _) in zip(rates, ends, strict=True)]]
        away.append([high - rate for rate, (_, high) in zip(rates, ends, strict=True)])
        left.errorbar(
            kept, rates, away, label=method, color=colour, marker=mark, ls=style, ms=4, lw=1, capsize=2
        )
        if all("ttft" in row for row in rows):
            right.plot(kept, [row["ttft"] for row in rows], color=colour, marker=mark, ls=style, ms=4, lw=1)
    none = _none(results)
    left.axhline(100 * none["right"] / total, color="black", lw=0.8, ls=":")
    right.axhline(none["ttft"], color="black", lw=0.8, ls=":")
    for axes, title in ((left, "exact match, %"), (right, "time to first token, ms")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(keeps, [str(keep) for keep in keeps])
        axes.set_xlabel("visual tokens kept of 576")
        axes.set_title(f"{title} (dotted: all tokens)")
        axes.grid(alpha=0.3)
    right.set_ylim(bottom=0)
    figure.legend(loc="center right", fontsize=9, title=_LEGEND, title_fontsize=7)
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _methods(results: Mapping[str, Any]) -> list[str]:
    """Methods other than none, best first at the middle keep-count."""
    middle = _middle(_keeps(results))
    rows = [row for row in results["rows"] if row["keep"] == middle and row["method"] != "none"]
    return [row["method"] for row in sorted(rows, key=lambda row: (-row["right"], row["method"]))]


def _rows(results: Mapping[str, Any], method: str) -> list[Mapping[str, Any]]:
    return [row for row in results["rows"] if row["method"] == method]


def _none(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of every token kept."""
    return next(row for row in _rows(results, "none") if row["keep"] != BLANK)


def _tokens(row: Mapping[str, Any], form: str = ", {} tokens") -> str:
    """The number of tokens behind a figure, where it is not the column's."""
    tokens = row.get("tokens", row["keep"])
    return "" if tokens == row["keep"] else form.format(tokens)


def _work(row: Mapping[str, Any]) -> str:
    """Operations of tower and decoder, "" if they were not counted."""
    return f"{row['gflop']['tower']:.2f} + {row['gflop']['decoder']:.2f}" if "gflop" in row else ""


def _ttft(row: Mapping[str, Any]) -> str:
    return f"{row['ttft']:.0f}" if "ttft" in row else ""


def _keeps(results: Mapping[str, Any]) -> list[int]:
    return sorted({row["keep"] for row in results["rows"] if row["method"] != "none"}, reverse=True)


def _middle(keeps: Sequence[int]) -> int:
    return keeps[len(keeps) // 2]


def _table(results: Mapping[str, Any], cell: Any, methods: Sequence[str] | None = None) -> str:
    keeps, cells = _keeps(results), {(row["method"], row["keep"]): row for row in results["rows"]}
    header = ["method", *(f"K = {keep}" for keep in keeps)]
    names = _methods(results) if methods is None else methods
    rows = [[method, *(cell(cells[method, keep]) for keep in keeps)] for method in names]
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
