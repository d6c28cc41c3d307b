"""What `vtp.bench.compare.peers` found: docs/bench.json, docs/bench.md and the README's table.

python -m vtp.bench.compare.peers_report      writes the page and the table again from docs/bench.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vtp.bench.common.checkout import checkout
from vtp.bench.common.markdown import markdown_table, milliseconds
from vtp.bench.common.pairs import BASE, beside_base, fastest_of, find_pair
from vtp.engines import UsageError
from vtp.runtime.commands.console import run_command

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
COMMAND = "make bench"
FORMAT = 2  # of docs/bench.json: each pair holds the milliseconds and the ratio of its own turns
OUTDATED = (
    "Milliseconds and ratios of this run come from different turns, so they contradict each other in places; "
    "`make bench` now takes both from the same turns, and writes this anew."
)
ROUNDS = "10"  # what the command takes unless told otherwise
# A share of the machine's rate above this says that the rate was measured too low, and so nothing else.
POSSIBLE = 1.05
VERDICT = {True: "met", False: "**missed**", None: "**not known**: above the machine's rate as measured"}
WHAT = {
    "torch": "PyTorch transformers, all tokens",
    "transformers-onnx": "transformers' OnnxExporter on ONNX Runtime, all tokens",
    "openvino": "transformers' OpenVINO exporter, all tokens",
    "torch-vispruner": "PyTorch transformers with VisPruner",
    "vtp none": "vtp, all tokens",
    "vtp vispruner": "vtp, vispruner",
    "vtp adaptprune": "vtp, adaptprune",
    "vtp vispruner int8": "vtp, vispruner, int8 encoder",
    "vtp vispruner int4": "vtp, vispruner, int4 decoder",
    "vtp vispruner int8 int4": "vtp, vispruner, int8 encoder, int4 decoder",
    "genai": "onnxruntime-genai",
    "vtp decoder": "vtp's decoder graph",
    "genai-int4": "onnxruntime-genai",
    "vtp decoder int4": "vtp's decoder graph",
}
DECODERS = {"float32": ("genai", "vtp decoder"), "int4": ("genai-int4", "vtp decoder int4")}
_SAME_CODES = (
    "int4: symmetric, blocks of 32, rounded to the nearest by the same rule, the head included and the "
    "embedding not; both multiply with activations in int8 (accuracy level 4)."
)
_INTRODUCTION = """\
Made by `{command}` at {time}: {processor}, {cores} cores, {memory} GB; {system}; Python {python}; {versions}.

Model `{model}`, float32, batch 1, {threads} threads for everybody. One picture, one short question, greedy, \
{tokens} new tokens; pruned to {keep} visual tokens. Times go from the picture's file to the token: \
preprocessing, pruner and host are in them. Every peer has a process of its own; peer and vtp answer in \
turns, {rounds} rounds. A line's milliseconds are the medians of these turns, its ratio is their quotient, \
with the 95 % interval of a bootstrap over the turns: how many times longer the peer takes."""


def write_report(results: Mapping[str, Any], root: Path) -> str:
    """Write docs/bench.json and docs/bench.md, and the table in the README; returns the table."""
    (root / "docs").mkdir(parents=True, exist_ok=True)
    (root / "docs/bench.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (root / "docs/bench.md").write_text(page(results), encoding="utf-8")
    readme, table = root / "README.md", summary(results)
    if readme.exists():
        readme.write_text(with_table(readme.read_text(encoding="utf-8"), table), encoding="utf-8")
    return table


def with_table(text: str, table: str) -> str:
    """`text` with what stands between the marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}" if rest else text


