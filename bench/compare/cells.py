"""What the peers are called in the report, and how its tables write milliseconds, ratios and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtp.bench.common.figures import milliseconds
from vtp.bench.common.pairs import TURNS
from vtp.bench.common.towered import split_name

NAMES = {
    "torch": "PyTorch transformers, all tokens",
    "transformers-onnx": "transformers' OnnxExporter on ONNX Runtime, all tokens",
    "transformers-onnx-int8": "transformers' export in ONNX Runtime's dynamic int8, all tokens",
    "transformers-onnx-int4": "transformers' export, dynamic int8 encoder, int4 decoder, all tokens",
    "openvino": "transformers' OpenVINO exporter, all tokens",
    "openvino-int8": "OpenVINO, encoder in NNCF's int8, decoder with int8 weights, all tokens",
    "openvino-int4": "OpenVINO, encoder in NNCF's int8, decoder with int4 weights, all tokens",
    "llamacpp": "llama.cpp, encoder f32, decoder f16, all tokens",
    "llamacpp-q8_0": "llama.cpp, encoder q8_0, decoder q8_0, all tokens",
    "llamacpp-q4_0": "llama.cpp, encoder q8_0, decoder q4_0, all tokens",
    "llamacpp-f32-q4_0": "llama.cpp, encoder f32, decoder q4_0, all tokens",
    "torch-class-last": "PyTorch transformers with llama.cpp's order of rows",
    "torch-vispruner": "PyTorch transformers with VisPruner",
    "vtp none": "vtp, all tokens",
    "vtp none int8": "vtp, all tokens, int8",
    "vtp none int4": "vtp, all tokens, int4 decoder",
    "vtp none int8 int4": "vtp, all tokens, int8 encoder, int4 decoder",
    "vtp vispruner": "vtp, vispruner",
    "vtp adaptprune": "vtp, adaptprune",
    "vtp vispruner int8": "vtp, vispruner, int8",
    "vtp vispruner int4": "vtp, vispruner, int4 decoder",
    "vtp vispruner int8 int4": "vtp, vispruner, int8 encoder, int4 decoder",
    "genai": "onnxruntime-genai",
    "vtp decoder": "vtp's decoder graph",
    "genai-int4": "onnxruntime-genai",
    "vtp decoder int4": "vtp's decoder graph",
}


def called(name: str | None) -> str:
    """The words for a peer or a bundle; its own name if there are none."""
    plain, tower = split_name(str(name))
    return NAMES.get(plain, plain) + (f", tower {tower}" if tower else "")


def interval(turns: int) -> str:
    """What stands in brackets behind a ratio, by the number of turns."""
    return "95 %" if turns >= TURNS else "range of the turns"


def header(ours: str, turns: int) -> list[str]:
    """The columns of `both`."""
    times = f"times ({interval(turns)})"
    first = ["first token of the peer, ms (quartiles)", f"of {ours}, ms", times]
    return ["", *first, "each further, ms", f"of {ours}, ms", times]


def both(pair: Mapping[str, Any], of: str) -> list[str]:
    """A line's name, and for first and further tokens: the peer's milliseconds, vtp's, and their quotient."""
    cells = [called(pair[of])]
    for what in ("ttft", "tpot"):
        one, two = (pair["ms"][pair[side]][what] for side in ("theirs", "ours"))
        cells += [spread_cell(one), spread_cell(two), ratio_cell(pair[what])]
    return cells


def equal_cell(equal: Mapping[str, Any] | None) -> str:
    """How an answer compares with another's, in short."""
    if equal is None:
        return ""
    found = f"{equal['to']}: {equal['tokens']} of {equal['of']} tokens, logits {equal['difference']:.0e}"
    return f"{found}, cosine {equal['cosine']:.3f}" if "cosine" in equal else found


def ratio_cell(found: Mapping[str, float]) -> str:
    """A quotient and its bounds."""
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def spread_cell(found: Mapping[str, Any]) -> str:
    """A median and its quartiles, milliseconds."""
    return f"{ms_cell(found)} ({milliseconds(found['low'])} to {milliseconds(found['high'])})"


def ms_cell(found: Mapping[str, Any]) -> str:
    """A median, milliseconds."""
    return milliseconds(found["median"])
