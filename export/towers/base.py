"""What a tower reduction is: less work in the vision tower, beside whatever the method drops after it.

Most work on fewer rows inside the blocks and give all N rows back: whatever pruner, projector or family rule
follows sees the same features and cues, by name and shape, as without it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vtp.engines import UsageError
from vtp.export.graphs.attention.operators import attention_received, cls_row
from vtp.export.towers.blocks import Block


@dataclass(frozen=True)
class TowerShape:
    """The part of a vision tower that runs.

    patches  of one tile, without CLS
    blocks   how many of the tower's blocks the features need
    has_cls  whether a CLS row goes before the patches
    """

    patches: int
    blocks: int
    has_cls: bool

    @property
    def rows(self) -> int:
        """N, the rows of every block without a reduction."""
        return self.patches + self.has_cls


@dataclass(frozen=True)
class Encoded:
    """What the blocks of a tower made: hidden [B,N,C] and, where wanted, the cues of the last block.

    scores  float32 [B,P]: CLS' attention to the patches, mean over heads; without CLS the attention that
            they receive, mean over heads and rows
    keys    [B,P,C]
    """

    hidden: Tensor
    scores: Tensor | None = None
    keys: Tensor | None = None


class TowerReduction(ABC):
    """One way to do with fewer rows, with its options.

    Class attributes:
    name     the file's name, and the name on the command line
    paper    where it comes from
    main     the option that follows the colon in `--tower NAME:VALUE`
    options  option -> default; a value is of its default's type
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    main: ClassVar[str]
    options: ClassVar[Mapping[str, Any]]

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """`settings` are options that differ from their defaults. Raises UsageError for a bad value."""
        self.settings = {**self.options, **settings}
        self.check_settings()

    @abstractmethod
    def check_settings(self) -> None:
        """Raise UsageError for settings that fit no tower."""

    @abstractmethod
    def check(self, shape: TowerShape) -> None:
        """Raise UsageError for settings that do not fit this tower."""

    @abstractmethod
    def rows(self, shape: TowerShape) -> int:
        """How many of the N rows the last block works on."""

    def most_kept(self, shape: TowerShape, count: int) -> int:
        """How many of the N = `count` visual tokens of a picture a method may keep."""
        del shape
        return count

    @classmethod
    def left(cls, count: int) -> int:
        """How many visual tokens it leaves, by its default, of a picture's `count`: for lists of methods."""
        return count

    def wrong(self, option: str, why: str) -> UsageError:
        """The error for an option's value."""
        return UsageError(f"tower {self.name}: {option} is {_written(self.settings[option])}; {why}")


def least_share(count: int) -> str:
    """The smallest share of `count` rows that is a row, rounded up to three digits."""
    digits = len(str(count)) + 2
    return f"{math.ceil(10**digits / count) / 10**digits:g}"


def _written(value: float) -> str:
    """A number as short as it can be told from others: 1.0000001 is not 1."""
    short = f"{value:g}"
    return short if isinstance(value, float) and float(short) == value else str(value)


class RowReduction(TowerReduction):
    """Fewer rows inside the blocks; N rows leave the tower."""

    @abstractmethod
    def encode(self, blocks: Sequence[Block], hidden: Tensor, has_cls: bool, cues: bool) -> Encoded:
        """Run the blocks that the features need on hidden [B,N,C]; `cues` says whether cues are wanted."""

    @abstractmethod
    def reference(self, layers: Sequence[Any], has_cls: bool, cues: bool) -> AbstractContextManager[None]:
        """Make transformers' own `layers` do the same in its long form while the context lasts.

        Each layer takes N rows and gives N rows, so that what stands around them needs no change. `layers`
        are the blocks that the features need, in a tower with eager attention.
        """


def cues_of(block: Block, query: Tensor, key: Tensor, has_cls: bool) -> tuple[Tensor, Tensor]:
    """(scores, keys) of one block's query and key [B,H,N,d]; see `Encoded`. With CLS only query 0 is read."""
    keys = block.merged(key)
    if has_cls:
        return cls_row(query, key, block.scale), keys[:, 1:]
    return attention_received(query, key, block.scale), keys
