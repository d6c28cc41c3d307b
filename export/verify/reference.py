"""The reference that a bundle's answers are held against: pruning inside an unmodified transformers model.

Written without the exporter's graphs: plain PyTorch around the model's own modules (a `Reference` knows
where they are), eager attention, one growing cache, greedy choice. All N visual tokens are projected and
placed in the prompt as transformers does it; then the prompt is cut down to the kept places, in front of the
first decoder layer (vision and projector sites) or in front of layer L (decoder:L, or several L in turn), or
both, one after the other.
Rows that a method merged take the places of the tokens they stand for. Slow, simple, batch 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vtp.engines.errors import UsageError, VtpError
from vtp.export.checkpoint.cache_name import with_cache
from vtp.export.families.reference import Reference
from vtp.export.pruners.base import Pruner
from vtp.export.pruners.site import Site
from vtp.export.tower_cues import TOWER_CUES
from vtp.export.towers.base import RowReduction


@dataclass
class ReferenceAnswer:
    """A greedy answer.

    token_ids     the new tokens; the last one is an EOS if one came.
    keep_indices  int64 [K], the kept visual tokens (0 to N-1, ascending); all N without a pruner. Of several
                  pictures one after the other, the second's from N on.
    step_logits   per new token, the logits float32 [V] that chose it.
    cache_lengths tokens in the cache of every decoder layer at the end; 0 for one that has a state instead.
    """

    token_ids: list[int]
    keep_indices: Tensor
    step_logits: list[Tensor]
    cache_lengths: list[int] = field(default_factory=list)

    @property
    def first_logits(self) -> Tensor:
        """Logits float32 [V] of the last prompt position."""
        return self.step_logits[0]


def reference_generate(
    model: Any,
    pruner: Pruner | Sequence[Pruner] | None,
    input_ids: Tensor,
    pixel_values: Tensor | Sequence[Tensor],
    max_new_tokens: int = 32,
    eos_ids: Collection[int] = (),
    positions: str = "compact",
    image_size: tuple[int, int] | None = None,
    reference: type[Reference] = Reference,
    reduction: RowReduction | None = None,
    restore: bool = False,
    view_grids: Sequence[tuple[int, int]] = (),
) -> ReferenceAnswer:
    """Answer one prompt greedily, in the model's dtype.

    pruner        a method's pruner, or one for every site in turn, or None
    input_ids     int64 [1,T] with N image placeholders for every picture.
    pixel_values  float [1,3,H,W], or what the family's tower takes ([F,3,H,W] of a clip's frames); cast to
                  the model's dtype. A list of such for several pictures, each of which is pruned by itself.
    positions     "compact" (pruned tokens never existed) or "original" (kept tokens keep their places and new
                  ones go on from T). Decoder sites always keep the original ones.
    image_size    (height, width) of the picture, for models that see it in several views: pixel_values are
                  then [V,3,H,W], and what a vision or projector site chooses from are the P patches.
    reference     the family's
    reduction     what the tower's own layers are to do with fewer rows, in its long form
    view_grids    (rows, columns) of patches of every view, where pixel_values are patches of several views
    restore       whether log(N/K) is added to the attention logits of the K visual tokens that a layer sees

    Raises VtpError where the model cannot serve the pruner's site, or a decoder site several pictures, and
    UsageError for an unknown `positions`.
    """
    if positions not in ("compact", "original"):
        raise UsageError(f"positions is '{positions}'; choose compact or original")
    schedule = [pruner] if isinstance(pruner, Pruner) else list(pruner or [])
    site = Site.parse(schedule[0].site) if schedule else None
    in_decoder = site is not None and site.in_decoder
    inside = schedule if in_decoder else schedule[1:]
    pictures = [pixel_values] if isinstance(pixel_values, Tensor) else list(pixel_values)
    if inside and len(pictures) > 1:
        raise VtpError(f"site {inside[0].site} takes one picture per prompt, not {len(pictures)}")
    parts = reference(model, image_size, view_grids)
    first = None if in_decoder or not schedule else schedule[0]
    with torch.no_grad(), parts.eager(), _reduced(parts, reduction, first):
        decoder = _Decoder(parts, input_ids, restore)
        text = decoder.text_cues()
        looks = [_look(parts, pixels, first, text) for pixels in pictures]
        decoder.start(torch.cat([look.embeds for look in looks], dim=1))
        if first is not None:
            size = looks[0].embeds.shape[1]
            keep = torch.cat([number * size + look.keep for number, look in enumerate(looks)])
            decoder.cut(keep, renumber=positions == "compact")
        decoder.prefill(inside, looks[0].cues)
        tokens, logits = decoder.answer(max_new_tokens, eos_ids)
    return ReferenceAnswer(tokens, decoder.kept, logits, decoder.cache_lengths())


def _reduced(
    parts: Reference, reduction: RowReduction | None, first: Pruner | None
) -> AbstractContextManager[None]:
    """The tower's layers as the reduction has them; nothing changes without one."""
    if reduction is None:
        return nullcontext()
    return reduction.reference(
        parts.blocks, parts.has_cls, bool(first and set(TOWER_CUES) & set(first.needs))
    )


