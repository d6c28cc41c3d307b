"""The prompt as graphs: token embeddings, the splice of visual tokens, and the text as methods read it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtp.export.graphs.layout import Layout, lay_out, widened
from vtp.export.pruners.ops import gather_rows


class EmbedTokens(nn.Module):
    """input_ids int64 [B,T] -> inputs_embeds [B,T,D], and `more` zeros beside them: see `Decoder.deepstack`.

    `absent` is an id that the table has no row for, the image token of some models: what it gives is replaced
    by visual tokens, and any row will do, as in transformers.
    """

    def __init__(self, embedding: nn.Module, more: int = 0, absent: int | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        self.more = more
        self.absent = absent

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.absent is not None:
            input_ids = torch.where(input_ids == self.absent, 0, input_ids)
        embeds = self.embedding(input_ids)
        return functional.pad(embeds, (0, self.more)) if self.more else embeds


class Splice(nn.Module):
    """Put M image tokens in the place of each of a prompt's I pictures; number the positions 0, 1, 2, ...

    inputs_embeds [B,T,D], image_embeds [B*I,M,D], image_start int64 [B,I] ascending (and keep_indices int64
    [B*I,M] for original positions) -> prompt_embeds [B,S,D], position_ids int64 [B,S], next_position int64
    [B], where S = T + I * (M - placeholders). Rows shorter than the longest are padded on the right: their
    padding goes through as text, and their next_position counts it.

    compact   pruned tokens never existed: positions run on without a gap.
    original  kept tokens keep the places they had among the N, and the text after a picture comes N later.
    """

    def __init__(self, placeholders: int, count: int, positions: str = "compact") -> None:
        super().__init__()
        self.placeholders = placeholders
        self.count = count
        self.original = positions == "original"
        self.reads_keep = self.original

    def forward(
        self,
        inputs_embeds: Tensor,
        image_embeds: Tensor,
        image_start: Tensor,
        keep_indices: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """prompt_embeds [B,S,D], position_ids [B,S] and next_position [B]; see the class."""
        at, prompt = self._merged(inputs_embeds, image_embeds, image_start)
        total, same = prompt.shape[1], torch.zeros_like(image_start[:, 0])
        if not self.original:
            return prompt, torch.arange(total).unsqueeze(0) + same.unsqueeze(1), same + total
        assert keep_indices is not None
        visual, images = image_embeds.shape[1], image_start.shape[1]
        position_ids = at.words + at.passed * self.count + self._tokens(at, keep_indices, images)
        return prompt, position_ids, same + (total + images * (self.count - visual))

    def _merged(
        self, inputs_embeds: Tensor, image_embeds: Tensor, image_start: Tensor
    ) -> tuple[Layout, Tensor]:
        """How the prompt is laid out, and its embeddings [B,S,D]."""
        batch, text, width = inputs_embeds.shape
        images, visual = image_start.shape[1], image_embeds.shape[1]
        wider = visual - self.placeholders
        at = lay_out(text + images * wider, widened(image_start, wider), visual)
        row = torch.arange(batch).unsqueeze(1)
        image = batch * text + row * (images * visual) + at.seen
        source = torch.where(at.inside, image, row * text + at.words + at.passed * self.placeholders)
        rows = torch.cat([inputs_embeds.reshape(-1, width), image_embeds.reshape(-1, width)])
        return at, functional.embedding(source, rows)

    def _tokens(self, at: Layout, keep_indices: Tensor, images: int) -> Tensor:
        """int64 [B,S]: which of the N tokens stands at each place, where keep_indices [B*I,M] are there; 0
        for text."""
        batch, visual = at.inside.shape[0], keep_indices.shape[1]
        row = torch.arange(batch).unsqueeze(1)
        slot = torch.where(at.inside, row * (images * visual) + at.seen, 0)
        kept = functional.embedding(slot, keep_indices.reshape(-1, 1)).squeeze(2)
        return torch.where(at.inside, kept, 0)


class TextCues(nn.Module):
    """The text of a prompt with I pictures, for methods that read it: R = T - I * placeholders tokens.

    inputs_embeds [B,T,D], image_start int64 [B,I], text_length int64 [B] (T without padding) -> text_embeds
    [B*I,R,D] and text_mask float32 [B*I,R], the same for every picture of a row, and text_rows int64 [B,R],
    the tokens' places in a prompt that holds all N visual tokens of a picture. The mask is 1 after the first
    picture and 0 before it and in the padding; where nothing follows a picture, it is 1 before.
    """

    def __init__(self, placeholders: int, count: int) -> None:
        super().__init__()
        self.placeholders = placeholders
        self.count = count

    def forward(
        self, inputs_embeds: Tensor, image_start: Tensor, text_length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """text_embeds [B*I,R,D], text_mask [B*I,R] and text_rows [B,R]; see the class."""
        text, images = inputs_embeds.shape[1], image_start.shape[1]
        place = torch.arange(text - images * self.placeholders).unsqueeze(0)  # [1,R]
        before = (image_start - torch.arange(images) * self.placeholders).unsqueeze(1)  # text before each
        passed = (place.unsqueeze(2) >= before).to(torch.int64).sum(dim=2)
        source = place + passed * self.placeholders
        mask = asked(source, passed > 0, text_length)
        embeds = gather_rows(inputs_embeds, source)
        return for_each(embeds, images), for_each(mask, images), place + passed * self.count


def asked(source: Tensor, after: Tensor, text_length: Tensor) -> Tensor:
    """The mask float32 [B,R] of the text tokens at `source` [B,R] of input_ids: those that are `after` the
    first picture and no padding; where there are none, all but the padding."""
    real = (source < text_length.unsqueeze(1)).float()
    follows = real * after.float()
    return torch.where(follows.sum(dim=1, keepdim=True) > 0, follows, real)


def for_each(tensor: Tensor, images: int) -> Tensor:
    """Every row of [B,...] once for each of its `images`: [B*images,...]."""
    batch, *rest = tensor.shape
    return tensor.unsqueeze(1).expand(batch, images, *rest).reshape(batch * images, *rest)