def summary(results: Mapping[str, Any]) -> str:
    """The README's table: every peer beside vtp vispruner, and every other bundle beside the fastest peer."""
    machine = results["machine"]
    parts = [_beside(beside_base(results), "peer", f"vtp at {results['keep']} beside it")]
    variants = _variant_pairs(results)
    if variants:
        parts.append(
            f"The fastest unpruned peer, {WHAT[str(fastest_of(results))]}, beside vtp's other bundles:"
        )
        parts.append(_beside(variants, "vtp", "vtp beside it", of="ours"))
    where = f"{results['model']}, float32, {machine['processor']}, {results['threads']} threads"
    where += f", {machine['time'][:10]}. More in [docs/bench.md](docs/bench.md)."
    return "\n\n".join([*parts, where])


def _beside(pairs: Iterable[Mapping[str, Any]], who: str, ours: str, of: str = "theirs") -> str:
    """First tokens of pairs in short: the medians of both, and their quotient."""
    rows = []
    for pair in pairs:
        one, two = (pair["ms"][pair[side]]["ttft"] for side in ("theirs", "ours"))
        rows.append([WHAT.get(pair[of], pair[of]), _ms(one), _ms(two), _ratio(pair["ttft"])])
    return markdown_table([who, "first token of the peer, ms", f"{ours}, ms", "times (95 %)"], rows, left=1)


def page(results: Mapping[str, Any]) -> str:
    """docs/bench.md."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    known = {
        **machine,
        **results,
        "versions": versions,
        "memory": machine["memory_gb"],
        "command": _command(results),
    }
    parts = ["# vtp beside its peers", _INTRODUCTION.format(**known), _whole(results)]
    parts += _variants(results) + _fewer_bits(results) + _decoders(results) + _aims(results)
    for name, found in results["stages"].items():
        parts += [f"## Where the time of {name} goes", _stages(found), _notes(found)]
    parts += _absent(results)
    return "\n\n".join(parts) + "\n"


def _command(results: Mapping[str, Any]) -> str:
    rounds = [] if str(results["rounds"]) == ROUNDS else ["--rounds", str(results["rounds"])]
    flags = results.get("flags", rounds)
    return f'{COMMAND} BENCH="{" ".join(flags)}"' if flags else COMMAND


def _whole(results: Mapping[str, Any]) -> str:
    rows = []
    for pair in beside_base(results):
        found = results["peers"][pair["theirs"]]
        rows.append([*_both(pair, "theirs"), f"{found['peak'] / 1e6:.0f}", _equal(found.get("equal"))])
    return markdown_table([*_header("vtp vispruner"), "peak memory, MB", "held against"], rows, left=1)


def _variants(results: Mapping[str, Any]) -> list[str]:
    """The fastest unpruned peer against every other bundle of vtp's."""
    rows = [
        [*_both(pair, "ours"), f"{results['peers'][pair['ours']]['peak'] / 1e6:.0f}"]
        for pair in _variant_pairs(results)
    ]
    if not rows:
        return []
    said = f"{WHAT[str(fastest_of(results))]} takes the least time of the unpruned peers above. Beside vtp's "
    said += "other bundles, each line in turns of its own:"
    table = markdown_table([*_header("the bundle"), "peak memory, MB"], rows, left=1)
    return ["## The fastest unpruned peer", said, table]


