"""The figures of `vtp.bench.gpu.shape` as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtp.bench.gpu.report import outcomes
from vtp.runtime.commands.tables import markdown_table

_MET = {True: "met", False: "missed", None: "not measured"}


def markdown(results: Mapping[str, Any]) -> str:
    """One page: the hardware, the aims, then times, ratios and memory of what ran."""
    bundles = results["bundles"]
    ran = {label: one["checks"]["beside"] for label, one in bundles.items() if _ran(one)}
    parts = [
        f"# {results['shape']} on {results['name']}, {results['engine']}",
        f"Made by `python -m vtp.bench.gpu.shape` at {results['time']}"
        + (", quick: few rounds." if results["quick"] else "."),
        "Random float16 weights: scales of norms one, all else normal with standard deviation 0.02. PyTorch "
        "is transformers unpruned on the same device with the same numbers: `dynamic` with a growing cache, "
        "`static` with a fixed one, recorded as CUDA graphs on a GPU. Batch 1.",
        "\n".join(f"- {key}: {value}" for key, value in results["machine"].items() if value),
        "## Checks",
        outcomes(bundles),
        *(f"- {label}: {note}" for label, one in ran.items() for note in one["decisions"]),
    ]
    if ran:
        parts += ["## Aims", _aims(results), *_times(ran), *_ratios(ran), *_memory(ran)]
    return "\n\n".join(parts) + "\n"


def _ran(bundle: Mapping[str, Any]) -> bool:
    return "ms" in bundle["checks"].get("beside", {})


def _aims(results: Mapping[str, Any]) -> str:
    rows = [
        [
            one["bundle"],
            one["what"],
            f"at {'most' if one['most'] else 'least'} {one['aim']:g}",
            "" if one["found"] is None else f"{one['found']:.3f}",
            _MET[one["met"]],
        ]
        for one in results["aims"]
    ]
    return markdown_table(["bundle", "what", "aim", "found", ""], rows)


def _times(ran: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            label,
            who,
            str(one["tokens"][who]),
            part,
            f"{ms['median']:.3f}",
            f"{ms['low']:.3f} to {ms['high']:.3f}",
        ]
        for label, one in ran.items()
        for who, parts in one["ms"].items()
        for part, ms in parts.items()
    ]
    return [
        "## Milliseconds",
        markdown_table(["bundle", "who", "tokens", "part", "median", "quartiles"], rows),
    ]


def _ratios(ran: Mapping[str, Any]) -> list[str]:
    rows = [
        [label, f"PyTorch {way}", part, f"{found['ratio']:.2f}", f"{found['low']:.2f} to {found['high']:.2f}"]
        for label, one in ran.items()
        for way, parts in one["ratios"].items()
        for part, found in parts.items()
    ]
    said = "How many times longer PyTorch takes, turn by turn, with the 95 % interval."
    return (
        ["## Ratios", said, markdown_table(["bundle", "beside", "part", "ratio", "95 %"], rows)]
        if rows
        else []
    )


def _memory(ran: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            label,
            *(f"{one['memory'][who] / 2**30:.2f} GiB" for who in ("vtp", "torch")),
            f"{one['step_bytes'] / 1e9:.3f} GB",
            ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in one["bandwidth"].items()),
            ", ".join(f"{key} {value:.6g}" for key, value in one["logits"].items()),
        ]
        for label, one in ran.items()
    ]
    header = ["bundle", "memory added, vtp", "PyTorch (all ways)", "read by a step", "memory's rate, GB/s"]
    return ["## Memory", markdown_table([*header, "logits beside PyTorch's"], rows)]
