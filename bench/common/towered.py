"""vtp's bundles with a tower reduction beside the method, as the comparison with peers names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtp.bench.common.pairs import BASE, FLOAT, Precision, fastest_of, find_pair
from vtp.engines import UsageError

_SAYS = ", tower "  # between a bundle's name and its reduction


@dataclass(frozen=True)
class Towered:
    """vtp's pruned bundle of one precision behind a `tower`, as `--tower` takes it: "ipcv:0.35"."""

    tower: str
    at: Precision

    @property
    def name(self) -> str:
        """What results call it."""
        return f"{self.at.ours}{_SAYS}{self.tower}"

    @property
    def source(self) -> str:
        """The float bundle that it is made from, which may be it."""
        return f"{BASE}{_SAYS}{self.tower}"

    def beside(self, results: Mapping[str, Any]) -> list[str]:
        """Who answers in turns with it: its precision's fastest peer and llama.cpp, and vtp without it."""
        able = [name for name in self.at.peers if find_pair(results, name, self.at.ours)]
        llama = [name for name in able if name.startswith("llamacpp")]
        found = (fastest_of(results, self.at), *llama[:1], self.at.ours)
        return list(dict.fromkeys(name for name in found if name is not None))


def towered(text: str | None, precisions: Sequence[Precision]) -> list[Towered]:
    """Of each reduction named, a bundle in float32 and one in a run's fewest bits. Raises UsageError."""
    from vtp.export.towers.registry import parse_reduction  # torch, which the report does without

    towers = text.split(",") if text else []
    for tower in towers:
        if parse_reduction(tower) is None:
            raise UsageError(
                f"--towers {text}: '{tower}' reduces nothing; every run has vtp without one as well"
            )
    return [Towered(tower, at) for tower in towers for at in dict.fromkeys((FLOAT, precisions[-1]))]


def split_name(name: str) -> tuple[str, str]:
    """A bundle's name without its reduction, and that, "" if it has none."""
    plain, _, tower = name.partition(_SAYS)
    return plain, tower


def folder_of(name: str) -> str:
    """The folder of one of vtp's bundles: "vtp vispruner int8, tower tome:16" -> "vispruner-int8-tome-16"."""
    plain, tower = split_name(name)
    words = [*plain.split()[1:], *(tower.split(":") if tower else ())]
    return "-".join(words)
