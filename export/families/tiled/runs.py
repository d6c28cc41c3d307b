"""Visual tokens in several runs, with marks between them that are text: what is kept, in order.

Idefics3 and SmolVLM name every tile of a picture in the prompt (`<row_1_col_2>`). Those marks stay whatever
is pruned: a run may shrink, even to nothing, but two marks never change places. Where everything goes follows
from comparisons and sums, so that no engine has to sort or scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtp.export.graphs.layout import Layout, lay_out, widened
from vtp.export.graphs.pruner import DecoderPruner
from vtp.export.graphs.splice import Splice, TextCues, asked, for_each
from vtp.export.pruners.base import Pruner
from vtp.export.pruners.ops import gather_rows


@dataclass(frozen=True)
class Runs:
    """A picture's place in the prompt, from its first visual token to its last.

    lengths   visual tokens of every run
    marks     how many marks lie between a run and the next: one number fewer
    """

    lengths: tuple[int, ...]
    marks: tuple[int, ...]

    @property
    def count(self) -> int:
        """N, the visual tokens of all runs."""
        return sum(self.lengths)

    @property
    def marked(self) -> int:
        """M, the marks between them."""
        return sum(self.marks)

    def ahead_of_tokens(self) -> Tensor:
        """int64 [N]: the marks ahead of every visual token."""
        ahead = [sum(self.marks[:run]) for run, length in enumerate(self.lengths) for _ in range(length)]
        return torch.tensor(ahead, dtype=torch.int64)

    def ahead_of_marks(self) -> Tensor:
        """int64 [M]: the visual tokens ahead of every mark."""
        ahead = [sum(self.lengths[: run + 1]) for run, marks in enumerate(self.marks) for _ in range(marks)]
        return torch.tensor(ahead, dtype=torch.int64)

    def in_ids(self) -> Tensor:
        """int64 [M]: places of the marks where every run is one id."""
        runs = [run + 1 for run, marks in enumerate(self.marks) for _ in range(marks)]
        return torch.arange(self.marked) + torch.tensor(runs, dtype=torch.int64)


@dataclass
class Kept:
    """K kept tokens and the M marks, as P = K + M slots.

    is_mark  bool [B,P]
    mark     int64 [B,P], which mark; only where it is one
    token    int64 [B,P], which of the K tokens; only where it is none
    """

    is_mark: Tensor
    mark: Tensor
    token: Tensor

    def pick(self, marks: Tensor, tokens: Tensor) -> Tensor:
        """Numbers of the marks [B,M] and of the tokens [B,K] in the order of the slots, [B,P]."""
        return torch.where(
            self.is_mark, torch.gather(marks, 1, self.mark), torch.gather(tokens, 1, self.token)
        )


def look_up(table: Tensor, numbers: Tensor) -> Tensor:
    """table int64 [n] at numbers int64 [B,m], as one Gather."""
    return table.index_select(0, numbers.flatten()).reshape(numbers.shape)


class _Order(nn.Module):
    """The tables of some `Runs` as buffers."""

    to_token: Tensor
    to_mark: Tensor
    in_ids: Tensor

    def __init__(self, runs: Runs) -> None:
        super().__init__()
        self.count, self.marked = runs.count, runs.marked
        self.register_buffer("to_token", runs.ahead_of_tokens(), persistent=False)
        self.register_buffer("to_mark", runs.ahead_of_marks(), persistent=False)
        self.register_buffer("in_ids", runs.in_ids(), persistent=False)

    def token_places(self, tokens: Tensor) -> Tensor:
        """Slots [B,n] of `tokens`, ascending int64 [B,n] of the N, among these and all marks."""
        return torch.arange(tokens.shape[1]) + look_up(self.to_token, tokens)

    def full_places(self, tokens: Tensor) -> Tensor:
        """Slots [B,n] that `tokens` have while all N are there."""
        return tokens + look_up(self.to_token, tokens)

    def full_marks(self) -> Tensor:
        """Slots [M] that the marks have while all N tokens are there."""
        return torch.arange(self.marked) + self.to_mark

    def mark_places(self, tokens: Tensor) -> Tensor:
        """Slots [B,M] of the marks among `tokens`."""
        fewer = tokens.unsqueeze(1) < self.to_mark.view(1, -1, 1)
        return torch.arange(self.marked) + fewer.to(torch.int64).sum(dim=2)

    def keep(self, tokens: Tensor) -> Kept:
        """Lay out the visual tokens `tokens`, ascending int64 [B,K], and the marks."""
        places = self.mark_places(tokens)
        slot = torch.arange(tokens.shape[1] + self.marked)
        passed = (places.unsqueeze(1) <= slot.view(1, -1, 1)).to(torch.int64).sum(dim=2)
        mark = (passed - 1).clamp(0, self.marked - 1)
        is_mark = torch.gather(places, 1, mark) == slot
        return Kept(is_mark, mark, (slot - passed).clamp(0, tokens.shape[1] - 1))


class RunsSplice(Splice):
    """`Splice` where the image's ids in input_ids are one per run, with the marks between them.

    It reads keep_indices also for compact positions, as the order depends on them; without them all N tokens
    are there.
    """

    def __init__(self, placeholders: int, runs: Runs, positions: str = "compact") -> None:
        super().__init__(placeholders, runs.count, positions)
        self.order = _Order(runs)
        self.reads_keep = True

    def forward(
        self,
        inputs_embeds: Tensor,
        image_embeds: Tensor,
        image_start: Tensor,
        keep_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The prompt's embeddings with kept tokens and marks in it, positions, and the next position."""
        tokens = keep_indices
        if tokens is None:
            tokens = torch.arange(self.count) + torch.zeros_like(image_start.reshape(-1, 1))
        (batch, text, _), images = inputs_embeds.shape, image_start.shape[1]
        kept, size = self.order.keep(tokens), tokens.shape[1] + self.order.marked
        wider = size - self.placeholders
        at = lay_out(text + images * wider, widened(image_start, wider), size)
        slot = torch.where(at.inside, torch.arange(batch).unsqueeze(1) * (images * size) + at.seen, 0)
        prompt = self._embeds(inputs_embeds, image_embeds, image_start, at, kept, slot)
        total, same = prompt.shape[1], torch.zeros_like(image_start[:, 0])
        if not self.original:
            return prompt, torch.arange(total).unsqueeze(0) + same.unsqueeze(1), same + total
        marks = self.order.full_marks() + torch.zeros_like(tokens[:, :1])
        places = look_up(kept.pick(marks, self.order.full_places(tokens)).flatten(), slot)
        before = at.words + at.passed * (self.count + self.order.marked)
        missing = self.count - tokens.shape[1]
        return prompt, before + torch.where(at.inside, places, 0), same + (total + images * missing)

    def _embeds(
        self,
        inputs_embeds: Tensor,
        image_embeds: Tensor,
        image_start: Tensor,
        at: Layout,
        kept: Kept,
        slot: Tensor,
    ) -> Tensor:
        """The prompt's embeddings [B,S,D]; slot int64 [B,S] counts through the slots of all B*I pictures."""
        (batch, text, width), (pictures, visual, _) = inputs_embeds.shape, image_embeds.shape
        row = torch.arange(batch).unsqueeze(1)
        marks = (row * text + image_start).reshape(-1, 1) + self.order.in_ids
        tokens = batch * text + torch.arange(pictures).unsqueeze(1) * visual + torch.arange(visual)
        inside = look_up(kept.pick(marks, tokens).flatten(), slot)
        source = torch.where(at.inside, inside, row * text + at.words + at.passed * self.placeholders)
        rows = torch.cat([inputs_embeds.reshape(-1, width), image_embeds.reshape(-1, width)])
        return functional.embedding(source, rows)


