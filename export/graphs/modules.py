"""The modules that become graphs: each takes and gives tensors in the order that its docstring names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtp.export.graphs.attention.operators import Cache, Lengths, Peek, TowerProbe, Watch, active, softcapped
from vtp.export.graphs.layout import Layout, lay_out, widened
from vtp.export.graphs.rotary import AxesRotary
from vtp.export.pruners.base import Pruner
from vtp.export.pruners.ops import gather_rows


@dataclass(frozen=True)
class Decoder:
    """The parts of a transformers decoder that graphs are made of.

    sight    what a token of a prompt sees beside itself and those before it: nothing ("causal"), the whole
             prompt ("prompt"), or, if it is a visual token, all those of its picture ("image")
    windows  whether layers with a sliding window keep to it; where not, no prompt may outgrow the window
    softcap  the logits are bent to stay within -softcap to softcap
    axes     numbers by which a position is told: position_ids are [B,S], or [B,S,axes] above 1
    streams  L: what is added to visual tokens after each of the first L layers travels beside the embeddings,
             which are then (1 + L)·D wide; the text's is 0
    """

    model: Any  # the base model: .layers, .norm, .rotary_emb, .embed_tokens, .config
    lm_head: Any
    sight: str = "causal"
    windows: bool = False
    softcap: float | None = None
    axes: int = 1
    streams: int = 0

    @property
    def layers(self) -> Sequence[Any]:
        return self.model.layers

    @property
    def rotary(self) -> Any:
        """hidden, position_ids -> cos and sin [B,S,d]."""
        return self.model.rotary_emb if self.axes == 1 else AxesRotary(self.model.rotary_emb, self.axes)

    @property
    def heads(self) -> int:
        return self.model.config.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.model.config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return self.layers[0].self_attn.head_dim

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    def turning(self, layer: int) -> str | None:
        """Name of a layer's rotary embedding, where kinds of layers have their own."""
        own = getattr(self.model.rotary_emb, "layer_types", None)
        return self.model.config.layer_types[layer] if own else None

    def wide(self, layer: int) -> int:
        """Width of what enters a layer, with what is still to be added after it and later ones."""
        return self.width * (1 + max(0, self.streams - layer))


