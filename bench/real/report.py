"""A set's results as a Markdown page: the table, what it was measured on, and what papers give beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vtp.bench.real.published import MODEL, SOURCES, Published, published_for
from vtp.engines.errors import shown
from vtp.runtime.commands.tables import markdown_table

_HINTED = " Before it, the words that an OCR read in the picture."
_SENDING = (
    "To send these figures: attach this page and the file {name}.json beside it to an issue (docs/real.md)."
)


def page(results: Mapping[str, Any]) -> str:
    """The whole page of one set."""
    told = published_for(results["model"]) if results["set"] in ("gqa", "pope", "textvqa") else ()
    parts = [
        f"# {shown(results['model'])} on {results['title']}",
        _measured_on(results),
        table(results, told),
        *_details(results),
        *_published(results, told),
        _SENDING.format(name=results["set"]),
    ]
    return "\n\n".join(parts) + "\n"


def table(results: Mapping[str, Any], told: Sequence[Published]) -> str:
    """Our figures, each beside those that papers give for the method at that keep-count."""
    header = ["method", "kept", f"{results['score']} % (95 %)", "to unpruned, points (95 %)", "of unpruned %"]
    columns = [*header, "TTFT ms", *(["papers %"] if told else [])]
    rows, base = [], results["rows"][0]["score"][0]
    for row in results["rows"]:
        value, low, high = (100 * one for one in row["score"])
        share = f"{100 * row['score'][0] / base:.1f}" if base else "-"
        cells = [shown(row["method"]), str(row["keep"]), f"{value:.1f} ({low:.1f} to {high:.1f})"]
        cells += [_gap(row, results["rows"][0]), share, f"{row['ttft_ms']:.0f}"]
        rows.append([*cells, *([_told(row, told, results["set"])] if told else [])])
    return markdown_table(columns, rows, left=1)


def _gap(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    if row is first:
        return "-"
    value, low, high = (100 * one for one in row["difference"])
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _told(row: Mapping[str, Any], told: Sequence[Published], name: str) -> str:
    same = [one for one in told if (one.method, one.keep) == (row["method"], row["keep"])]
    return ", ".join(f"{one.of(name)} [{one.source}]" for one in same if one.of(name) is not None)


def _measured_on(results: Mapping[str, Any]) -> str:
    conditions = results["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    limited = f"the first {results['limit']} of each file" if results["limit"] else "all"
    lines = [
        f"- {results['questions']} questions ({limited}); scorer: {results['metric']}, as the authors' code",
        f"- prompt: {shown(results['prompt'])}{_HINTED if results['hinted'] else ''}",
        f"- system prompt: {shown(results['system']) or 'none'}",
        f"- {results['visual_tokens']} visual tokens unpruned; pictures: {results['image_fit']}; greedy, at "
        f"most {results['max_new_tokens']} tokens",
        f"- bundles: target {results['target']}, {results['dtype']}, held against torch: {results['verify']}",
        f"- {shown(conditions['engine'])}, threads {conditions['threads'] or 'all'}, "
        f"{shown(conditions['machine'])}; {shown(versions)}",
        f"- command: `{shown(results['command'], 500)}`",
    ]
    return "\n".join(lines)


def _details(results: Mapping[str, Any]) -> Iterator[str]:
    """Figures of the kinds of question that the set tells apart."""
    kinds = list(results["rows"][0]["parts"])
    if not kinds:
        return
    names = [name for name in results["rows"][0]["parts"][kinds[0]] if name != "questions"]
    rows = [
        [shown(row["method"]), str(row["keep"]), kind, str(part["questions"])]
        + [f"{100 * part[name]:.1f}" for name in names]
        for row in results["rows"]
        for kind, part in row["parts"].items()
    ]
    yield markdown_table(
        ["method", "kept", "part", "questions", *(f"{name} %" for name in names)], rows, left=1
    )


def _published(results: Mapping[str, Any], told: Sequence[Published]) -> Iterator[str]:
    if not told:
        return
    name = results["set"]
    rows = [
        [one.method, str(one.keep), "" if one.of(name) is None else f"{one.of(name)}", one.source]
        for one in sorted(told, key=lambda one: (-one.keep, one.method, one.source))
    ]
    yield f"Papers on {MODEL} (their prompts, weights and rounding; gaps of less than a point mean nothing):"
    yield markdown_table(["method", "kept", "%", "source"], rows, left=1)
    yield "\n".join(f"- [{key}] {source}" for key, source in SOURCES.items())