class RunsTextCues(TextCues):
    """`TextCues` of a prompt in which the marks are text: R = T - I * runs tokens."""

    def __init__(self, placeholders: int, runs: Runs) -> None:
        super().__init__(placeholders, runs.count)
        self.order, self.runs = _Order(runs), len(runs.lengths)

    def forward(
        self, inputs_embeds: Tensor, image_start: Tensor, text_length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The text's rows, which of them follow the picture, and where they lie in the merged prompt."""
        text, images, marked = inputs_embeds.shape[1], image_start.shape[1], self.order.marked
        length = text - images * self.runs
        at = lay_out(length, widened(image_start, -self.runs), marked)
        place = torch.arange(length).unsqueeze(0)
        mark = torch.where(at.inside, at.seen - at.passed * marked, 0)
        ids, tokens = (
            torch.where(at.inside, look_up(table, mark), 0)
            for table in (self.order.in_ids - torch.arange(marked), self.order.to_mark)
        )
        source, rows = place + at.passed * self.runs + ids, place + at.passed * self.count + tokens
        mask = asked(source, at.inside | (at.passed > 0), text_length)
        return for_each(gather_rows(inputs_embeds, source), images), for_each(mask, images), rows


class RunsDecoderPruner(DecoderPruner):
    """`DecoderPruner` in front of which the n visual tokens that arrive lie among the marks."""

    def __init__(self, pruner: Pruner, others: Sequence[str], runs: Runs) -> None:
        super().__init__(pruner, others)
        self.order = _Order(runs)

    def _visual(self, start: Tensor, previous: Tensor | None) -> Tensor:
        return start + self.order.token_places(self._arriving(start, previous))

    def _source(self, keep: Tensor, start: Tensor, previous: Tensor | None, arriving: int) -> Tensor:
        tokens = self._arriving(start, previous)
        kept, missing = self.order.keep(torch.gather(tokens, 1, keep)), self.pruner.count - self.pruner.keep
        picked = torch.gather(self.order.token_places(tokens), 1, keep)
        within = start + kept.pick(self.order.mark_places(tokens), picked)
        place, block = torch.arange(arriving - missing).unsqueeze(0), self.pruner.keep + self.order.marked
        inside = torch.gather(within, 1, (place - start).clamp(0, block - 1))
        return torch.where(place < start, place, torch.where(place < start + block, inside, place + missing))

    def _text_rows(self, rows: Tensor, start: Tensor, within: Tensor) -> Tensor:
        """Among the text's rows the marks follow the text in front of the picture."""
        number, marked = torch.arange(rows.shape[1]).unsqueeze(0), self.order.marked
        marks = torch.gather(self.order.mark_places(within), 1, (number - start).clamp(0, marked - 1))
        after = torch.where(
            number < start + marked, start + marks, rows - self.pruner.count + self.pruner.keep
        )
        return torch.where(number < start, rows, after)

    def _arriving(self, start: Tensor, previous: Tensor | None) -> Tensor:
        """Which of the N tokens arrive, int64 [B,n]."""
        return torch.arange(self.pruner.count) + torch.zeros_like(start) if previous is None else previous
