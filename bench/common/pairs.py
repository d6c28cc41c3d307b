"""Who answered in turns with whom, in how many bits; milliseconds and ratio are of the same turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtp.bench.common.figures import ratio, spread

BASE = "vtp vispruner"
WHAT = ("ttft", "tpot")  # to the first token, to each further one
ENCODER = "encoder"  # tower and projector
TURNS = 15  # at least, for the interval of a bootstrap; of fewer the least and the greatest are told

Times = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Precision:
    """Who is compared with whom at equal bits.

    ours   vtp's pruned bundle, the measure
    whole  vtp with all tokens in the same bits
    peers  unpruned, in the same bits, or where they have no such mix in those nearest to it
    flags  what `vtp.bench.common.fewer_bits` makes of a float bundle: (--vision, --decoder)
    prompt  its --prompt: what reads prompts
    """

    name: str
    ours: str
    whole: str
    peers: tuple[str, ...]
    flags: tuple[str, str] = ("none", "none")
    prompt: str = "decoder"

    def made(self, record: Mapping[str, Any]) -> bool:
        """Whether a bundle's record of its quantisation is of this precision."""
        parts = (record.get("vision", "none"), record.get("decoder", "none"))
        return parts == self.flags and record.get("prompt", "decoder") == self.prompt

    @property
    def all_tokens(self) -> tuple[str, ...]:
        """Everybody who keeps all tokens."""
        return (*self.peers, self.whole)


FLOAT = Precision("float32", BASE, "vtp none", ("torch", "transformers-onnx", "openvino", "llamacpp"))
INT8 = Precision(
    "int8",
    f"{BASE} int8",
    "vtp none int8",
    ("transformers-onnx-int8", "openvino-int8", "llamacpp-q8_0"),
    ("int8", "int8"),
)
INT4 = Precision(
    "int4 decoder", f"{BASE} int4", "vtp none int4", ("llamacpp-f32-q4_0",), ("none", "int4"), "int8"
)
BOTH = Precision(
    "int8 encoder, int4 decoder",
    f"{BASE} int8 int4",
    "vtp none int8 int4",
    ("transformers-onnx-int4", "openvino-int4", "llamacpp-q4_0", "llamacpp-f32-q4_0"),
    ("int8", "int4"),
    "int8",
)
PRECISIONS = (FLOAT, INT8, INT4, BOTH)
UNPRUNED = FLOAT.peers


def wanted(int8: bool, int4: bool) -> tuple[Precision, ...]:
    """The precisions that a run's flags ask for, float32 first."""
    found = (FLOAT, *((INT8,) if int8 else ()))
    return (*found, *((BOTH if int8 else INT4,) if int4 else ()))


def pair_of(theirs: str, ours: str, times: Times) -> dict[str, Any]:
    """The record of a pair.

    times   name -> "ttft", "tpot" and, of those who tell it, "encoder" -> milliseconds, turn by turn

    Returns who they are; under "ms" the same names -> `spread`; under "ttft", "tpot" and, where both tell it,
    "encoder" the quotient of the medians with "low" and "high" (`between`); and the times themselves.
    """
    told = [what for what in (*WHAT, ENCODER) if all(what in times[name] for name in (theirs, ours))]
    return {
        "theirs": theirs,
        "ours": ours,
        "ms": {name: {what: spread(times[name][what]) for what in told} for name in (theirs, ours)},
        **{what: between(times[theirs][what], times[ours][what]) for what in told},
        "times": {name: {what: list(times[name][what]) for what in told} for name in (theirs, ours)},
    }


def between(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """`ratio`; of fewer than TURNS turns its low and high are the least and the greatest of a single turn."""
    found = ratio(theirs, ours)
    if len(ours) < TURNS:
        single = np.asarray(theirs, float) / np.asarray(ours, float)
        found |= {"low": float(single.min()), "high": float(single.max())}
    return found


def find_pair(results: Mapping[str, Any], theirs: str | None, ours: str) -> Mapping[str, Any] | None:
    """The record of two names; None if they did not answer in turns."""
    return next((pair for pair in results["pairs"] if (pair["theirs"], pair["ours"]) == (theirs, ours)), None)


def beside_ours(results: Mapping[str, Any], at: Precision = FLOAT) -> Iterator[Mapping[str, Any]]:
    """The pairs with vtp's own measure of a precision, the slowest peer first."""
    pairs = [pair for pair in results["pairs"] if pair["ours"] == at.ours]
    yield from sorted(pairs, key=lambda pair: -first_token(pair))


def fastest_of(results: Mapping[str, Any], at: Precision = FLOAT) -> str | None:
    """The unpruned peer, not vtp itself, with the least time to the first token of those that are shown."""
    pairs = [pair for pair in beside_ours(results, at) if pair["theirs"] in at.peers]
    return min(pairs, key=first_token)["theirs"] if pairs else None


def first_token(pair: Mapping[str, Any]) -> float:
    """Milliseconds of the peer, the median."""
    return float(pair["ms"][pair["theirs"]]["ttft"]["median"])


def parts_of(results: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """name -> "encoder" and "prompt" -> `spread` of the milliseconds that a peer tells of them itself."""
    told = {name: results["peers"].get(name, {}).get("parts", {}) for name in names}
    return {name: {part: spread(ms) for part, ms in parts.items()} for name, parts in told.items() if parts}
