"""Who answered in turns with whom: one record holds milliseconds and ratio of the same turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vtp.bench.common.figures import ratio, spread

BASE = "vtp vispruner"
UNPRUNED = ("torch", "transformers-onnx", "openvino")
WHAT = ("ttft", "tpot")  # to the first token, to each further one

Times = Mapping[str, Mapping[str, Sequence[float]]]


def pair_of(theirs: str, ours: str, times: Times) -> dict[str, Any]:
    """The record of a pair.

    times   name -> "ttft" and "tpot" -> milliseconds, turn by turn

    Returns who they are; under "ms" the same names -> `spread`; under "ttft" and "tpot" the `ratio`; and the
    times themselves.
    """
    return {
        "theirs": theirs,
        "ours": ours,
        "ms": {name: {what: spread(times[name][what]) for what in WHAT} for name in (theirs, ours)},
        **{what: ratio(times[theirs][what], times[ours][what]) for what in WHAT},
        "times": {name: {what: list(times[name][what]) for what in WHAT} for name in (theirs, ours)},
    }


def find_pair(results: Mapping[str, Any], theirs: str | None, ours: str) -> Mapping[str, Any] | None:
    """The record of two names; None if they did not answer in turns."""
    return next((pair for pair in results["pairs"] if (pair["theirs"], pair["ours"]) == (theirs, ours)), None)


def beside_base(results: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The pairs with vtp's own measure, the slowest peer first."""
    pairs = [pair for pair in results["pairs"] if pair["ours"] == BASE]
    yield from sorted(pairs, key=lambda pair: -first_token(pair))


def fastest_of(results: Mapping[str, Any]) -> str | None:
    """The unpruned peer, not vtp itself, with the least time to the first token of those that are shown."""
    pairs = [pair for pair in beside_base(results) if pair["theirs"] in UNPRUNED]
    return min(pairs, key=first_token)["theirs"] if pairs else None


def first_token(pair: Mapping[str, Any]) -> float:
    """Milliseconds of the peer, the median."""
    return float(pair["ms"][pair["theirs"]]["ttft"]["median"])
