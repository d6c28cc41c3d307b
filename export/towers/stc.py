"""stc: of a camera's later pictures the tower recomputes the rows that changed since a reference picture.

Source: STC (arXiv 2512.00891), in our own words in shared formulae. Two graphs run the same blocks:

1. A reference picture is computed whole. Of every block its keys, its values, what its attention adds to the
   rows and what its MLP adds are kept: the state.
2. Of a later picture every block computes the keys of all N rows. The u = floor(recompute · N) rows whose key
   is least like the reference's (cosine over all heads, to 2⁻¹⁴; equal ones: the lower row) are recomputed:
   values and queries of these; values of the others are the reference's; these queries attend to all keys and
   values. What attention adds to the other rows is what it added to the reference's, and so for the MLP. Each
   block chooses its own rows.
3. The runtime takes a picture for the next reference if the mean cosine of the first block's keys falls below
   `alike`, or after `every` pictures.

recompute = 1 is the tower itself, up to rounding. A method reads the attention and keys of the last block as
of a whole tower, from its own queries and keys; what it does not recompute speaks for the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtp.export.pruners.ops import cosines, gather_rows, raster, top_k
from vtp.export.towers.base import Encoded, TowerReduction, TowerShape, cues_of, least_share
from vtp.export.towers.blocks import Block
from vtp.runtime.bundle.stream_info import RECOMPUTED, REUSES

_STEPS = 2**14  # cosines are compared in such parts of 1: below that, engines' rounding would decide
_EXACT = 2**23  # whole numbers up to twice this are exact in float32
_PARTS = ("key", "value", "attention", "mlp")  # of a block's state, each [B,N,C]


class Stc(TowerReduction):
    """recompute, the fraction of rows; alike, the least mean cosine; every, pictures to a reference."""

    name = REUSES
    paper = "arXiv 2512.00891"
    main = "recompute"
    options: ClassVar[dict[str, Any]] = {"recompute": 0.25, "alike": 0.8, "every": 30}

    def check_settings(self) -> None:
        if not 0 < self.settings["recompute"] <= 1:
            raise self.wrong("recompute", "choose a fraction above 0 and up to 1")
        if not -1 <= self.settings["alike"] <= 1:
            raise self.wrong("alike", "choose a mean cosine, from -1 (never) to 1 (always a new reference)")
        if self.settings["every"] < 1:
            raise self.wrong("every", "choose 1 (each picture is computed whole) or more pictures")

    def check(self, shape: TowerShape) -> None:
        if self.recomputed(shape.rows) < 1:
            least = least_share(shape.rows)
            raise self.wrong("recompute", f"of {shape.rows} rows that leaves none; choose {least} to 1")

    def rows(self, shape: TowerShape) -> int:
        return shape.rows  # of a picture that is computed whole

    def recomputed(self, rows: int) -> int:
        """u, of N rows."""
        return int(self.settings["recompute"] * rows + 1e-6)

    def encode(
        self, blocks: Sequence[Block], hidden: Tensor, has_cls: bool, cues: bool
    ) -> tuple[Encoded, list[Tensor]]:
        """A reference picture's rows [B,N,C] through all blocks, and the state that later ones need."""
        state: list[Tensor] = []
        read: tuple[Tensor | None, Tensor | None] = (None, None)
        for block in blocks:
            normed = block.norm(hidden)
            query, key, value = block.query(normed), block.key(normed), block.value(normed)
            if cues and block is blocks[-1]:
                read = cues_of(block, query, key, has_cls)
            attention = block.attend(query, key, value)
            hidden = hidden + attention
            mlp = block.more(hidden)
            hidden = hidden + mlp
            state += [block.merged(key), block.merged(value), attention, mlp]
        return Encoded(hidden, *read), state

    def encode_later(
        self, blocks: Sequence[Block], hidden: Tensor, state: Sequence[Tensor], has_cls: bool, cues: bool
    ) -> tuple[Encoded, list[Tensor], Tensor]:
        """A later picture's rows; which ones each block recomputed, int64 [B,u]; block 0's mean cosine [B].

        `state` is a reference picture's, in the order of `encode`.
        """
        count, recomputed, first = self.recomputed(hidden.shape[1]), list[Tensor](), torch.zeros(0)
        read: tuple[Tensor | None, Tensor | None] = (None, None)
        for number, block in enumerate(blocks):
            keys, values, attention, mlp = state[4 * number : 4 * number + 4]
            normed = block.norm(hidden)
            key = block.key(normed)
            alike = cosines(block.merged(key), keys)
            first = first if number else alike.mean(dim=1)
            if cues and block is blocks[-1]:
                read = cues_of(block, block.query(normed[:, :1] if has_cls else normed), key, has_cls)
            rows = _least_alike(alike, count)
            picked = gather_rows(normed, rows)
            value = block.heads(_replaced(values, rows, block.merged(block.value(picked))))
            hidden = hidden + _replaced(attention, rows, block.attend(block.query(picked), key, value))
            hidden = hidden + _replaced(mlp, rows, block.more(gather_rows(hidden, rows)))
            recomputed.append(rows)
        return Encoded(hidden, *read), recomputed, first

    @contextmanager
    def reference(self, layers: Sequence[Any], chosen: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The long form, in transformers' own `layers`: all rows through each, what is reused put back after.

        The layers' first run is the reference picture's, each later one is of a later picture whose block
        recomputes the rows `chosen` [u] for it. Yields the list of every block's cosines, float64 [N], of the
        latest run. Batch 1.
        """
        cosines: list[Tensor] = [torch.zeros(0) for _ in layers]
        with ExitStack() as stack:
            for number, layer in enumerate(layers):
                kept = _LongBlock(chosen[number], number, cosines)
                for module, hook in kept.hooks(layer).items():
                    stack.callback(module.register_forward_hook(hook).remove)
            yield cosines


def state_names(blocks: int) -> list[str]:
    """Names of the tensors of a reference picture's state, in their order."""
    return [f"reference.{number}.{part}" for number in range(blocks) for part in _PARTS]


def recomputed_names(blocks: int) -> list[str]:
    """Names of the outputs that say which rows each block recomputed."""
    return [f"{RECOMPUTED}{number}" for number in range(blocks)]


def _least_alike(cosines: Tensor, count: int) -> Tensor:
    """The `count` rows of least cosine [B,N], ascending. No two scores are equal, so that no engine's sort
    decides (in plain OpenVINO ties come in any order)."""
    size = cosines.shape[1]
    steps = torch.round(cosines * min(_STEPS, _EXACT // size))
    return raster(top_k(-(steps * size + torch.arange(size)), count))


def _replaced(whole: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """`whole` [B,N,C] with `new` [B,u,C] in its `rows` [B,u]."""
    return whole.scatter(1, rows.unsqueeze(2).expand(-1, -1, whole.shape[2]), new)


@dataclass
class _LongBlock:
    """What one layer gave of the reference picture, and which rows of a later one are its own."""

    chosen: Tensor
    number: int
    cosines: list[Tensor]
    kept: dict[str, Tensor] = field(default_factory=dict)

    def hooks(self, layer: Any) -> Mapping[nn.Module, Any]:
        """Module of the layer -> what is done with its output."""
        attention = layer.self_attn

        def keys(_: nn.Module, __: Any, output: Tensor) -> None:
            known = self.kept.setdefault("key", output)
            self.cosines[self.number] = nn.functional.cosine_similarity(
                output[0].double(), known[0].double(), dim=1
            )

        def attended(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (self._mixed("attention", output[0]), *output[1:])

        return {
            attention.k_proj: keys,
            attention.v_proj: lambda _, __, output: self._mixed("value", output),
            attention: attended,
            layer.mlp: lambda _, __, output: self._mixed("mlp", output),
        }

    def _mixed(self, part: str, output: Tensor) -> Tensor:
        """The output [1,N,C], with the reference's rows where they are not recomputed."""
        if part not in self.kept:
            self.kept[part] = output
            return output
        mixed = self.kept[part].clone()
        mixed[:, self.chosen] = output[:, self.chosen]
        return mixed


REDUCTION = Stc