class VisionEncoder(nn.Module):
    """pixel_values [B,3,H,W] -> image_features [B,N,C], then the cues asked for, in their order.

    `embed` turns pixels into the first hidden states; `layers` are only those that the features need, `norm`
    what follows them in some towers. Cues: attention_scores float32 [B,N] and vision_keys [B,N,C], both of
    the last of those layers.
    """

    def __init__(
        self,
        embed: nn.Module,
        layers: Sequence[nn.Module],
        has_cls: bool,
        cues: Sequence[str] = (),
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.has_cls = has_cls
        self.cues = tuple(cues)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        watched = self.layers[-1].self_attn if self.cues else None
        probe = TowerProbe(watched, self.has_cls)  # type: ignore[arg-type]
        hidden = self.embed(pixel_values)
        with active(probe):
            for layer in self.layers:
                hidden = layer(hidden, None)
        hidden = hidden if self.norm is None else self.norm(hidden)
        features = hidden[:, 1:] if self.has_cls else hidden
        read: dict[str, Any] = {"attention_scores": probe.scores, "vision_keys": probe.keys}
        return (features, *(read[name] for name in self.cues))


class Projector(nn.Module):
    """image_features [B,M,C] -> image_embeds [B,M,D]; M is N or, after a vision-site pruner, K."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, image_features: Tensor) -> Tensor:
        return self.projector(image_features)


class EmbedTokens(nn.Module):
    """input_ids int64 [B,T] -> inputs_embeds [B,T,D], and `more` zeros beside them: see `Decoder.streams`.

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
        given = dict(zip(self.cues, inputs, strict=True))
        answer = self.pruner(**{name: narrowed(name, given[name], self.widths) for name in self.pruner.needs})
        keep, rows = answer if self.pruner.merges else (answer, gather_rows(inputs[0], answer))
        if rows.shape[-1] < inputs[0].shape[-1]:  # a merged row's streams are those of its own token
            rows = torch.cat([rows, gather_rows(inputs[0][..., rows.shape[-1] :], keep)], dim=-1)
        if self.places is None:
            return keep, rows
        return torch.gather(self.places.unsqueeze(0).expand(keep.shape[0], -1), 1, keep), rows


class DecoderPruner(nn.Module):
    """A decoder-site pruner over S prompt tokens, n of them visual from image_start int64 [B,1] on.

    Inputs: hidden_states [B,S,D], position_ids int64 [B,S] or [B,S,A], image_start, then those that `others`
    names: the method's cues (over all S tokens where they are per token), image_embeds [B,N,D], and at a
    later one of several sites previous_indices int64 [B,n] (which of the image's N tokens arrive); text_rows
    int64 [B,R] where a later site reads text rows.
    Outputs: keep_indices [B,K] within the image, kept_hidden_states [B,S-n+K,D], kept_position_ids int64
    [B,S-n+K(,A)] (the original positions), and kept_text_rows int64 [B,R] if text_rows came in.
    """

    def __init__(
        self, pruner: Pruner, others: Sequence[str], widths: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.pruner = pruner
        self.others = tuple(others)
        self.widths = widths or {}

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, image_start: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        start = image_start
        given = {**dict(zip(self.others, others, strict=True)), "hidden_states": hidden_states}
        previous = given.get("previous_indices")
        keep = self.pruner(**self._cues(given, self._visual(start, previous)))
        source = self._source(keep, start, previous, hidden_states.shape[1])
        within = keep if previous is None else torch.gather(previous, 1, keep)
        answer = (within, gather_rows(hidden_states, source), _rows(position_ids, source))
        if "text_rows" not in given:
            return answer
        return (*answer, self._text_rows(given["text_rows"], start, within))

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


def narrowed(name: str, tensor: Tensor, widths: Mapping[str, int]) -> Tensor:
    """A cue without the streams beside it (`Decoder.streams`), which no method reads."""
    width = widths.get(name, tensor.shape[-1])
    return tensor if width == tensor.shape[-1] else tensor[..., :width]


def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
    return torch.gather(tensor, 1, indices) if tensor.dim() == 2 else gather_rows(tensor, indices)


# Cues that a decoder part computes; those named TEXT_CUES need the places of the text tokens.
PART_CUES = ("attention_scores", "next_scores", "keys", "text_attention", "text_gravity")
TEXT_CUES = ("text_attention", "text_gravity")


class DecoderPart(nn.Module):
    """Decoder layers first..last on a bound cache, for prefill and single steps alike.

    hidden [B,S,D], position_ids int64 [B,S] or [B,S,A], seqlens_k int32 [B], total_sequence_length int32 [],
    then ahead int64 [B,S] if visual tokens see all those of their picture, then text_rows int64 [B,R] if a
    cue of TEXT_CUES is asked for, then past key and value [B,G,capacity,d] per layer. A part with the last
    layer gives logits float32 [B,1,V] of every row's last real position; an earlier part gives hidden_states
    [B,S,D] and the cues that the pruner after it reads. Both then give present key and value per layer.
    """

    def __init__(
        self, decoder: Decoder, first: int, end: int, cues: Sequence[str] = (), normed_keys: bool = False
    ):
        super().__init__()
        self.decoder_layers = nn.ModuleList(list(decoder.layers)[first:end])
        self.rotary: Any = decoder.rotary
        self.numbers = range(first, end)
        self.turning = [decoder.turning(layer) for layer in range(first, min(end + 1, len(decoder.layers)))]
        self.sight, self.windows, self.softcap = decoder.sight, decoder.windows, decoder.softcap
        self.width = decoder.width
        self.cues = tuple(cues)
        self.reads_text = bool(set(cues) & set(TEXT_CUES))
        self.final = end == len(decoder.layers)
        self.norm = decoder.model.norm if self.final else None
        self.lm_head = decoder.lm_head if self.final else None
        # The layer after the cut: its keys (with or without its input norm), and what it is about to see.
        self.next_layer: Any = decoder.layers[end] if {"keys", "next_scores"} & set(cues) else None
        self.normed_keys = normed_keys

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        past = list(others)
        ahead = past.pop(0) if self.sight == "image" else None
        rows = past.pop(0) if self.reads_text else None
        if self.sight == "prompt":
            ahead = torch.zeros_like(position_ids) + hidden.shape[1]
        pairs = zip(past[::2], past[1::2], strict=True)
        lengths = Lengths(seqlens_k, total_sequence_length, ahead, self.windows)
        watch = Watch(self.numbers[-1], rows)
        cache = Cache(
            dict(zip(self.numbers, pairs, strict=True)), lengths, watch=watch if self.cues else None
        )
        hidden, *deep = hidden.split(self.width, dim=-1) if hidden.shape[-1] > self.width else (hidden,)
        turns = self._turns(hidden, position_ids)
        with active(cache):
            for layer, turn in zip(self.decoder_layers, turns, strict=False):
                hidden = layer(
                    hidden,
                    attention_mask=None,
                    position_embeddings=turn,
                    past_key_values=cache,
                    use_cache=True,
                )
                hidden = hidden + deep.pop(0) if deep else hidden
        present = tuple(tensor for number in self.numbers for tensor in cache.present[number])
        if self.final:
            return (self._logits(hidden, lengths), *present)
        cues = self._cues(hidden, turns, watch, lengths)
        return (torch.cat([hidden, *deep], dim=-1) if deep else hidden, *cues, *present)

    def _turns(self, hidden: Tensor, position_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """cos and sin for every layer of this part, and for the one after it."""
        kinds = {
            kind: self.rotary(hidden, position_ids, *(() if kind is None else (kind,)))
            for kind in dict.fromkeys(self.turning)
        }
        return [kinds[kind] for kind in self.turning]

    def _logits(self, hidden: Tensor, lengths: Lengths) -> Tensor:
        """Of the last position only, and two-dimensional, so that tied weights need no transposed copy."""
        assert self.norm is not None and self.lm_head is not None  # a final part has both
        row = gather_rows(hidden, lengths.last_index(hidden.shape[1]).unsqueeze(1)).squeeze(1)
        return softcapped(self.lm_head(self.norm(row)).float(), self.softcap).unsqueeze(1)

    def _cues(
        self, hidden: Tensor, turns: list[tuple[Tensor, Tensor]], watch: Watch, lengths: Lengths
    ) -> list[Tensor]:
        read: dict[str, Callable[[], Any]] = {
            "attention_scores": lambda: watch.last,
            "text_attention": lambda: watch.text,
            "text_gravity": lambda: _gravity(turns[-2], watch),
            "keys": lambda: self._keys(hidden),
            "next_scores": lambda: self._next_scores(hidden, turns[-1], lengths),
        }
        return [read[name]() for name in self.cues]

    def _keys(self, hidden: Tensor) -> Tensor:
        normed = self.next_layer.input_layernorm(hidden) if self.normed_keys else hidden
        return self.next_layer.self_attn.k_proj(normed)

    def _next_scores(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], lengths: Lengths) -> Tensor:
        """The last token's row in the layer that comes next: its attention runs up to that row."""
        watch = Watch(self.numbers[-1] + 1)
        with active(Peek(watch, lengths)):
            self.next_layer.self_attn(
                self.next_layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None
            )
        assert watch.last is not None  # the attention function read it
        return watch.last


def _gravity(rotary: tuple[Tensor, Tensor], watch: Watch) -> Tensor:
    """Products float32 [B,R,S] of all-ones queries at the text's places and all-ones keys, both turned.

    A pair of ones turned by an angle a is (cos a - sin a, cos a + sin a), and two such pairs have the
    product 2 cos(a - b); cos and sin [B,S,d] hold every angle twice.
    """
    cos, sin = (part.float() for part in rotary)
    assert watch.text_rows is not None  # given with every cue of TEXT_CUES
    places = watch.text_rows.clamp(0, cos.shape[1] - 1)
    products = torch.matmul(gather_rows(cos, places), cos.transpose(1, 2))
    products = products + torch.matmul(gather_rows(sin, places), sin.transpose(1, 2))
    return products * cos.shape[2] ** -0.5
