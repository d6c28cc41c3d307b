"""The reference that a bundle's answers are held against: pruning inside an unmodified transformers LLaVA.

Written without the exporter's graphs: plain PyTorch around the model's own modules, eager attention, one
growing cache, greedy choice. All N visual tokens are projected and placed in the prompt as transformers does
it; then the prompt is cut down to the kept places, in front of the first decoder layer (vision and projector
sites) or in front of layer L (decoder:L, or several L in turn). Rows that a method merged take the places
of the tokens they stand for. Slow, simple, batch 1.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from vtp.engines.errors import UsageError, VtpError
from vtp.export.pruners import parse_site
from vtp.export.pruners.base import Pruner


@dataclass
class ReferenceAnswer:
    """A greedy answer.

    token_ids     the new tokens; the last one is an EOS if one came.
    keep_indices  int64 [K], the kept visual tokens (0 to N-1, ascending); all N without a pruner.
    step_logits   per new token, the logits float32 [V] that chose it.
    cache_lengths tokens in the cache of every decoder layer at the end.
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
    model: LlavaForConditionalGeneration,
    pruner: Pruner | Sequence[Pruner] | None,
    input_ids: Tensor,
    pixel_values: Tensor,
    max_new_tokens: int = 32,
    eos_ids: Collection[int] = (),
    positions: str = "compact",
    image_size: tuple[int, int] | None = None,
) -> ReferenceAnswer:
    """Answer one prompt greedily, in the model's dtype.

    pruner        a method's pruner, or one for every site in turn, or None
    input_ids     int64 [1,T] with N image placeholders.
    pixel_values  float [1,3,H,W]; cast to the model's dtype.
    positions     "compact" (pruned tokens never existed) or "original" (kept tokens keep their places and new
                  ones go on from T). Decoder sites always keep the original ones.
    image_size    (height, width) of the picture, for models that see it in several views: pixel_values are
                  then [V,3,H,W], and what a vision or projector site chooses from are the P patches.

    Raises VtpError where the model cannot serve the pruner's site, UsageError for an unknown `positions`.
    """
    if positions not in ("compact", "original"):
        raise UsageError(f"positions is '{positions}'; choose compact or original")
    chain = [pruner] if isinstance(pruner, Pruner) else list(pruner or [])
    site = parse_site(chain[0].site)[0] if chain else "none"
    with torch.no_grad(), _eager(model):
        project = model.model.multi_modal_projector
        cues = vision_cues(model, pixel_values, chain[0] if site in ("vision", "projector") else None)
        cues = {name: _packed(model, values, image_size) for name, values in cues.items()}
        cues["image_embeds"] = project(cues["image_features"])
        decoder = _Decoder(model, input_ids, site == "decoder" or positions == "original")
        cues.update(decoder.text_cues())
        embeds, places = _tokens(model, pixel_values, image_size, cues["image_embeds"])
        if site in ("vision", "projector"):
            keep, rows = _select(chain[0], cues)
            keep = places[keep]
            if rows is not None:
                rows = project(rows.to(cues["image_features"].dtype)) if site == "vision" else rows
                embeds = embeds.index_copy(1, keep, rows.to(embeds.dtype))
            decoder.start(embeds)
            decoder.cut(keep)
        else:
            cues["image_embeds"] = embeds
            decoder.start(embeds)
        decoder.prefill(chain if site == "decoder" else [], cues)
        tokens, logits = decoder.answer(max_new_tokens, eos_ids)
    return ReferenceAnswer(tokens, decoder.kept, logits, decoder.cache_lengths())


def vision_cues(
    model: LlavaForConditionalGeneration, pixel_values: Tensor, pruner: Pruner | None = None
) -> dict[str, Tensor]:
    """image_features [1,N,C] before the projector, and the cues of the tower that `pruner` needs.

    attention_scores  float32 [1,N]: mean over heads of the CLS query's row, in the encoder layer that makes
                      the features; the attention received (mean over heads and queries) without CLS.
    vision_keys       [1,N,C]: k_proj of that layer.
    Needs eager attention.
    """
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    if not isinstance(layer, int):
        raise VtpError(f"vision_feature_layer is {layer}; only a single layer is supported")
    number = range(len(tower.encoder.layers) + 1)[layer] - 1
    keys: list[Tensor] = []
    hook = tower.encoder.layers[max(number, 0)].self_attn.k_proj.register_forward_hook(
        lambda _module, _inputs, output: keys.append(output)
    )
    try:
        out = tower(
            pixel_values.to(model.dtype), output_hidden_states=True, output_attentions=True, return_dict=True
        )
    finally:
        hook.remove()
    states = out.hidden_states[layer]
    has_cls = hasattr(tower.embeddings, "class_embedding")
    cropped = model.config.vision_feature_select_strategy == "default"
    cues = {"image_features": states[:, 1:] if cropped else states}
    wanted = {"attention_scores", "vision_keys"} & set(pruner.needs if pruner is not None else ())
    if wanted and (number < 0 or cropped != has_cls):
        raise VtpError("the tower's cues need patch features that an encoder layer made, without CLS")
    if "attention_scores" in wanted:
        weights = out.attentions[number].float().mean(dim=1)
        cues["attention_scores"] = weights[:, 0, 1:] if has_cls else weights.mean(dim=1)
    if "vision_keys" in wanted:
        cues["vision_keys"] = keys[0][:, 1:] if has_cls else keys[0]
    return cues


