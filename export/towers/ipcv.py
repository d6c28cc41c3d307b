"""ipcv: after a few blocks only the rows that still change go on; the others follow their neighbours.

Source: IPCV (arXiv 2512.18747), in our own words in shared formulae: x_l is what block l is given.

1. Before block `cut` the n = floor(keep · patches) patches that the block before changed most, by
   ||x_cut − x_(cut−1)||, are kept, in raster order; CLS is always kept.
2. Every removed row has ten nearest kept rows by distance in x_cut, fixed from then on: W [N,n] holds a one
   for a kept row and tenths for a removed one.
3. With X = x_cut, H0 its kept rows and h what these are by now, the whole is X + W (h − H0).
4. In the next `stable` blocks attention sees keys and values of the whole, with queries of kept rows only.
5. Later blocks see kept rows alone. The block whose attention or keys a method reads sees the whole again.

keep = 1 is the tower itself, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp.export.patched import patched
from vtp.export.pruners.ops import gather_rows, raster, top_k
from vtp.export.towers.base import Encoded, RowReduction, TowerShape, cues_of, least_share
from vtp.export.towers.blocks import Block

_NEIGHBOURS = 10


class Ipcv(RowReduction):
    """keep, the fraction of patches that go on; cut, the block before which they are chosen; stable, how
    many blocks see the whole."""

    name = "ipcv"
    paper = "arXiv 2512.18747"
    main = "keep"
    options: ClassVar[dict[str, Any]] = {"keep": 0.35, "cut": 3, "stable": 7}

    def check_settings(self) -> None:
        if not 0 < self.settings["keep"] <= 1:
            raise self.wrong("keep", "choose a fraction above 0 and up to 1")
        if self.settings["cut"] < 1:
            raise self.wrong("cut", "choose at least 1: rows are chosen by what the block before changed")
        if self.settings["stable"] < 0:
            raise self.wrong("stable", "choose 0 or more blocks")

    def check(self, shape: TowerShape) -> None:
        if self.settings["cut"] >= shape.blocks:
            allowed = (
                f"choose 1 to {shape.blocks - 1}" if shape.blocks > 1 else "this reduction needs 2 blocks"
            )
            raise self.wrong("cut", f"the vision tower runs {shape.blocks} blocks; {allowed}")
        if self._kept(shape.patches) < 1:
            least = least_share(shape.patches)
            raise self.wrong("keep", f"that keeps none of the {shape.patches} patches; choose {least} to 1")

    def rows(self, shape: TowerShape) -> int:
        return self._kept(shape.patches) + shape.has_cls

    def encode(self, blocks: Sequence[Block], hidden: Tensor, has_cls: bool, cues: bool) -> Encoded:
        """All rows up to the cut, then the kept ones, which attend to all for some blocks more."""
        cut = self.settings["cut"]
        before = hidden
        for block in blocks[:cut]:
            before, hidden = hidden, block(hidden)
        kept = _choose(before, hidden, self._kept(hidden.shape[1] - has_cls), has_cls)
        rows = kept.first
        read: tuple[Tensor | None, Tensor | None] = (None, None)
        for number, block in enumerate(blocks[cut:], cut):
            reads = cues and number == len(blocks) - 1
            if reads or number < cut + self.settings["stable"]:
                normed, whole = block.norm(rows), block.norm(kept.whole(rows))
                query, key = block.query(normed), block.key(whole)
                if reads:
                    read = cues_of(block, query if has_cls else block.query(whole), key, has_cls)
                rows = block.finish(rows + block.attend(query, key, block.value(whole)))
            else:
                rows = block(rows)
        return Encoded(kept.whole(rows), *read)

    @contextmanager
    def reference(self, layers: Sequence[Any], has_cls: bool, cues: bool) -> Iterator[None]:
        """Blocks of transformers run whole up to the cut, then on chosen rows, with which the rest moves."""
        cut, last = self.settings["cut"], len(layers) - 1
        seen: dict[int, Tensor] = {}
        chosen: list[_LongChoice] = []

        def whole(number: int, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
            """The `forward` of layer `number`, rows [B,N,C] in and out, around its `original` one."""

            def forward(hidden: Tensor, *rest: Any, **named: Any) -> Tensor:
                seen[number] = hidden
                if number == cut:
                    pairs = zip(seen[cut - 1], hidden, strict=True)
                    chosen[:] = [_long_choice(*pair, self.settings["keep"], has_cls) for pair in pairs]
                if number < cut or number > last:
                    return original(hidden, *rest, **named)
                if number < cut + self.settings["stable"] or (cues and number == last):
                    now = _each(original(hidden, *rest, **named), [one.places for one in chosen])
                else:
                    now = original(_each(hidden, [one.places for one in chosen]), *rest, **named)
                moved = now - torch.stack([one.start[one.places] for one in chosen])
                return torch.stack(
                    [one.start + one.weights @ by for one, by in zip(chosen, moved, strict=True)]
                )

            return forward

        with ExitStack() as stack:
            for number, layer in enumerate(layers):
                stack.enter_context(patched(layer, "forward", whole(number, layer.forward)))
            yield

    def _kept(self, patches: int) -> int:
        return int(self.settings["keep"] * patches + 1e-6)


@dataclass(frozen=True)
class _Kept:
    """The rows that go on: start [B,N,C], first [B,n,C], all rows and these at the cut; weights [B,N,n]."""

    start: Tensor
    first: Tensor
    weights: Tensor

    def whole(self, rows: Tensor) -> Tensor:
        """All rows [B,N,C] when those that go on are `rows` [B,n,C]."""
        return self.start + torch.matmul(self.weights, rows - self.first)


def _choose(before: Tensor, hidden: Tensor, count: int, has_cls: bool) -> _Kept:
    """Keep the `count` patches that changed most between before and hidden [B,N,C], and CLS."""
    batch, size = hidden.shape[:2]
    changed = (hidden.float() - before.float()).norm(dim=2)
    places = raster(top_k(changed[:, int(has_cls) :], count)) + int(has_cls)
    if has_cls:
        places = torch.cat([torch.zeros_like(places[:, :1]), places], dim=1)
    first = gather_rows(hidden, places)
    one_hot = torch.arange(size).view(1, -1, 1) == places.unsqueeze(1)
    near = min(_NEIGHBOURS, places.shape[1])
    nearest = top_k(-_distances(hidden, first), near)
    shares = torch.zeros(one_hot.shape).expand(batch, -1, -1).scatter(2, nearest, 1 / near)
    weights = torch.where(one_hot.any(dim=2, keepdim=True), one_hot.float(), shares)
    return _Kept(hidden, first, weights.to(hidden.dtype))


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Squared distances float32 [B,N,n] of rows [B,N,C] to others [B,n,C], less what all of a row share."""
    rows, others = rows.float(), others.float()
    return (others * others).sum(dim=2).unsqueeze(1) - 2 * torch.matmul(rows, others.transpose(1, 2))