@dataclass(frozen=True)
class _Look:
    """One picture: what methods see of it, its N tokens [1,N,D], and which of them go into the prompt."""

    cues: dict[str, Tensor]
    embeds: Tensor
    keep: Tensor


def _look(parts: Reference, pixel_values: Tensor, pruner: Pruner | None, text: dict[str, Tensor]) -> _Look:
    """Look at one picture, with the pruner of a vision or projector site if there is one."""
    wanted = set(TOWER_CUES) & set(pruner.needs if pruner else ())
    pictures = {"picture": pixel_values, "reference_picture": torch.zeros_like(pixel_values)}
    cues = {**text, **pictures, **parts.vision(pixel_values, wanted)}
    cues["image_embeds"] = parts.project(cues["image_features"])
    embeds, places = parts.tokens(pixel_values, cues["image_embeds"])
    if pruner is None:
        return _Look({**cues, "image_embeds": embeds}, embeds, torch.arange(embeds.shape[1]))
    chosen, rows = _select(pruner, cues)
    keep = places[chosen]
    if rows is not None:
        at_tower = Site.parse(pruner.site).kind == "vision"
        rows = parts.project(rows.to(cues["image_features"].dtype)) if at_tower else rows
        rows = rows[..., : embeds.shape[-1]]  # a bundle's may have deepstack features beside them
        embeds = embeds.index_copy(1, keep, rows.to(embeds.dtype))
    return _Look(cues, embeds, keep)


