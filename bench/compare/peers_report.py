"""What `vtp.bench.compare.peers` found: docs/bench.json, docs/bench.md and the README's figures.

python -m vtp.bench.compare.peers_report      writes the page and the figures again from docs/bench.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vtp.bench.common.checkout import checkout
from vtp.bench.common.pairs import (
    FLOAT,
    PRECISIONS,
    TURNS,
    Precision,
    beside_ours,
    fastest_of,
    find_pair,
    parts_of,
)
from vtp.bench.compare.cells import (
    both,
    called,
    equal_cell,
    header,
    interval,
    ms_cell,
    ratio_cell,
    spread_cell,
)
from vtp.bench.compare.peers_aims import DECODERS, aims
from vtp.engines import UsageError
from vtp.runtime.commands.console import run_command
from vtp.runtime.commands.tables import markdown_table

table = partial(markdown_table, left=1)
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
WON = "<!-- won: begin -->", "<!-- won: end -->"  # the README's first lines
COMMAND = "make bench"
FORMAT = 3  # of docs/bench.json: pairs at equal precision, each with the figures of its own turns
OUTDATED = (
    "Milliseconds and ratios of this run come from different turns, so they contradict each other in places; "
    "`make bench` now takes both from the same turns, and writes this anew."
)
ROUNDS = str(TURNS)  # what the command takes unless told otherwise
VERDICT = {True: "met", False: "**missed**", None: "**not known**: above the machine's rate as measured"}
_SAME_CODES = (
    "int4: symmetric, blocks of 32, rounded to the nearest by the same rule, the head included and the "
    "embedding not; both multiply with activations in int8 (accuracy level 4)."
)
_INTRODUCTION = """\
Made by `{command}` at {time}: {processor}, {cores} cores, {memory} GB; {system}; Python {python}; {versions}.

Model `{model}`, batch 1, {threads} threads for everybody. One picture, one short question, greedy, \
{tokens} new tokens; pruned to {keep} visual tokens. Times go from the picture's file to the token: \
preprocessing, pruner and host are in them. Every peer has a process of its own; peer and vtp answer in \
turns, {rounds} rounds. A line's milliseconds are the medians of these turns, its ratio is their quotient, \
with {interval}: how many times longer the peer takes."""
_INTERVALS = {
    True: "the 95 % interval of a bootstrap over the turns",
    False: "the least and the greatest of a single turn, for there were too few for an interval",
}
_BRACKETS = {True: "95 % intervals", False: "the least and the greatest of a turn"}
_LLAMACPP = """\
Its weights are the same: our converter (`vtp.bench.compare.llamacpp`) writes them as GGUF, llama.cpp's own \
quantiser makes q8_0 and q4_0 of them (`--pure`: embedding and head as well; it would otherwise keep them in \
more bits and take longer). `llama-server` has the model open and answers over HTTP; the picture is cropped \
and resized for it beforehand. Its cache is float16 and its flash attention on, as it comes. One thing it \
computes differently: of CLIP it takes the class row for the last patch and leaves out the first \
(ggml-org/llama.cpp, issue 25814). It is held against transformers with its rows in that order \
(`torch-class-last`); the work is the same."""


