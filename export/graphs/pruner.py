"""Pruners as graphs: a method around its inputs, for features or between decoder layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vtp.export.graphs.restore import bias_of
from vtp.export.pruners.base import Pruner
from vtp.export.pruners.ops import gather_rows


class FeaturePruner(nn.Module):
    """A vision- or projector-site pruner over features [B,P,C]: -> keep_indices [B,K], kept rows [B,K,C].

    `cues` names the inputs; the first is the one whose rows are kept (or merged, by a method that does).
    `places` are the places of the P features among the N visual tokens, where these are more.
    """

    places: Tensor | None

    def __init__(
        self,
        pruner: Pruner,
        cues: Sequence[str],
        places: Tensor | None = None,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.pruner = pruner
        self.cues = tuple(cues)
        self.widths = widths or {}
        self.register_buffer("places", places, persistent=False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept, as indices [B,K] and rows [B,K,C]."""
        given = dict(zip(self.cues, inputs, strict=True))
        answer = self.pruner(**{name: narrowed(name, given[name], self.widths) for name in self.pruner.needs})
        keep, rows = answer if self.pruner.merges else (answer, gather_rows(inputs[0], answer))
        if (
            rows.shape[-1] < inputs[0].shape[-1]
        ):  # a merged row's deepstack features are those of its own token
            rows = torch.cat([rows, gather_rows(inputs[0][..., rows.shape[-1] :], keep)], dim=-1)
        if self.places is None:
            return keep, rows
        return torch.gather(self.places.unsqueeze(0).expand(keep.shape[0], -1), 1, keep), rows


class DecoderPruner(nn.Module):
    """A decoder-site pruner over S prompt tokens, n of them visual from image_start int64 [B,1] on.

    Inputs: hidden_states [B,S,D], position_ids int64 [B,S] or [B,S,A], image_start, then those that `others`
    names: the method's cues (over all S tokens where they are per token), image_embeds [B,N,D], and at a
    later one of several sites previous_indices int64 [B,n] (which of the image's N tokens arrive); text_rows
    int64 [B,R] where a later site reads text rows. `restores` is the N of log(N/K), None without it. What a
    method that merges makes of hidden states takes the place of the kept ones.
    Outputs: keep_indices [B,K] within the image, kept_hidden_states [B,S-n+K,D], kept_position_ids int64
    [B,S-n+K(,A)] (the original positions), kept_text_rows int64 [B,R] if text_rows came in, and
    kept_key_bias float32 [B,S-n+K] if it restores.
    """

    def __init__(
        self, pruner: Pruner, others: Sequence[str], widths: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.pruner = pruner
        self.others = tuple(others)
        self.widths = widths or {}
        self.restores: int | None = None

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, image_start: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        """The prompt without what was dropped: see the class for the order."""
        start = image_start
        given = {**dict(zip(self.others, others, strict=True)), "hidden_states": hidden_states}
        previous = given.get("previous_indices")
        visual = self._visual(start, previous)
        answer = self.pruner(**self._cues(given, visual))
        keep, rows = answer if self.pruner.merges else (answer, None)
        if rows is not None:
            hidden_states = _replaced(
                hidden_states, torch.gather(visual.expand(keep.shape[0], -1), 1, keep), rows
            )
        source = self._source(keep, start, previous, hidden_states.shape[1])
        within = keep if previous is None else torch.gather(previous, 1, keep)
        gone_on: tuple[Tensor, ...] = (
            within,
            gather_rows(hidden_states, source),
            _rows(position_ids, source),
        )
        if "text_rows" in given:
            gone_on = (*gone_on, self._text_rows(given["text_rows"], start, within))
        return (*gone_on, *self._key_bias(hidden_states, visual, source))

    def _key_bias(self, hidden_states: Tensor, visual: Tensor, source: Tensor) -> tuple[Tensor, ...]:
        """The bias of what goes on: `source` [B,S-n+K] of the S that arrive, `visual` [B,n] among them."""
        if self.restores is None:
            return ()
        value = bias_of(self.restores, self.pruner.keep)
        nothing = torch.zeros_like(hidden_states[..., 0], dtype=torch.float32)
        return (torch.gather(nothing.scatter(1, visual, value), 1, source),)

    def _visual(self, start: Tensor, previous: Tensor | None) -> Tensor:
        """Places int64 [B,n] of the visual tokens that arrive: `previous` [B,n] of the N, or all."""
        del previous  # they follow one another, whichever they are
        return start + torch.arange(self.pruner.count).unsqueeze(0)

    def _source(self, keep: Tensor, start: Tensor, previous: Tensor | None, arriving: int) -> Tensor:
        """Which of the `arriving` S tokens go on, int64 [B,S-n+K], where `keep` of the n visual ones do."""
        del previous
        count, kept = self.pruner.count, self.pruner.keep
        place = torch.arange(arriving - count + kept).unsqueeze(0)
        inside = start + torch.gather(keep, 1, (place - start).clamp(0, kept - 1))
        return torch.where(
            place < start, place, torch.where(place < start + kept, inside, place + count - kept)
        )

    def _text_rows(self, rows: Tensor, start: Tensor, within: Tensor) -> Tensor:
        """Where the text tokens at `rows` [B,R] are once only the tokens `within` [B,K] of the N are left."""
        del within
        return torch.where(rows < start, rows, rows - self.pruner.count + self.pruner.keep)

    def _cues(self, given: dict[str, Tensor], visual: Tensor) -> dict[str, Tensor]:
        """The method's cues, cut to the visual tokens that arrive: their places int64 [B,n] among the S."""
        cut: dict[str, Tensor] = {}
        for name in self.pruner.needs:
            tensor = narrowed(name, given[name], self.widths)
            if name in ("text_attention", "text_gravity"):
                shape = (*tensor.shape[:-1], visual.shape[1])
                columns = visual.reshape(visual.shape[0], *[1] * (tensor.dim() - 2), -1)
                tensor = torch.gather(tensor, -1, columns.expand(shape))
            elif name not in ("image_embeds", "text_embeds", "text_mask"):
                tensor = _rows(tensor, visual)
            cut[name] = tensor
        return cut


def _replaced(hidden_states: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """hidden_states [B,S,D] with rows [B,K,d] at places int64 [B,K]; what lies beside them stays."""
    width = rows.shape[-1]
    everywhere = places.unsqueeze(2).expand(-1, -1, width)
    own = hidden_states[..., :width].scatter(1, everywhere, rows.to(hidden_states.dtype))
    return own if width == hidden_states.shape[-1] else torch.cat([own, hidden_states[..., width:]], dim=-1)


def narrowed(name: str, tensor: Tensor, widths: Mapping[str, int]) -> Tensor:
    """A cue without the deepstack features beside it (`Decoder.deepstack`), which no method reads."""
    width = widths.get(name, tensor.shape[-1])
    return tensor if width == tensor.shape[-1] else tensor[..., :width]


def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
    return torch.gather(tensor, 1, indices) if tensor.dim() == 2 else gather_rows(tensor, indices)