class _Decoder:
    """The decoder's own layers, run one by one over a prompt that shrinks on the way.

    hidden [1,S,D] holds the tokens that are left; `numbers` [S] are their positions, `image` and `other` the
    places among them of visual and of text tokens, `kept` the visual tokens' numbers within the picture (the
    second's from N on). Positions with A axes are [A,S].
    """

    hidden: Tensor

    def __init__(self, parts: Reference, input_ids: Tensor, restore: bool) -> None:
        self.parts = parts
        self.text: Any = parts.text
        self.ids = input_ids
        image = input_ids[0] == parts.token_id
        self.image = image.nonzero().flatten()
        self.other = (~image).nonzero().flatten()
        self.kept = torch.arange(len(self.image))
        self.numbers, self.next_number = parts.numbers(input_ids)
        self.cache = parts.cache()
        self.restore, self.count = restore, len(self.image)
        self.bias: dict[int, Tensor] = {}  # layer -> what is added to the logits of the keys in its cache

    def text_cues(self) -> dict[str, Tensor]:
        """text_embeds [1,R,D], and text_mask float32 [1,R]: 1 after the first picture."""
        embeds = self.parts.embed(self.ids[:, self.other])
        return {"text_embeds": embeds, "text_mask": (self.other > self.image[0]).float().unsqueeze(0)}

    def start(self, image_embeds: Tensor) -> None:
        """Embed the prompt [1,T,D], with all N visual tokens in their places."""
        if image_embeds.shape[1] != len(self.image):
            raise VtpError(
                f"the prompt has {len(self.image)} placeholders for {image_embeds.shape[1]} tokens"
            )
        prompt = self.parts.embed(self.ids)
        self.hidden = prompt.index_copy(1, self.image, image_embeds.to(prompt.dtype))
        self.parts.begin(self.ids, self.hidden)

    def cut(self, keep: Tensor, renumber: bool = False) -> None:
        """Leave only the visual tokens `keep` [K], numbered among those that are left; `renumber` as if
        nothing had been there, else the positions stay."""
        stay, first = torch.cat([self.other, self.image[keep]]).sort().values, int(self.numbers.flatten()[0])
        self.hidden, self.numbers = self.hidden[:, stay], self.numbers[..., stay]
        self.parts.cut(stay)
        self.image, self.other = (
            torch.searchsorted(stay, self.image[keep]),
            torch.searchsorted(stay, self.other),
        )
        self.kept = self.kept[keep]
        if renumber:
            self.numbers = first + torch.arange(len(stay))
            self.next_number = first + len(stay)

    def prefill(self, schedule: Sequence[Pruner], cues: dict[str, Tensor]) -> None:
        """Run all layers, cutting the prompt in front of the layer that each pruner names."""
        layers = [layer for pruner in schedule for layer in Site.parse(pruner.site).layers or (0,)]
        if layers and not 0 < layers[-1] < len(self.text.layers):
            raise VtpError(f"site decoder:{layers[-1]} needs a decoder of more than {layers[-1]} layers")
        for pruner, (first, end) in zip(schedule, pairwise([0, *layers]), strict=True):
            keep, rows = _select(pruner, {**cues, **self._run_to(first, end, pruner)})
            self.cut(keep)
            if rows is not None:
                self._put(rows)
        self.run(layers[-1] if layers else 0, len(self.text.layers))

    def _put(self, rows: Tensor) -> None:
        """What a method merged takes the place of the visual tokens that are left: rows [1,K,D], or those of
        a whole sequence [1,S,D] that a bundle passes on."""
        rows = rows if rows.shape[1] == len(self.image) else rows[:, self.image]
        width = self.hidden.shape[-1]  # a bundle's may have deepstack features beside them
        self.hidden = self.hidden.index_copy(1, self.image, rows[..., :width].to(self.hidden.dtype))

    def _run_to(self, first: int, end: int, pruner: Pruner) -> dict[str, Tensor]:
        """Run layers `first` to `end` - 1; the cues of that cut that are read, per token cut to the image."""
        weights: list[Tensor] = []
        with ExitStack() as stack:
            if {"attention_scores", "text_attention"} & set(pruner.needs):
                attention = self.text.layers[end - 1].self_attn
                hook = attention.register_forward_hook(lambda _m, _i, outputs: weights.append(outputs[1]))
                stack.callback(hook.remove)
            self.run(first, end)
        image, other = self.image, self.other
        read: dict[str, Callable[[], Tensor]] = {
            "hidden_states": lambda: self.hidden[:, image],
            "attention_scores": lambda: weights[0].float()[:, :, -1].mean(dim=1)[:, image],
            "next_scores": lambda: self._coming(end)[:, :, -1].float().mean(dim=1)[:, image],
            "keys": lambda: self._keys(end, pruner.settings.get("keys") == "normed")[:, image],
            "text_attention": lambda: weights[0].float()[:, :, other][..., image],
            "text_gravity": lambda: self._gravity(end - 1)[:, other][..., image],
        }
        return {name: cue() for name, cue in read.items() if name in {"hidden_states", *pruner.needs}}

    def _keys(self, number: int, normed: bool) -> Tensor:
        """What a layer that comes makes keys of, [1,S,·]."""
        layer = self.text.layers[number]
        return layer.self_attn.k_proj(self.parts.entering(layer)(self.hidden) if normed else self.hidden)

    def _coming(self, number: int) -> Tensor:
        """Attention weights [1,H,S,S] of a layer that comes."""
        layer = self.text.layers[number]
        return layer.self_attn(
            self.parts.entering(layer)(self.hidden),
            position_embeddings=self.parts.turns(number, self.hidden, self.numbers),
            attention_mask=self._masked(number, 0, self._new_bias()),
            **self.parts.beside_attention(self.numbers),
        )[1]

    def _gravity(self, layer: int) -> Tensor:
        """[1,S,S]: all-ones queries and keys, turned as a layer turns them; products / sqrt(head_dim)."""
        cos, sin = (part.float() for part in self.parts.turns(layer, self.hidden, self.numbers))
        turned = self.parts.turn(torch.ones_like(cos).unsqueeze(1), cos, sin)
        return (turned @ turned.transpose(2, 3))[:, 0] / cos.shape[-1] ** 0.5

    def run(self, first: int, end: int) -> None:
        """Run layers `first` to `end` - 1 on `hidden`, after what the cache holds."""
        prompt = self.hidden.shape[1] > 1
        for number in range(first, end):
            past = self.parts.length(self.cache, number)
            layer = self.text.layers[number]
            hidden = layer(
                self.hidden,
                attention_mask=self._masked(number, past, self._join_bias(number)),
                use_cache=True,
                position_embeddings=self.parts.turns(number, self.hidden, self.numbers),
                **with_cache(layer, self.cache),
                **self.parts.beside(number, self.numbers),
            )
            self.hidden = self.parts.after(number, hidden, self.image, self.kept) if prompt else hidden

    def _new_bias(self) -> Tensor:
        """Of the tokens in `hidden` [S]: log(N/K) for the K visual ones of a prompt, 0 for text."""
        bias = self.hidden.new_zeros(self.hidden.shape[1])
        if self.hidden.shape[1] > 1:
            bias[self.image] = math.log(self.count / len(self.image))
        return bias

    def _join_bias(self, layer: int) -> Tensor:
        """Of all tokens that a layer's cache holds once `hidden` has joined it."""
        known = [self.bias[layer]] if layer in self.bias else []
        self.bias[layer] = torch.cat([*known, self._new_bias()])
        return self.bias[layer]

    def _masked(self, layer: int, past: int, bias: Tensor) -> Tensor | None:
        """A layer's additive mask, with the bias of the keys [past + S] where attention is restored."""
        mask = self.parts.mask(layer, self.hidden, self.image, past)
        if not self.restore:
            return mask
        added = bias.view(1, 1, 1, -1)
        return added if mask is None else mask + added

    def answer(self, steps: int, eos_ids: Collection[int]) -> tuple[list[int], list[Tensor]]:
        """Go on greedily after the prompt."""
        tokens: list[int] = []
        logits: list[Tensor] = []
        while True:
            logits.append(self.parts.lm_head(self.parts.norm(self.hidden[:, -1]))[0].float())
            tokens.append(int(logits[-1].argmax()))
            if tokens[-1] in eos_ids or len(tokens) >= steps:
                return tokens, logits
            ids = self.ids.new_tensor([tokens[-1:]])
            self.hidden = self.parts.embed(ids)
            self.parts.begin(ids, self.hidden)
            self.numbers = torch.full_like(self.numbers[..., :1], self.next_number)
            self.next_number += 1
            self.run(0, len(self.text.layers))

    def cache_lengths(self) -> list[int]:
        """How many tokens every layer's cache holds."""
        return [self.parts.length(self.cache, layer) for layer in range(len(self.text.layers))]


def _select(pruner: Pruner, cues: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """keep_indices [K] among the tokens that arrive, and the rows [1,K,.] of a method that merges."""
    whole = "image_embeds" if Site.parse(pruner.site).kind == "projector" else "image_features"
    count = cues["hidden_states" if "hidden_states" in cues else whole].shape[1]
    if pruner.count != count:
        raise VtpError(f"the pruner was made for {pruner.count} visual tokens; this model has {count}")
    answer = pruner(**{name: cues[name] for name in pruner.needs})
    return (answer[0][0], answer[1]) if pruner.merges else (answer[0], None)