def write_report(results: Mapping[str, Any], root: Path) -> str:
    """Write docs/bench.json and docs/bench.md, and sentence and table in the README; returns the table."""
    (root / "docs").mkdir(parents=True, exist_ok=True)
    (root / "docs/bench.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (root / "docs/bench.md").write_text(page(results), encoding="utf-8")
    readme, short = root / "README.md", summary(results)
    if readme.exists():
        text = with_table(readme.read_text(encoding="utf-8"), short)
        readme.write_text(with_table(text, won(results), *WON), encoding="utf-8")
    return short


def with_table(text: str, short: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what stands between the marks replaced."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{short}\n{end}{after}" if rest else text


def won(results: Mapping[str, Any]) -> str:
    """The README's first figures: how many times longer the fastest unpruned peer of a precision takes.

    What pruning costs in accuracy stands under them in the README, from `make methods`.
    """
    cpu, day = results["machine"]["processor"], results["machine"]["time"][:10]
    on = f"`{results['model']}`, {results['threads']} threads of {cpu}, {day}"
    said = [
        f"With {results['keep']} visual tokens kept, vtp's first token comes sooner than that of the fastest "
        "peer, which reads every token.",
        *_gains(results),
        f"(`{_command(results)}`: {on}; in brackets {_BRACKETS[results['rounds'] >= TURNS]}; "
        "[docs/bench.md](docs/bench.md).)",
    ]
    return " ".join(said)


def _gains(results: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each precision that was measured, and one about pruning alone in float32."""
    for at in PRECISIONS:
        pair = find_pair(results, fastest_of(results, at), at.ours)
        if pair:
            where = "In float32" if at is FLOAT else f"With {at.name.replace(', ', ' and ')}"
            name, _, bits = called(pair["theirs"]).removesuffix(", all tokens").partition(", ")
            name += f" ({bits})" if bits else ""
            yield f"{where}, {name} takes {ratio_cell(pair['ttft'])} times as long."
    alone = find_pair(results, FLOAT.whole, FLOAT.ours)
    if alone:
        ratio = ratio_cell(alone["ttft"])
        yield f"vtp itself, with every token, takes {ratio} times as long: that much is pruning."


def summary(results: Mapping[str, Any]) -> str:
    """The README's table: at every precision the fastest unpruned peer and vtp with all tokens."""
    machine, turns = results["machine"], results["rounds"]
    pairs = [pair for at in PRECISIONS for pair in _headline(results, at)]
    rows = [[f"{at.name}: {called(pair['theirs'])}", *_short(pair)] for at, pair in pairs]
    columns = ["at equal precision", "first token, ms", f"vtp at {results['keep']} beside it, ms"]
    where = f"{results['model']}, {machine['processor']}, {results['threads']} threads"
    where += f", {machine['time'][:10]}. All peers: [docs/bench.md](docs/bench.md)."
    return "\n\n".join([table([*columns, f"times ({interval(turns)})"], rows), where])


def _headline(results: Mapping[str, Any], at: Precision) -> Iterator[tuple[Precision, Mapping[str, Any]]]:
    """The pairs of one precision that are told first: its fastest peer, and vtp with all tokens."""
    for theirs in (fastest_of(results, at), at.whole):
        pair = find_pair(results, theirs, at.ours)
        if pair:
            yield at, pair


def _short(pair: Mapping[str, Any]) -> list[str]:
    """First tokens: the medians of both, and their quotient."""
    one, two = (pair["ms"][pair[side]]["ttft"] for side in ("theirs", "ours"))
    return [ms_cell(one), ms_cell(two), ratio_cell(pair["ttft"])]


def page(results: Mapping[str, Any]) -> str:
    """docs/bench.md."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    known = {
        **machine,
        **results,
        "versions": versions,
        "memory": machine["memory_gb"],
        "interval": _INTERVALS[results["rounds"] >= TURNS],
        "command": _command(results),
    }
    introduction = _INTRODUCTION.format(**known) + _in_parts(results)
    parts = ["# vtp beside its peers", introduction, *_equal_precision(results)]
    for at in PRECISIONS:
        parts += _at(results, at)
    parts += _variants(results) + _own_parts(results) + _fewer_bits(results) + _llamacpp(results)
    parts += _decoders(results) + _aims(results)
    for name, found in results["stages"].items():
        parts += [f"## Where the time of {name} goes", _stages(found), _notes(found)]
    parts += _absent(results)
    return "\n\n".join(parts) + "\n"


def _in_parts(results: Mapping[str, Any]) -> str:
    """What is said of a run that went on from where an earlier one had ended."""
    kept = results.get("kept", {"pairs": 0})
    if not kept["pairs"]:
        return ""
    done = f"the last of them found {kept['pairs']} pairs done"
    return f" The run was made in parts from {kept['begun']} on; {done}."


def _command(results: Mapping[str, Any]) -> str:
    rounds = [] if str(results["rounds"]) == ROUNDS else ["--rounds", str(results["rounds"])]
    flags = results.get("flags", rounds)
    return f'{COMMAND} BENCH="{" ".join(flags)}"' if flags else COMMAND


def _equal_precision(results: Mapping[str, Any]) -> list[str]:
    """The headline: at every precision the fastest peer and vtp's own unpruned bundle."""
    rows = [
        [f"{at.name}: {called(pair['theirs'])}", *both(pair, "theirs")[1:]]
        for precision in PRECISIONS
        for at, pair in _headline(results, precision)
    ]
    said = (
        "Each line holds a pruned bundle against what answers in as many bits: the unpruned peer whose first "
        "token takes the least time of all below, and vtp itself with all tokens."
    )
    return (
        ["## At equal precision", said, table(header("vtp, pruned", results["rounds"]), rows)] if rows else []
    )


def _at(results: Mapping[str, Any], at: Precision) -> list[str]:
    """Every peer of one precision beside vtp's pruned bundle."""
    rows = []
    for pair in beside_ours(results, at):
        found = results["peers"][pair["theirs"]]
        rows.append([*both(pair, "theirs"), f"{found['peak'] / 1e6:.0f}", equal_cell(found.get("equal"))])
    columns = [*header(called(at.ours), results["rounds"]), "peak memory, MB", "held against"]
    return [f"## In {at.name}", table(columns, rows)] if rows else []


def _variants(results: Mapping[str, Any]) -> list[str]:
    """vtp's other bundles, each beside others in as many bits."""
    measures = {at.ours for at in PRECISIONS} | {ours for _, ours in DECODERS.values()}
    rows = [
        [f"{called(pair['ours'])}, beside {called(pair['theirs'])}", *both(pair, "ours")[1:]]
        for pair in results["pairs"]
        if pair["ours"] not in measures
    ]
    said = "Each beside the fastest peer of its precision above and others, in turns of their own."
    if results.get("towers"):
        said += (
            " A reduction makes the tower cheaper as well; what it costs in answers: [tower.md](tower.md)."
        )
    columns = header("the bundle", results["rounds"])
    return ["## vtp's other bundles", said, table(columns, rows)] if rows else []


def _own_parts(results: Mapping[str, Any]) -> list[str]:
    """Encoder and prompt as those tell of them who do."""
    names = [name for at in PRECISIONS for name in (*at.peers, at.whole, at.ours)]
    names += [pair["ours"] for pair in results["pairs"]]
    told = parts_of(results, list(dict.fromkeys(names)))
    rows = [
        [called(name), *(spread_cell(found[part]) if part in found else "" for part in ("encoder", "prompt"))]
        for name, found in told.items()
    ]
    said = (
        "Milliseconds by each one's own clock, over all of its turns: llama.cpp's from its server's report, "
        "vtp's from its stages. Encoder: tower and projector; prompt: the decoder up to the first token."
    )
    columns = ["", "encoder, ms (quartiles)", "prompt, ms (quartiles)"]
    return ["## Encoder and prompt", said, table(columns, rows)] if rows else []


def _llamacpp(results: Mapping[str, Any]) -> list[str]:
    """How it was built, and what is held against it."""
    built = results.get("llamacpp")
    if not built:
        return []
    options = ", ".join(f"{name}={value}" for name, value in built["options"].items())
    said = (
        f"Version {built['version']}, from the source in llama-cpp-python "
        f"{built['package'] or '(not told)'}, built by `make llamacpp` with {built['compiler']}: {options}. "
        f"It says that it uses {', '.join(built['instructions']) or '(not told)'}."
    )
    if any(name.startswith("AMX") for name in built["instructions"]):
        said += (
            " `make llamacpp` puts a barrier into its AMX kernels, without which GCC before 13 drops stores "
            "to their tile configuration and the server ends with SIGILL."
        )
    return ["## llama.cpp", said, _LLAMACPP]


def _fewer_bits(results: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- {called(name)}: {found['layers']} layers in fewer bits, {found['left']} left in float"
        for name, found in results.get("fewer_bits", {}).items()
    ]
    said = (
        "vtp's bundles were made by `vtp-calib quantize`'s machinery on the built-in pictures. The weights "
        "are random, so this says what fewer bits save and nothing of what they cost "
        "([calibration.md](calibration.md) has that, on a trained model). An int4 decoder has a second "
        "graph, in int8, by which prompts are read (`--prompt int8`): peak memory has both."
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
            called(name),
            spread_cell(pair["ms"][name]["ttft"]),
            spread_cell(pair["ms"][name]["tpot"]),
            f"{results['peers'][name]['peak'] / 1e6:.0f}",
        ]
        for name in names
    ]
    rows.append(["times vtp's", ratio_cell(pair["ttft"]), ratio_cell(pair["tpot"]), ""])
    said = (
        f"The decoder alone on {results['decoder_tokens']} text tokens, {precision}, the same weights; equal "
        f"answers: {equal_cell(results['peers'][names[1]].get('equal'))}."
    )
    if precision == "int4":
        said += f" {_SAME_CODES}"
    header = ["", "prompt, ms (quartiles)", "each further, ms", "peak memory, MB"]
    return [said, table(header, rows)]


def _aims(results: Mapping[str, Any]) -> list[str]:
    """What was aimed at, what came out, and whether the lower bound reaches it."""
    rows = [[what, aim, found, VERDICT[met]] for what, aim, found, met in aims(results)]
    if not rows:
        return []
    said = "Of ratios the lower bound counts."
    return ["## Aims", said, table(["", "aim", "found", ""], rows)]


def _stages(found: Mapping[str, Any]) -> str:
    rows = [
        [
            stage["stage"],
            spread_cell(stage["ms"]),
            f"{100 * stage['ms']['median'] / found['ttft_ms']['median']:.1f}",
            f"{stage['flops'] / 1e9:.1f}" if stage["flops"] else "",
            f"{stage['share']:.0%}" if stage["flops"] else "",
        ]
        for stage in found["stages"]
    ]
    return table(["stage", "ms (quartiles)", "% of first token", "GFLOP", "of the GEMM rate"], rows)


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
            f"- each further token {spread_cell(found['tpot_ms'])} ms reads {decode['bytes'] / 1e6:.0f} MB: "
            f"{decode['bytes_per_s'] / 1e9:.1f} GB/s"
        )
    energy = found["energy"]
    lines.append(f"- energy: {energy['joules']:.1f} J a run" if "joules" in energy else f"- {energy['note']}")
    return "\n".join(lines)


def _absent(results: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- {called(name)}: not {'built' if line.startswith('make') else 'installed'}; `{line}`"
        for name, line in results["missing"].items()
    ]
    lines += [f"- {called(name)}: {why}" for name, why in results["failed"].items()]
    return ["## Not measured", "\n".join(lines)] if lines else []


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
