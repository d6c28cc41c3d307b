"""How many tokens to keep: the smallest keep-count that holds a floor, or the best one within a time budget.

A score rises with the keep-count, so the smallest one that holds is found by halving, not by trying all.
Noise can break that rule by a little; the counts beside the choice are tried as well, and a difference that
the interval does not tell from none is called that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vtp.calib import stats
from vtp.calib.keep.examiner import Marks
from vtp.calib.stats import Estimate
from vtp.engines import UsageError, VtpError

HOLDS, NOISE, FAILS = "holds", "holds, within noise", "fails"


@dataclass(frozen=True)
class Tried:
    """A keep-count that was tried: its marks, its score, and the share of the unpruned score it keeps."""

    marks: Marks
    score: Estimate
    share: Estimate

    @property
    def keep(self) -> int:
        """The keep-count."""
        return self.marks.keep

    def verdict(self, floor: float) -> str:
        """Whether the share holds a floor, and whether its whole interval does."""
        if self.share.value < floor:
            return FAILS
        return HOLDS if self.share.low >= floor else NOISE


@dataclass
class Search:
    """The outcome: the chosen keep-count among those tried."""

    chosen: Tried
    tried: list[Tried] = field(default_factory=list)


class Trials:
    """Keep-counts tried so far, each once; `reference` are the unpruned scores per question."""

    def __init__(self, marks: Callable[[int], Marks], reference: Sequence[float]) -> None:
        self._marks = marks
        self._reference = reference
        self.done: dict[int, Tried] = {}

    def __call__(self, keep: int) -> Tried:
        """Try a keep-count, or recall it."""
        if keep not in self.done:
            marks = self._marks(keep)
            share = stats.ratio(marks.scores, self._reference)
            self.done[keep] = Tried(marks, stats.mean(marks.scores), share)
        return self.done[keep]

    @property
    def tried(self) -> list[Tried]:
        """All of them, by keep-count."""
        return [self.done[keep] for keep in sorted(self.done)]


def smallest_holding(keeps: list[int], floor: float, trials: Trials) -> Search:
    """The smallest of `keeps` whose share of the unpruned score is at least `floor`.

    Raises VtpError where not even the largest holds it.
    """
    if not 0 < floor <= 1:
        raise UsageError(f"floor {floor:g} is outside 0 to 1, the share of the unpruned score to hold")
    order = sorted(keeps)
    if trials(order[-1]).verdict(floor) == FAILS:
        best = trials(order[-1])
        raise VtpError(
            f"no keep-count of this bundle holds {floor:g}: the largest, {best.keep}, keeps {best.share}; "
            "export larger ones with --keep-tokens, or lower --floor"
        )
    low, high = 0, len(order) - 1  # order[high] holds; everything below `low` fails
    while low < high:
        middle = (low + high) // 2
        if trials(order[middle]).verdict(floor) == FAILS:
            low = middle + 1
        else:
            high = middle
    while high > 0 and trials(order[high - 1]).verdict(floor) != FAILS:  # where noise misled the halving
        high -= 1
    return Search(trials(order[high]), trials.tried)


def best_within(keeps: list[int], budget_ms: float, trials: Trials) -> Search:
    """The best score among keep-counts whose median TTFT is within a budget; the smaller one of equals.

    Raises VtpError where none is within it.
    """
    if budget_ms <= 0:
        raise UsageError(f"budget-ms {budget_ms:g} is not a time; give milliseconds to the first token")
    fitting: list[Tried] = []
    for keep in sorted(keeps, reverse=True):
        tried = trials(keep)
        if tried.marks.ttft <= budget_ms:
            fitting.append(tried)
            if len(fitting) == 2:  # fewer tokens than these answer worse and need not be faster
                break
    if not fitting:
        fastest = min(trials.tried, key=lambda tried: tried.marks.ttft)
        raise VtpError(
            f"no keep-count of this bundle answers within {budget_ms:g} ms: the fastest, {fastest.keep}, "
            f"takes {fastest.marks.ttft:.1f} ms; export smaller ones with --keep-tokens, or raise --budget-ms"
        )
    return Search(max(fitting, key=lambda tried: (tried.score.value, -tried.keep)), trials.tried)


def best_fitting(needs_mb: Mapping[int, float], budget_mb: float, trials: Trials) -> Search:
    """The best score among keep-counts whose memory is within a budget; the smaller one of equals.

    needs_mb  keep-count -> MB, told beforehand: none is tried that does not fit. Of those that do, the two
              largest are tried, for fewer tokens answer worse.

    Raises VtpError where none fits.
    """
    if budget_mb <= 0:
        raise UsageError(f"budget-mb {budget_mb:g} is not a valid size; give megabytes")
    fitting = sorted((keep for keep, need in needs_mb.items() if need <= budget_mb), reverse=True)
    if not fitting:
        least = min(needs_mb, key=lambda keep: needs_mb[keep])
        raise VtpError(
            f"no keep-count of this bundle fits into {budget_mb:g} MB: the smallest, {least}, may need "
            f"{needs_mb[least]:.0f} MB; export with smaller --keep-tokens or --max-length, quantise it, or "
            "raise --budget-mb"
        )
    tried = [trials(keep) for keep in fitting[:2]]
    return Search(max(tried, key=lambda one: (one.score.value, -one.keep)), trials.tried)
