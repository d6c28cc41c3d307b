"""What was aimed at, what came out, and whether the lower bound reaches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtp.bench.common.pairs import BASE, BOTH, ENCODER, FLOAT, beside_ours, fastest_of, find_pair, first_token
from vtp.bench.common.towered import Towered
from vtp.bench.compare.cells import ratio_cell

_CUT = "ipcv:0.35"
DECODERS = {"float32": ("genai", "vtp decoder"), "int4": ("genai-int4", "vtp decoder int4")}
# A share of the machine's rate above this says that the rate was measured too low, and so nothing else.
POSSIBLE = 1.05
Aim = tuple[str, str, str, bool | None]


def aims(results: Mapping[str, Any]) -> list[Aim]:
    """(what, aim, found, met) for every aim whose figures are there; met is None where they cannot tell."""
    return [*_ratios(results), *_pruners(results), *_limits(results["stages"].get(BASE))]


def _ratios(results: Mapping[str, Any]) -> list[Aim]:
    rows: list[Aim] = []
    llama = BOTH.peers[2]
    float_cut, cut = Towered(_CUT, FLOAT).name, Towered(_CUT, BOTH).name
    for what, theirs, ours, key, least in (
        ("first token, fastest unpruned peer, float32", fastest_of(results), BASE, "ttft", 1.75),
        ("first token, PyTorch unpruned, float32", "torch", BASE, "ttft", 4.3),
        (f"first token, vtp with all tokens, {BOTH.name}", BOTH.whole, BOTH.ours, "ttft", 4.2),
        ("first token, llama.cpp q8_0 and q4_0, as few bits", llama, BOTH.ours, "ttft", 5.0),
        ("first token, fastest other peer in as few bits", _fastest_other(results), BOTH.ours, "ttft", 1.9),
        (f"encoder, tower {_CUT}, vtp without it, float32", BASE, float_cut, ENCODER, 1.8),
        (
            f"first token, tower {_CUT}, fastest unpruned peer, float32",
            fastest_of(results),
            float_cut,
            "ttft",
            2.6,
        ),
        (f"first token, tower {_CUT}, llama.cpp q8_0 and q4_0", llama, cut, "ttft", 7.5),
        ("each further token, llama.cpp q4_0", llama, BOTH.ours, "tpot", 1.0),
        ("each further token, onnxruntime-genai", *DECODERS["float32"], "tpot", 1.0),
        ("each further token, onnxruntime-genai, int4", *DECODERS["int4"], "tpot", 1.0),
    ):
        pair = find_pair(results, theirs, ours)
        if pair and key in pair:
            rows.append((what, f"at least {least:g} times", ratio_cell(pair[key]), pair[key]["low"] >= least))
    return rows


def _fastest_other(results: Mapping[str, Any]) -> str | None:
    """The fastest peer in few bits that is not llama.cpp."""
    pairs = [pair for pair in beside_ours(results, BOTH) if pair["theirs"] in BOTH.peers]
    others = [pair for pair in pairs if not pair["theirs"].startswith("llamacpp")]
    return min(others, key=first_token)["theirs"] if others else None


def _pruners(results: Mapping[str, Any]) -> list[Aim]:
    rows: list[Aim] = []
    for name, share in ((FLOAT.ours, 0.01), ("vtp adaptprune", 0.02)):
        found = results["stages"].get(name)
        if found:
            part = found["parts"]["pruner"] / found["ttft_ms"]["median"]
            rows.append(
                (f"pruner, {name}", f"at most {share:.0%} of first token", f"{part:.1%}", part <= share)
            )
    return rows


def _limits(found: Mapping[str, Any] | None) -> list[Aim]:
    if not found:
        return []
    rows: list[Aim] = []
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