def _packed(model: Any, values: Tensor, image_size: tuple[int, int] | None) -> Tensor:
    """What every patch of every view has, [V,n,.] or [V,n]: in the order of the tokens, [1,P,.] or [1,P]."""
    if image_size is None:
        return values
    flat = values if values.dim() == 3 else values.unsqueeze(-1)
    packed = _pack(model, flat, image_size, None)
    return (packed if values.dim() == 3 else packed.squeeze(-1)).unsqueeze(0)


def _pack(model: Any, views: Tensor, image_size: tuple[int, int], line_end: Tensor | None) -> Tensor:
    """transformers' own packing of one picture's views [V,n,C]: [P,C], or with ends of lines [N,C]."""
    config = model.config
    if hasattr(config, "vision_aspect_ratio"):
        named = {"vision_aspect_ratio": config.vision_aspect_ratio}
    else:
        named = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    sizes = torch.tensor([image_size])
    return model.model.pack_image_features([views], sizes, image_newline=line_end, **named)[0][0]


def _tokens(
    model: Any, pixel_values: Tensor, image_size: tuple[int, int] | None, patches: Tensor
) -> tuple[Tensor, Tensor]:
    """All N visual tokens [1,N,D] as transformers makes them, and the places int64 [P] of the patches."""
    if image_size is None:
        return patches, torch.arange(patches.shape[1])
    sizes, vision = torch.tensor([image_size]), model.config.vision_config
    tokens = model.model.get_image_features(pixel_values.to(model.dtype), sizes, return_dict=True)
    per_view = (vision.image_size // vision.patch_size) ** 2
    marks = _pack(model, torch.ones(len(pixel_values), per_view, 1), image_size, torch.zeros(1))
    return tokens.pooler_output[0].unsqueeze(0), marks.flatten().nonzero().flatten()


class _Decoder:
    """The decoder's own layers, run one by one over a prompt that shrinks on the way.

    hidden [1,S,D] holds the tokens that are left; `numbers` [S] are their positions, `image` and `other` the
    places among them of visual and of text tokens, `kept` the visual tokens' numbers within the picture.
    """

    hidden: Tensor

    def __init__(self, model: LlavaForConditionalGeneration, input_ids: Tensor, original: bool) -> None:
        self.model = model
        self.text: Any = model.model.language_model
        self.ids = input_ids
        self.original = original
        image = input_ids[0] == model.config.image_token_id
        self.image = image.nonzero().flatten()
        self.other = (~image).nonzero().flatten()
        self.kept = torch.arange(len(self.image))
        self.numbers = torch.arange(input_ids.shape[1])
        self.next_number = input_ids.shape[1]
        self.cache = DynamicCache()

    def text_cues(self) -> dict[str, Tensor]:
        """text_embeds [1,R,D], and text_mask float32 [1,R]: 1 after the picture."""
        embeds = self.text.embed_tokens(self.ids[:, self.other])
        return {"text_embeds": embeds, "text_mask": (self.other > self.image[0]).float().unsqueeze(0)}

    def start(self, image_embeds: Tensor) -> None:
        """Embed the prompt [1,T,D], with all N visual tokens in their places."""
        if image_embeds.shape[1] != len(self.image):
            raise VtpError(
                f"the prompt has {len(self.image)} placeholders for {image_embeds.shape[1]} tokens"
            )
        prompt = self.text.embed_tokens(self.ids)
        self.hidden = prompt.index_copy(1, self.image, image_embeds.to(prompt.dtype))

    def cut(self, keep: Tensor) -> None:
        """Leave only the visual tokens `keep` [K], numbered among those that are left."""
        stay = torch.cat([self.other, self.image[keep]]).sort().values
        self.hidden, self.numbers = self.hidden[:, stay], self.numbers[stay]
        self.image, self.other = (
            torch.searchsorted(stay, self.image[keep]),
            torch.searchsorted(stay, self.other),
        )
        self.kept = self.kept[keep]
        if not self.original:
            self.numbers = torch.arange(len(stay))
            self.next_number = len(stay)

    def prefill(self, chain: Sequence[Pruner], cues: dict[str, Tensor]) -> None:
        """Run all layers, cutting the prompt in front of the layer that each pruner names."""
        layers = [parse_site(pruner.site)[1] or 0 for pruner in chain]
        if layers and not 0 < layers[-1] < len(self.text.layers):
            raise VtpError(f"site decoder:{layers[-1]} needs a decoder of more than {layers[-1]} layers")
        for pruner, (first, end) in zip(chain, pairwise([0, *layers]), strict=True):
            keep, _ = _select(pruner, {**cues, **self._run_to(first, end, pruner)})
            self.cut(keep)
        self.run(layers[-1] if layers else 0, len(self.text.layers))

    def _run_to(self, first: int, end: int, pruner: Pruner) -> dict[str, Tensor]:
        """Run layers `first` to `end` - 1; the cues of that cut, per token cut to the image."""
        weights: list[Tensor] = []
        attention = self.text.layers[end - 1].self_attn
        hook = attention.register_forward_hook(lambda _module, _inputs, outputs: weights.append(outputs[1]))
        try:
            self.run(first, end)
        finally:
            hook.remove()
        rows, hidden, layer = weights[0].float(), self.hidden, self.text.layers[end]
        normed = layer.input_layernorm(hidden)
        keys = layer.self_attn.k_proj(normed if pruner.settings.get("keys") == "normed" else hidden)
        _, coming = layer.self_attn(
            normed, position_embeddings=self._turns(hidden), attention_mask=_causal(hidden)
        )
        return {
            "hidden_states": hidden[:, self.image],
            "attention_scores": rows[:, :, -1].mean(dim=1)[:, self.image],
            "next_scores": coming[:, :, -1].float().mean(dim=1)[:, self.image],
            "keys": keys[:, self.image],
            "text_attention": rows[:, :, self.other][..., self.image],
            "text_gravity": self._gravity()[:, self.other][..., self.image],
        }

    def _gravity(self) -> Tensor:
        """[1,S,S]: all-ones queries and keys, turned as the model turns them; products / sqrt(head_dim)."""
        cos, sin = (part.float() for part in self._turns(self.hidden))
        ones = torch.ones_like(cos).unsqueeze(1)
        query, key = sys.modules[type(self.text).__module__].apply_rotary_pos_emb(ones, ones, cos, sin)
        return (query @ key.transpose(2, 3))[:, 0] / cos.shape[-1] ** 0.5

    def _turns(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.text.rotary_emb(hidden, position_ids=self.numbers.unsqueeze(0))

    def run(self, first: int, end: int) -> None:
        """Run layers `first` to `end` - 1 on `hidden`, after what the cache holds."""
        mask = _causal(self.hidden) if self.hidden.shape[1] > 1 else None
        turns = self._turns(self.hidden)
        for layer in self.text.layers[first:end]:
            self.hidden = layer(
                self.hidden,
                attention_mask=mask,
                position_ids=self.numbers.unsqueeze(0),
                past_key_values=self.cache,
                use_cache=True,
                position_embeddings=turns,
            )

    def answer(self, steps: int, eos_ids: Collection[int]) -> tuple[list[int], list[Tensor]]:
        """Go on greedily after the prompt."""
        tokens: list[int] = []
        logits: list[Tensor] = []
        while True:
            logits.append(self.model.lm_head(self.text.norm(self.hidden[:, -1]))[0].float())
            tokens.append(int(logits[-1].argmax()))
            if tokens[-1] in eos_ids or len(tokens) >= steps:
                return tokens, logits
            self.hidden = self.text.embed_tokens(self.ids.new_tensor([tokens[-1:]]))
            self.numbers = torch.tensor([self.next_number])
            self.next_number += 1
            self.run(0, len(self.text.layers))

    def cache_lengths(self) -> list[int]:
        """How many tokens every layer's cache holds."""
        return [self.cache.get_seq_length(layer) for layer in range(len(self.text.layers))]


def _causal(hidden: Tensor) -> Tensor:
    """Additive mask [1,1,S,S] of a prompt [1,S,D] on an empty cache: a token sees itself and those before."""
    size = hidden.shape[1]
    lowest = torch.full((size, size), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device)
    return lowest.triu(1)[None, None]


def _select(pruner: Pruner, cues: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """keep_indices [K] among the tokens that arrive, and the rows [1,K,.] of a method that merges."""
    count = cues["hidden_states" if "hidden_states" in cues else "image_features"].shape[1]
    if pruner.count != count:
        raise VtpError(f"the pruner was made for {pruner.count} visual tokens; this model has {count}")
    answer = pruner(**{name: cues[name] for name in pruner.needs})
    return (answer[0][0], answer[1]) if pruner.merges else (answer[0], None)


@contextmanager
def _eager(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """Eager attention, which alone returns its weights, for the time of a reference run."""
    parts: list[Any] = [model.model.vision_tower, model.model.language_model]
    before = [part.config._attn_implementation for part in parts]
    training = model.training
    try:
        for part in parts:
            part.set_attn_implementation("eager")
        model.eval()
        yield
    finally:
        model.train(training)
        for part, name in zip(parts, before, strict=True):
            part.set_attn_implementation(name)