def _variant_pairs(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    fastest = fastest_of(results)
    return [pair for pair in results["pairs"] if pair["theirs"] == fastest and pair["ours"] != BASE]


def _header(ours: str) -> list[str]:
    first = ["first token of the peer, ms (quartiles)", f"of {ours}, ms", "times (95 %)"]
    return ["", *first, "each further, ms", f"of {ours}, ms", "times (95 %)"]


def _both(pair: Mapping[str, Any], of: str) -> list[str]:
    """A line's name, and for first and further tokens: the peer's milliseconds, vtp's, and their quotient."""
    cells = [WHAT.get(pair[of], pair[of])]
    for what in ("ttft", "tpot"):
        one, two = (pair["ms"][pair[side]][what] for side in ("theirs", "ours"))
        cells += [_spread(one), _spread(two), _ratio(pair[what])]
    return cells


def _fewer_bits(results: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- {WHAT[name]}: {found['layers']} layers in fewer bits, {found['left']} left in float"
        for name, found in results.get("fewer_bits", {}).items()
    ]
    said = (
        "Made by `vtp-calib quantize`'s machinery on the built-in pictures. The weights are random, so this "
        "says what fewer bits save and nothing of what they cost (docs/calibration.md has that, on a trained "
        "model)."
    )
    return ["## Fewer bits", said, "\n".join(lines)] if lines else []


def _decoders(results: Mapping[str, Any]) -> list[str]:
    found = [(name, pair) for name, pair in DECODERS.items() if find_pair(results, *pair)]
    parts = [part for name, pair in found for part in _decoder(results, name, pair)]
    return ["## onnxruntime-genai", *parts] if parts else []


def _decoder(results: Mapping[str, Any], precision: str, names: tuple[str, str]) -> list[str]:
    pair = find_pair(results, *names)
    assert pair is not None  # asked for where there is one
    rows = [
        [
            WHAT[name],
            _spread(pair["ms"][name]["ttft"]),
            _spread(pair["ms"][name]["tpot"]),
            f"{results['peers'][name]['peak'] / 1e6:.0f}",
        ]
        for name in names
    ]
    rows.append(["times vtp's", _ratio(pair["ttft"]), _ratio(pair["tpot"]), ""])
    said = (
        f"The decoder alone on {results['decoder_tokens']} text tokens, {precision}, the same weights; equal "
        f"answers: {_equal(results['peers'][names[1]].get('equal'))}."
    )
    if precision == "int4":
        said += f" {_SAME_CODES}"
    header = ["", "prompt, ms (quartiles)", "each further, ms", "peak memory, MB"]
    return [said, markdown_table(header, rows, left=1)]


def _aims(results: Mapping[str, Any]) -> list[str]:
    """What was aimed at, what came out, and whether the lower bound reaches it."""
    rows = [[what, aim, found, VERDICT[met]] for what, aim, found, met in aims(results)]
    if not rows:
        return []
    said = "Of ratios the interval's lower bound counts."
    return ["## Aims", said, markdown_table(["", "aim", "found", ""], rows, left=1)]


def aims(results: Mapping[str, Any]) -> list[tuple[str, str, str, bool | None]]:
    """(what, aim, found, met) for every aim whose figures are there; met is None where they cannot tell."""
    rows: list[tuple[str, str, str, bool | None]] = []
    fastest = fastest_of(results)
    for what, theirs, ours, key, least in (
        ("first token, fastest unpruned peer", fastest, BASE, "ttft", 1.75),
        ("first token, PyTorch unpruned", "torch", BASE, "ttft", 4.3),
        ("first token, int8 encoder, fastest unpruned peer", fastest, f"{BASE} int8", "ttft", 2.5),
        ("each further token, onnxruntime-genai", *DECODERS["float32"], "tpot", 1.0),
        ("each further token, onnxruntime-genai, int4", *DECODERS["int4"], "tpot", 1.0),
    ):
        pair = find_pair(results, theirs, ours)
        if pair:
            rows.append((what, f"at least {least:g} times", _ratio(pair[key]), pair[key]["low"] >= least))
    for name, share in ((BASE, 0.01), ("vtp adaptprune", 0.02)):
        found = results["stages"].get(name)
        if found:
            part = found["parts"]["pruner"] / found["ttft_ms"]["median"]
            rows.append(
                (f"pruner, {name}", f"at most {share:.0%} of first token", f"{part:.1%}", part <= share)
            )
    if results["stages"].get(BASE):
        rows += _limits(results["stages"][BASE])
    return rows


def _limits(found: Mapping[str, Any]) -> list[tuple[str, str, str, bool | None]]:
    rows: list[tuple[str, str, str, bool | None]] = []
    for stage in found["stages"]:
        if stage["stage"] in ("vision_encoder", "decoder") and stage["flops"]:
            name = {"decoder": "prefill", "vision_encoder": "encoder"}[stage["stage"]]
            share = stage["share"]
            rows.append((name, "at least 85 % of the GEMM rate", f"{share:.0%}", _reaches(share, 0.85)))
    if "share" in found["decode"]:
        share = found["decode"]["share"]
        rows.append(("decoding", "at least 90 % of the memory's rate", f"{share:.0%}", _reaches(share, 0.9)))
    for name, most in (("request", 2.0), ("token", 0.2)):
        host = found["host_ms"][name]
        if host["runs"]:
            ms = host["median"]
            rows.append((f"host, each {name}", f"below {most:g} ms", f"{ms:.2f} ms", ms < most))
    over = found["memory"]["over"]
    if over is not None:
        rows.append(("peak memory", "at most weights + KV + 15 %", f"{over:+.1%}", over <= 0.15))
    return rows


def _reaches(share: float, least: float) -> bool | None:
    return share >= least if share <= POSSIBLE else None


def _stages(found: Mapping[str, Any]) -> str:
    rows = [
        [
            stage["stage"],
            _spread(stage["ms"]),
            f"{100 * stage['ms']['median'] / found['ttft_ms']['median']:.1f}",
            f"{stage['flops'] / 1e9:.1f}" if stage["flops"] else "",
            f"{stage['share']:.0%}" if stage["flops"] else "",
        ]
        for stage in found["stages"]
    ]
    return markdown_table(
        ["stage", "ms (quartiles)", "% of first token", "GFLOP", "of the GEMM rate"], rows, left=1
    )


def _notes(found: Mapping[str, Any]) -> str:
    gemm, reading, memory = found["ceiling"]["gemm"], found["ceiling"]["memory"], found["memory"]
    lines = [
        f"- the machine, same engine and threads: {gemm['median'] / 1e9:.0f} GFLOP/s ({gemm['graph']}), "
        f"{reading['median'] / 1e9:.1f} GB/s ({reading['graph']})",
        f"- weights {memory['weights'] / 1e6:.0f} MB, KV cache {memory['kv'] / 1e6:.0f} MB, peak resident "
        f"{memory['peak'] / 1e6:.0f} MB, {memory['process'] / 1e6:.0f} MB of it before the bundle",
        f"- opening the bundle: {found['open_ms'] / 1e3:.1f} s",
    ]
    if "share" in found["decode"]:
        decode = found["decode"]
        lines.append(
            f"- each further token {_spread(found['tpot_ms'])} ms reads {decode['bytes'] / 1e6:.0f} MB: "
            f"{decode['bytes_per_s'] / 1e9:.1f} GB/s"
        )
    energy = found["energy"]
    lines.append(f"- energy: {energy['joules']:.1f} J a run" if "joules" in energy else f"- {energy['note']}")
    return "\n".join(lines)


def _absent(results: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- {WHAT.get(name, name)}: not installed; `{line}`" for name, line in results["missing"].items()
    ]
    lines += [f"- {WHAT.get(name, name)}: {why}" for name, why in results["failed"].items()]
    return ["## Not measured", "\n".join(lines)] if lines else []


def _equal(equal: Mapping[str, Any] | None) -> str:
    if equal is None:
        return ""
    return f"{equal['to']}: {equal['tokens']} of {equal['of']} tokens, logits {equal['difference']:.0e}"


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _spread(found: Mapping[str, Any]) -> str:
    return f"{_ms(found)} ({milliseconds(found['low'])} to {milliseconds(found['high'])})"


def _ms(found: Mapping[str, Any]) -> str:
    return milliseconds(found["median"])


def main() -> int:
    """Write the page and the table again from docs/bench.json."""
    return run_command("peers_report", _rewrite, debug=False)


def _rewrite() -> None:
    root = checkout("the folder of one")
    results = json.loads((root / "docs/bench.json").read_text(encoding="utf-8"))
    if results.get("format") != FORMAT:
        raise UsageError(
            "docs/bench.json is of an older format, without the turns of each pair; run: make bench"
        )
    write_report(results, root)


if __name__ == "__main__":
    sys.exit(main())
