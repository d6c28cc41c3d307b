"""How far ahead tokens see: for models whose visual tokens see all those of their picture."""

from __future__ import annotations

import torch
from torch import Tensor

from vtp.export.graphs.layout import lay_out, widened
from vtp.export.graphs.pruner import DecoderPruner
from vtp.export.graphs.splice import Splice


def lookahead(length: int, starts: Tensor, visual: int) -> Tensor:
    """How many tokens after itself each of a prompt's S = `length` tokens sees, int64 [B,S].

    To its picture's end from inside it, else none. starts int64 [B,I]: where pictures of `visual` tokens
    begin in that prompt.
    """
    at = lay_out(length, starts, visual)
    return torch.where(at.inside, (at.passed + 1) * visual - 1 - at.seen, 0)


class LookaheadSplice(Splice):
    """As `Splice`, and the lookahead of the prompt, `ahead` int64 [B,S]: see `lookahead`."""

    def forward(
        self,
        inputs_embeds: Tensor,
        image_embeds: Tensor,
        image_start: Tensor,
        keep_indices: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Outputs of `Splice`, and `ahead` int64 [B,S] behind them."""
        answer = super().forward(inputs_embeds, image_embeds, image_start, keep_indices)
        visual = image_embeds.shape[1]
        starts = widened(image_start, visual - self.placeholders)
        return *answer, lookahead(answer[0].shape[1], starts, visual)


class LookaheadPruner(DecoderPruner):
    """As `DecoderPruner`, and kept_ahead int64 [B,S-n+K]: how far ahead the tokens that are left see."""

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, image_start: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        answer = super().forward(hidden_states, position_ids, image_start, *others)
        return *answer, lookahead(answer[1].shape[1], image_start, self.pruner.keep)


class OneBasedSplice(Splice):
    """As `Splice`, with positions that count from 1."""

    def forward(
        self,
        inputs_embeds: Tensor,
        image_embeds: Tensor,
        image_start: Tensor,
        keep_indices: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Outputs of `Splice`, `position_ids` [B,S] and `next_position` [B] greater by 1."""
        prompt, numbers, coming = super().forward(inputs_embeds, image_embeds, image_start, keep_indices)
        return prompt, numbers + 1, coming + 1
