"""What two machines answered, held side by side: equal, a close call with its margin, or wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vtp.runtime.compare import LIMITS

# How far a pruner's inputs may be from the other machine's in a close call: the limits of every export. With
# float16, values are rounded to it between nodes; with int8 and int4, activations are rounded to codes.
MOVED = {weights: LIMITS[weights].relative for weights in ("float32", "float16", "int4")}
MOVED["int8"] = MOVED["prompt8"] = MOVED["int4"]
# Nats between the two tokens, in a close call.
MARGIN = {"float32": 1e-3, "float16": 5e-2, "int8": 2e-1, "int4": 2e-1, "prompt8": 2e-1}
# A random direction turns a choice later than the one that rounding took; and float32 itself rounds.
FARTHER, ROUNDING = 10.0, 1e-6


@dataclass
class Outcome:
    """Of one bundle, or of many.

    answers    compared
    same       with the same tokens and the same kept tokens
    close      lines about close calls
    wrong      lines about what differs otherwise
    apart      the largest difference of a log-probability, where the answers are the same
    """

    answers: int = 0
    same: int = 0
    close: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    apart: float = 0.0

    def add(self, other: Outcome) -> None:
        """Count another one, too."""
        self.answers, self.same = self.answers + other.answers, self.same + other.same
        self.close += other.close
        self.wrong += other.wrong
        self.apart = max(self.apart, other.apart)


def compare(
    found: Mapping[str, Any], wanted: Mapping[str, Any], closeness: Mapping[str, Any], weights: str
) -> Outcome:
    """The answers of a bundle here and there.

    found, wanted  what `asking` wrote on arm64, on x86-64
    closeness      what `closeness` wrote: question -> how close its choice was
    """
    for told, where in ((wanted, "x86-64"), (found, "arm64")):
        if "answers" not in told:
            return Outcome(wrong=[f"no answer on {where}: {told.get('error', 'it was not asked')}"])
    outcome = Outcome(answers=len(wanted["answers"]))
    if not outcome.answers or len(found["answers"]) != outcome.answers:
        outcome.wrong.append(f"{len(found['answers'])} answers on arm64, {outcome.answers} on x86-64")
        return outcome
    for at, (mine, other) in enumerate(zip(found["answers"], wanted["answers"], strict=True)):
        if (mine["tokens"], mine["kept"]) == (other["tokens"], other["kept"]):
            outcome.same += 1
            outcome.apart = max(outcome.apart, apart(mine, other))
        elif mine["kept"] != other["kept"]:
            _judge_kept(f"question {at}", mine, other, closeness.get(str(at)), weights, outcome)
        else:
            _judge_tokens(f"question {at}", mine, other, weights, outcome)
    if (rows := found.get("rows")) is not None and rows[1] <= rows[0]:
        outcome.wrong.append(
            f"the scheduler's {rows[0]} steps had {rows[1]} rows: no two requests shared one"
        )
    return outcome


def _judge_kept(
    name: str, mine: Any, other: Any, told: Mapping[str, Any] | None, weights: str, outcome: Outcome
) -> None:
    """Other tokens were kept. The answer is then not judged."""
    count, total = len(_set(other) - _set(mine)), len(_set(other))
    answer = (
        "the same answer" if mine["tokens"] == other["tokens"] else f"{mine['text']!r}, not {other['text']!r}"
    )
    line = f"{name}: {count} of {total} kept tokens differ, {answer}"
    if told is None:
        outcome.wrong.append(f"{line}; how close the choice was is not known")
        return
    turned = "no movement up to 0.1" if told["turned"] is None else f"{told['turned']:.0e}"
    line += f"; {told['file']}: inputs moved by {told['moved']:.0e}, on x86-64 {turned} turns the choice"
    line += "" if told["same"] else ", and of the same numbers it chooses others on arm64"
    near = told["turned"] is not None and told["turned"] <= max(FARTHER * told["moved"], ROUNDING)
    (outcome.close if near and told["moved"] <= MOVED[weights] else outcome.wrong).append(line)


def _judge_tokens(name: str, mine: Any, other: Any, weights: str, outcome: Outcome) -> None:
    """The same tokens were kept, and the answers differ."""
    found = margin(mine, other)
    line = f"{name}: {mine['text']!r}, not {other['text']!r}; margin "
    line += "not known" if found is None else f"{found:.1e}"
    close = found is not None and found <= MARGIN[weights]
    (outcome.close if close else outcome.wrong).append(line)


def margin(mine: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Nats between the two tokens at the first place where greedy answers differ.

    None if neither side has the other's token among its most likely ones there. The token that ends an answer
    has no such list, so that either side's may serve.
    """
    place = next(_differing(mine["tokens"], other["tokens"]), None)
    if place is None:
        return None
    both = [one["tokens"][place] for one in (mine, other) if place < len(one["tokens"])]
    for side in (other, mine):
        likely = dict(side["likely"][place]) if place < len(side["likely"]) else {}
        if len(both) == 2 and set(both) <= set(likely):
            return abs(float(likely[both[0]] - likely[both[1]]))
    return None


def _differing(mine: list[int], other: list[int]) -> Iterator[int]:
    """Places at which two answers differ, the end of the shorter one included."""
    for place in range(max(len(mine), len(other))):
        if mine[place : place + 1] != other[place : place + 1]:
            yield place


def apart(mine: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest difference of a token's log-probability, of those that both sides found likely."""
    most = 0.0
    for here, there in zip(mine["likely"], other["likely"], strict=True):
        theirs = dict(there)
        most = max([most, *(abs(value - theirs[token]) for token, value in here if token in theirs)])
    return most


def _set(answer: Mapping[str, Any]) -> set[int]:
    """The kept tokens of one picture."""
    return set(answer["kept"])
