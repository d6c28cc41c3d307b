"""What vtp-bench found, as a table, as CSV and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import Any

from vtp.engines import UsageError
from vtp.engines.errors import shown
from vtp.runtime.commands.console import table

_PICTURES = (".png", ".svg", ".pdf")
_PARTS = ("preprocess", "encoder", "pruner", "prefill", "host")


def render(results: Mapping[str, Any]) -> str:
    """The page that a terminal shows."""
    return "\n\n".join([_head(results), _stages(results), "\n".join(_lines(results))])


def _head(results: Mapping[str, Any]) -> str:
    bundle, machine, visual = results["bundle"], results["machine"], results["visual_tokens"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    return (
        f"{shown(bundle['name'])}: {shown(bundle['method'])}, {shown(bundle['dtype'])}, visual tokens "
        f"{visual['before']} → {visual['after']}, {results['prompt_tokens']} text tokens\n"
        f"{results['engine']}, {results['settings']['threads']} threads, "
        f"{results['settings']['repeats']} runs; {machine['processor']}, {machine['cores']} cores{gpu}\n"
        f"{versions}; Python {machine['python']}; {machine['time']}"
    )


def _stages(results: Mapping[str, Any]) -> str:
    rows = [
        [
            stage["stage"],
            stage["part"],
            f"{stage['ms']['median']:.2f}",
            f"{stage['ms']['low']:.2f} to {stage['ms']['high']:.2f}",
            f"{stage['flops'] / 1e9:.2f}{'+' if stage.get('unknown') else ''}",
            f"{100 * stage['share']:.0f} %" if stage["flops"] else "",
        ]
        for stage in results["stages"]
    ]
    return table(["stage", "part", "ms", "quartiles", "GFLOP", "of GEMM rate"], rows)


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    """What was measured in plain lines: first token, further ones, the machine, memory, energy."""
    parts, ttft, limit = results["parts"], results["ttft_ms"], results["ceiling"]
    named = ", ".join(f"{name} {parts[name]:.1f}" for name in _PARTS)
    yield f"time to first token  {_spread(ttft)} ms: {named}"
    if results["tpot_ms"]["runs"]:
        yield (
            f"each further token   {_spread(results['tpot_ms'])} ms, "
            f"{results['tokens_per_s']['median']:.1f} tokens/s"
        )
        share = results["decode"]["share"]
        yield (
            f"decoding reads       {results['decode']['bytes'] / 1e6:.1f} MB a token: "
            f"{results['decode']['bytes_per_s'] / 1e9:.1f} GB/s, {100 * share:.0f} % of the memory's rate"
        )
    host = results["host_ms"]
    if host["request"]["runs"]:
        yield "outside the engine   " + ", ".join(
            f"{_spread(host[name])} ms a {name}" for name in ("request", "token") if host[name]["runs"]
        )
    yield (
        f"machine, same engine {limit['gemm']['median'] / 1e9:.1f} GFLOP/s ({limit['gemm']['graph']}), "
        f"{limit['memory']['median'] / 1e9:.1f} GB/s ({limit['memory']['graph']})"
    )
    yield from _memory(results["memory"])
    yield _energy(results["energy"])


def _memory(memory: Mapping[str, Any]) -> Iterator[str]:
    told = ", ".join(f"{name} {memory[name] / 1e6:.1f}" for name in ("weights", "kv", "activations"))
    yield f"memory, MB           {told} (at most, of one stage)"
    if memory["peak"]:
        over = "" if memory["over"] is None else f": weights + KV {100 * memory['over']:+.1f} %"
        yield (
            f"peak resident, MB    {memory['peak'] / 1e6:.1f}, {memory['process'] / 1e6:.1f} of it "
            f"before the bundle{over}"
        )


def _energy(energy: Mapping[str, Any]) -> str:
    if "joules" not in energy:
        return f"energy               {energy['note']}"
    return (
        f"energy               {energy['joules']:.2f} J a run, {energy['watts']:.1f} W ({energy['source']})"
    )


def _spread(values: Mapping[str, Any]) -> str:
    return f"{values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f})"


def csv_text(results: Mapping[str, Any]) -> str:
    """Every figure as a line: figure, unit, median, low, high, runs, flops, share of the machine's rate."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["figure", "unit", "median", "low", "high", "runs", "flops", "share"])
    for stage in results["stages"]:
        _write(writer, f"stage {stage['stage']}", "ms", stage["ms"], stage["flops"], stage.get("share"))
    decode = results["decode"]
    _write(writer, "ttft", "ms", results["ttft_ms"])
    _write(writer, "tpot", "ms", results["tpot_ms"], decode["flops"], decode.get("share"))
    _write(writer, "tokens", "1/s", results["tokens_per_s"])
    for name, spread in results["host_ms"].items():
        _write(writer, f"host, {name}", "ms", spread)
    _write(writer, "gemm", "FLOP/s", results["ceiling"]["gemm"])
    _write(writer, "memory", "B/s", results["ceiling"]["memory"])
    for name in ("weights", "kv", "activations", "process", "peak"):
        writer.writerow([f"memory, {name}", "B", results["memory"][name], "", "", "", "", ""])
    if "joules" in results["energy"]:
        writer.writerow(["energy", "J", results["energy"]["joules"], "", "", "", "", ""])
    return out.getvalue()


def _write(writer: Any, name: str, unit: str, spread: Mapping[str, Any], *more: Any) -> None:
    if spread["runs"]:
        figures = [spread[key] for key in ("median", "low", "high", "runs")]
        writer.writerow([name, unit, *figures, *more, *[""] * (2 - len(more))])


def check_plot(path: str) -> None:
    """Refuse a picture that could not be written, before anything is measured."""
    suffix = Path(path).suffix.lower()
    if suffix not in _PICTURES:
        raise UsageError(f"plot '{path}' ends in '{suffix}'; choose one of {', '.join(_PICTURES)}")
    if util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; run: pip install 'vtp-edge[bench]'")


def plot(results: Mapping[str, Any], path: Path) -> None:
    """The stages of a first token, with quartiles; hatched bars show the machine's rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = [stage for stage in results["stages"] if stage["ms"]["median"] > 0][::-1]
    gemm = results["ceiling"]["gemm"]["median"]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(stages) + 1.6))
    for place, stage in enumerate(stages):
        ms = stage["ms"]
        away = [[ms["median"] - ms["low"]], [ms["high"] - ms["median"]]]
        colour = f"C{_PARTS.index(stage['part'])}"
        axes.barh(place, ms["median"], xerr=away, color=colour, capsize=2)
        limit = stage["flops"] / gemm * 1e3
        axes.barh(place, limit, facecolor="none", edgecolor="black", hatch="//", lw=0.5)
    axes.set_yticks(range(len(stages)), [stage["stage"] for stage in stages])
    axes.set_xlabel("ms (hatched: its products at the machine's rate)")
    axes.set_title(
        f"{results['bundle']['name']}: first token {results['ttft_ms']['median']:.0f} ms", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