@dataclass(frozen=True)
class _LongChoice:
    """Of one picture or tile: places int64 [n], W [N,n], all rows [N,C] at the cut."""

    places: Tensor
    weights: Tensor
    start: Tensor


def _long_choice(before: Tensor, hidden: Tensor, keep: float, has_cls: bool) -> _LongChoice:
    """Choose row by row among hidden [N,C]."""
    size, patches = len(hidden), len(hidden) - has_cls
    changed = (hidden - before).double().norm(dim=1)[int(has_cls) :]
    best = torch.argsort(changed, descending=True, stable=True)[: int(keep * patches + 1e-6)]
    places = sorted((best + int(has_cls)).tolist() + ([0] if has_cls else []))
    weights = torch.zeros(size, len(places), dtype=hidden.dtype)
    for row in range(size):
        if row in places:
            weights[row, places.index(row)] = 1.0
            continue
        apart = (hidden[places] - hidden[row]).double().norm(dim=1)
        nearest = torch.argsort(apart, stable=True)[:_NEIGHBOURS]
        weights[row, nearest] = 1.0 / len(nearest)
    return _LongChoice(torch.tensor(places), weights, hidden)


def _each(hidden: Tensor, places: Sequence[Tensor]) -> Tensor:
    """[B,N,C] -> [B,n,C]: of every picture or tile its own places."""
    return torch.stack([rows[own] for rows, own in zip(hidden, places, strict=True)])


REDUCTION = Ipcv
