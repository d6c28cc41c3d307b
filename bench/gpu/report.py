"""The figures of `vtp.bench.gpu.command` as a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vtp.runtime.commands.tables import markdown_table


def markdown(results: Mapping[str, Any]) -> str:
    """One page: the hardware, every check's outcome, then the figures of those that ran."""
    machine, bundles = results["machine"], results["bundles"]
    parts = [
        f"# {results['name']}, {results['engine']}",
        f"Made by `python -m vtp.bench.gpu.command` at {results['time']}.",
        "\n".join(f"- {key}: {value}" for key, value in machine.items() if value),
        "## Checks",
        outcomes(bundles),
        *_times(bundles),
        *_agreement(bundles),
        *_accuracy(bundles),
        *_engines(bundles),
        *_nodes(bundles),
    ]
    return "\n\n".join(parts) + "\n"


def outcomes(bundles: Mapping[str, Any]) -> str:
    """A row for every check of every bundle."""
    rows = [
        [name, check, outcome(found)]
        for name, bundle in bundles.items()
        for check, found in bundle["checks"].items()
    ]
    return markdown_table(["bundle", "check", "outcome"], rows)


def write_results(target: Path, results: Mapping[str, Any], page: str) -> None:
    """Write the results as JSON to `target`, and the page about them beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(page, encoding="utf-8")


def measured_before(target: Path, quick: bool) -> dict[str, Any]:
    """What an earlier run of the same kind wrote to `target` of its bundles; nothing without one."""
    if not target.is_file():
        return {}
    before = json.loads(target.read_text(encoding="utf-8"))
    return dict(before["bundles"]) if before["quick"] == quick else {}


def outcome(found: Mapping[str, Any]) -> str:
    """A check's status, with its note where there is one."""
    reason = str(found.get("note") or "").replace("|", "/")
    return f"{found['status']}: {reason}" if reason else found["status"]


def _ran(bundles: Mapping[str, Any], check: str) -> Iterable[tuple[str, Any]]:
    for name, bundle in bundles.items():
        found = bundle["checks"].get(check)
        if found and found["status"] != "failed":
            yield name, found


def _times(bundles: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, found in _ran(bundles, "times"):
        for stage, ms in found["ms"].items():
            rows.append([name, stage, f"{ms['median']:.3f}", f"{ms['low']:.3f} to {ms['high']:.3f}"])
        graph = bundles[name]["checks"].get("cuda_graph", {}).get("ms", {})
        for how, ms in graph.items():
            spread = f"{ms['low']:.3f} to {ms['high']:.3f}"
            rows.append([name, f"decode step, {how}", f"{ms['median']:.3f}", spread])
        rows.append([name, "memory added", f"{found['memory'] / 2**20:.0f} MiB", ""])
    if not rows:
        return []
    said = "Milliseconds, batch 1; stages and decode steps each timed on an idle device."
    return ["## Times", said, markdown_table(["bundle", "stage", "median", "quartiles"], rows)]


def _agreement(bundles: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{label}, {against}",
            f"{one['answers_equal']} of {one['questions']}",
            f"{one['cosine_min']:.6f}",
            f"{one['relative_max']:.4f}",
            f"{one['kept_equal']} of {one['questions']}",
            f"{one['kept_overlap']:.3f}",
        ]
        for check, label in (("agreement", "ort-cpu"), ("cuda_graph", "steps replayed"))
        for name, found in _ran(bundles, check)
        for against, one in found["against"].items()
    ]
    header = ["bundle", "against", "equal answers", "least cosine", "largest difference"]
    return (
        ["## Agreement", markdown_table([*header, "equal selections", "least overlap"], rows)] if rows else []
    )


def _accuracy(bundles: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{found['right']} of {found['questions']}",
            " to ".join(f"{100 * bound:.1f}" for bound in found["interval"]),
        ]
        for name, found in _ran(bundles, "accuracy")
    ]
    return ["## Accuracy", markdown_table(["bundle", "right", "95 % interval, %"], rows)] if rows else []


def _engines(bundles: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            file,
            f"{gate.get('cosine', 0):.6f}",
            f"{gate.get('relative', 0):.4f}",
            "yes" if gate.get("passed") else "no",
            f"{found['seconds'][file]:.1f}",
        ]
        for name, found in _ran(bundles, "engines")
        for file, gate in found["gates"].items()
    ]
    header = ["bundle", "graph", "least cosine", "largest difference", "usable", "seconds to build"]
    return ["## Engines against ONNX Runtime", markdown_table(header, rows)] if rows else []


def _nodes(bundles: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, file, *(_counts(graph[key]) for key in ("providers", "strays", "copies"))]
        for name, found in _ran(bundles, "nodes")
        for file, graph in found["graphs"].items()
    ]
    header = ["bundle", "graph", "nodes by provider", "left to the CPU", "copies"]
    return ["## Where nodes run", markdown_table(header, rows)] if rows else []


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {count}" for key, count in found.items()) or "none"
