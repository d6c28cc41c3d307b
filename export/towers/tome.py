"""tome: in every block the r pairs of rows that look most alike become one row each.

Source: Token Merging (Bolya et al., arXiv 2210.09461). Rows alternate into A and B. By the keys of the
block's attention, averaged over heads and normalised, every row of A has one partner in B; the r rows of A
that are nearest to theirs join them, as means weighted by how many patches each row stands for. CLS never
merges. Attention counts a row for as many as it stands for: log(size) is added to its logits. At the end
every patch gets the row that it went into, so that N rows leave the tower.

A cue is what the method would read if every patch still had its own row: attention to a row is shared
equally among its patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtp.export.patched import patched
from vtp.export.pruners.ops import gather_rows, normalize, top_k
from vtp.export.towers.base import Encoded, RowReduction, TowerShape
from vtp.export.towers.blocks import Block


class Tome(RowReduction):
    """merge, the pairs of rows that every block merges."""

    name = "tome"
    paper = "arXiv 2210.09461"
    main = "merge"
    options: ClassVar[dict[str, Any]] = {"merge": 16}

    def check_settings(self) -> None:
        if self.settings["merge"] < 0:
            raise self.wrong("merge", "choose 0 or more pairs of rows for every block")

    def check(self, shape: TowerShape) -> None:
        """Refuse more merges than some block has pairs for."""
        wanted = self.settings["merge"]
        if not _has_pairs(shape, wanted):
            most = next(pairs for pairs in range(shape.rows, -1, -1) if _has_pairs(shape, pairs))
            raise self.wrong(
                "merge",
                f"{shape.rows} rows and {shape.blocks} blocks do not have as many pairs; choose 0 to {most}",
            )

    def rows(self, shape: TowerShape) -> int:
        return shape.rows - self.settings["merge"] * shape.blocks

    def most_kept(self, shape: TowerShape, count: int) -> int:
        return count * (self.rows(shape) - shape.has_cls) // shape.patches

    def encode(self, blocks: Sequence[Block], hidden: Tensor, has_cls: bool, cues: bool) -> Encoded:
        """Every block merges pairs between attention and MLP; rows attend to others by their sizes."""
        merged = _Rows.of(hidden)
        read: tuple[Tensor | None, Tensor | None] = (None, None)
        for block in blocks:
            normed = block.norm(merged.rows)
            query, key = block.query(normed), block.key(normed)
            if cues and block is blocks[-1]:
                read = _cues(block, query, key, merged, has_cls)
            bias = None if block is blocks[0] else merged.bias.to(hidden.dtype)
            rows = merged.rows + block.attend(query, key, block.value(normed), bias)
            merged = merged.replaced(rows).merge(key.float().mean(dim=1), self.settings["merge"], has_cls)
            merged = merged.replaced(block.finish(merged.rows))
        return Encoded(gather_rows(merged.rows, merged.places), *read)

    @contextmanager
    def reference(self, layers: Sequence[Any], has_cls: bool, cues: bool) -> Iterator[None]:
        """Blocks of transformers keep all rows; those of a group are set to their mean after attention."""
        groups: list[list[list[int]]] = []  # of every picture or tile

        def merging(number: int, layer: Any) -> Callable[..., Tensor]:
            """The `forward` of layer `number`, rows [B,N,C] in and out: attention, means of groups, MLP."""
            block = Block(layer)

            def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
                if number == 0:
                    groups[:] = [[[row] for row in range(hidden.shape[1])] for _ in hidden]
                normed = block.norm(hidden)
                added, _weights = block.attention(normed, attention_mask=None)
                hidden = hidden + (layer.lambda_1 * added if block.is_internvl else added)
                for tile, metric in enumerate(block.key(normed).double().mean(dim=1)):
                    groups[tile] = _long_merge(groups[tile], metric, self.settings["merge"], has_cls)
                    for group in groups[tile]:
                        hidden[tile, group] = hidden[tile, group].mean(dim=0, keepdim=True)
                return block.finish(hidden)

            return forward

        with ExitStack() as stack:
            for number, layer in enumerate(layers):
                stack.enter_context(patched(layer, "forward", merging(number, layer)))
            yield


def _has_pairs(shape: TowerShape, merge: int) -> bool:
    """Whether every block has `merge` rows of A, CLS apart, that can join one of B."""
    left = shape.rows
    for _ in range(shape.blocks):
        if merge > ((left + 1) // 2 - shape.has_cls if left > 1 else 0):
            return False
        left -= merge
    return True


@dataclass(frozen=True)
class _Rows:
    """rows [B,t,C], how many patches each stands for, float32 [B,t,1], and the row of each, int64 [B,N]."""

    rows: Tensor
    sizes: Tensor
    places: Tensor

    @staticmethod
    def of(hidden: Tensor) -> _Rows:
        batch, size = hidden.shape[:2]
        return _Rows(hidden, torch.ones(batch, size, 1), torch.arange(size).expand(batch, -1))

    @property
    def bias(self) -> Tensor:
        """What is added to attention logits, float32 [B,1,t,t]: ONNX Runtime's operator needs it in full."""
        logs = torch.log(self.sizes).transpose(1, 2).unsqueeze(1)
        return logs.expand(-1, -1, self.rows.shape[1], -1)

    def replaced(self, rows: Tensor) -> _Rows:
        return _Rows(rows, self.sizes, self.places)

    def merge(self, keys: Tensor, pairs: int, has_cls: bool) -> _Rows:
        """Merge the `pairs` of rows that are most alike by keys float32 [B,t,d]; A's others first, then B."""
        if not pairs:
            return self
        batch, size = self.rows.shape[:2]
        metric = normalize(keys)
        alike = torch.matmul(metric[:, 0::2], metric[:, 1::2].transpose(1, 2))
        if has_cls:
            alike = torch.cat([torch.full_like(alike[:, :1], -2.0), alike[:, 1:]], dim=1)
        evens, odds = alike.shape[1], alike.shape[2]
        partner = top_k(alike, 1)  # [B,a,1]
        going = top_k(alike.amax(dim=2), pairs)  # [B,r], which rows of A
        number = torch.arange(evens)
        is_going = (number.view(1, -1, 1) == going.unsqueeze(1)).any(dim=2)  # [B,a]
        ahead = (going.unsqueeze(1) < number.view(1, -1, 1)).sum(dim=2)  # [B,a], those that leave before it
        staying = top_k(-torch.where(is_going, number + evens, number).float(), evens - pairs)
        into = gather_rows(partner.float(), going).to(torch.int64)  # [B,r,1]
        joins = (into.transpose(1, 2) == torch.arange(odds).view(1, -1, 1)).to(self.sizes.dtype)  # [B,b,r]
        weighted = self.rows.float() * self.sizes
        joined = weighted[:, 1::2] + torch.matmul(joins, gather_rows(weighted[:, 0::2], going))
        sizes = self.sizes[:, 1::2] + torch.matmul(joins, gather_rows(self.sizes[:, 0::2], going))
        kept = gather_rows(self.rows[:, 0::2], staying)
        left = evens - pairs
        rows = torch.cat([kept, (joined / sizes).to(kept.dtype)], dim=1)
        place = torch.where(is_going, left + partner.squeeze(2), number - ahead)
        place = torch.cat([place, (left + torch.arange(odds)).expand(batch, -1)], dim=1)  # by A, then B
        old = torch.arange(size)
        table = place.index_select(1, old // 2 + old % 2 * evens)
        places = torch.gather(table, 1, self.places.expand(batch, -1))
        return _Rows(rows, torch.cat([gather_rows(self.sizes[:, 0::2], staying), sizes], dim=1), places)


def _cues(block: Block, query: Tensor, key: Tensor, merged: _Rows, has_cls: bool) -> tuple[Tensor, Tensor]:
    """(scores float32 [B,P], keys [B,P,C]) as every patch's own row would give them."""
    asked = query[:, :, :1] if has_cls else query
    logits = torch.matmul(asked, key.transpose(2, 3)).float() * block.scale
    logits = logits + torch.log(merged.sizes).transpose(1, 2).unsqueeze(1)  # of every row alike
    weights = torch.softmax(logits, dim=-1).mean(dim=1)  # [B,1 or t,t]
    if not has_cls:  # a row asks as often as it has patches
        weights = weights * merged.sizes / merged.places.shape[1]
    scores = weights.sum(dim=1, keepdim=True).transpose(1, 2) / merged.sizes
    scores = gather_rows(scores, merged.places).squeeze(2)
    keys = gather_rows(block.merged(key), merged.places)
    return scores[:, int(has_cls) :], keys[:, int(has_cls) :]


def _long_merge(groups: list[list[int]], metric: Tensor, pairs: int, has_cls: bool) -> list[list[int]]:
    """The groups of rows after one block, in their order; metric float64 [N,d] is equal within a group."""
    rows = [metric[group[0]] / metric[group[0]].norm() for group in groups]
    evens, odds = groups[0::2], [list(group) for group in groups[1::2]]
    best: list[tuple[float, int, int]] = []
    for one in range(int(has_cls), len(evens)):
        alike = [float(rows[2 * one] @ rows[2 * other + 1]) for other in range(len(odds))]
        partner = max(range(len(odds)), key=lambda other: (alike[other], -other))
        best.append((alike[partner], -one, partner))
    going = sorted(best, reverse=True)[:pairs]
    for _, one, partner in going:
        odds[partner] = [*odds[partner], *evens[-one]]
    gone = {-one for _, one, _ in going}
    return [*(group for number, group in enumerate(evens) if number not in gone), *odds]


REDUCTION = Tome
