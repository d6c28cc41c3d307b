"""The reference that a bundle's answers are held against: pruning inside an unmodified transformers LLaVA.

Written without the exporter's graphs: plain PyTorch around the model's own modules, eager attention, one
growing cache, greedy choice. All N visual tokens are projected and placed in the prompt as transformers does
it; then the prompt is cut down to the kept places, in front of the first decoder layer (vision and projector
sites) or in front of layer L (decoder:L). Slow, simple, batch 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    pruner: Pruner | None,
    input_ids: Tensor,
    pixel_values: Tensor,
    max_new_tokens: int = 32,
    eos_ids: Collection[int] = (),
    positions: str = "compact",
) -> ReferenceAnswer:
    """Answer one prompt greedily, in the model's dtype.

    input_ids     int64 [1,T] with N image placeholders.
    pixel_values  float [1,3,H,W]; cast to the model's dtype.
    positions     "compact" (pruned tokens never existed) or "original" (kept tokens keep their places and new
                  ones go on from T). Decoder sites always keep the original ones.

    Raises VtpError where the model cannot serve the pruner's site, UsageError for an unknown `positions`.
    """
    if positions not in ("compact", "original"):
        raise UsageError(f"positions is '{positions}'; choose compact or original")
    site, cut = parse_site(pruner.site) if pruner else ("vision", None)
    with torch.no_grad(), _eager(model):
        features, scores = vision_cues(model, pixel_values, pruner)
        embeds = model.model.multi_modal_projector(features)
        decoder = _Decoder(model, input_ids, cut or 0, cut is not None or positions == "original")
        hidden = decoder.embed(embeds)
        cues: dict[str, Any]
        if site == "decoder":
            cues = decoder.head(hidden, pruner)
            hidden = cues.pop("hidden_states")
            cues["hidden_states"] = hidden[:, decoder.image]
        else:
            cues = {"image_features": features, "image_embeds": embeds, "attention_scores": scores}
        keep = _select(pruner, cues, embeds.shape[1])
        tokens, logits = decoder.answer(hidden, keep, max_new_tokens, eos_ids)
    return ReferenceAnswer(tokens, keep, logits, decoder.cache_lengths())


def vision_cues(
    model: LlavaForConditionalGeneration, pixel_values: Tensor, pruner: Pruner | None = None
) -> tuple[Tensor, Tensor | None]:
    """image_features [1,N,C] before the projector, and attention_scores float32 [1,N] if `pruner` needs them.

    Scores are the mean over heads of the CLS query's row, in the encoder layer that produces the features;
    the attention received (mean over heads and queries) in a tower without CLS. Needs eager attention.
    """
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    if not isinstance(layer, int):
        raise VtpError(f"vision_feature_layer is {layer}; only a single layer is supported")
    out = tower(
        pixel_values.to(model.dtype), output_hidden_states=True, output_attentions=True, return_dict=True
    )
    states = out.hidden_states[layer]
    has_cls = hasattr(tower.embeddings, "class_embedding")
    cropped = model.config.vision_feature_select_strategy == "default"
    features = states[:, 1:] if cropped else states
    if pruner is None or "decoder" in pruner.site or "attention_scores" not in pruner.needs:
        return features, None
    producer = range(len(out.hidden_states))[layer] - 1
    if producer < 0 or cropped != has_cls:
        raise VtpError("attention scores need patch features that an encoder layer made, without CLS")
    weights = out.attentions[producer].float().mean(dim=1)
    return features, weights[:, 0, 1:] if has_cls else weights.mean(dim=1)


class _Decoder:
    """The decoder's own layers, run one by one over a prompt that is cut down in front of layer `cut`."""

    def __init__(
        self, model: LlavaForConditionalGeneration, input_ids: Tensor, cut: int, original: bool
    ) -> None:
        self.model = model
        self.text: Any = model.model.language_model
        self.ids = input_ids
        self.cut = cut
        self.original = original
        image = input_ids[0] == model.config.image_token_id
        self.image = image.nonzero().flatten()
        self.other = (~image).nonzero().flatten()
        self.cache = DynamicCache()
        if not 0 <= cut < len(self.text.layers):
            raise VtpError(f"site decoder:{cut} needs a decoder of more than {cut} layers")

    def embed(self, image_embeds: Tensor) -> Tensor:
        """The prompt's embeddings [1,T,D], with all N visual tokens in their places."""
        if image_embeds.shape[1] != len(self.image):
            raise VtpError(
                f"the prompt has {len(self.image)} placeholders for {image_embeds.shape[1]} tokens"
            )
        prompt = self.text.embed_tokens(self.ids)
        return prompt.index_copy(1, self.image, image_embeds.to(prompt.dtype))

    def head(self, hidden: Tensor, pruner: Pruner | None) -> dict[str, Tensor]:
        """Layers below the cut on the whole prompt; the cues of the cut, cut to the image where per token."""
        rows: list[Tensor] = []
        attention = self.text.layers[self.cut - 1].self_attn
        hook = attention.register_forward_hook(lambda _module, _inputs, outputs: rows.append(outputs[1]))
        try:
            hidden = self.layers(hidden, 0, self.cut, torch.arange(hidden.shape[1]))
        finally:
            hook.remove()
        layer = self.text.layers[self.cut]
        normed = pruner is not None and pruner.settings.get("keys") == "normed"
        keys = layer.self_attn.k_proj(layer.input_layernorm(hidden) if normed else hidden)
        return {
            "hidden_states": hidden,
            "attention_scores": rows[0][:, :, -1].float().mean(dim=1)[:, self.image],
            "keys": keys[:, self.image],
        }

    def layers(self, hidden: Tensor, first: int, end: int, places: Tensor) -> Tensor:
        """Run layers `first` to `end` - 1 on hidden [1,S,D] at positions [S], after what the cache holds."""
        places = places.to(hidden.device).unsqueeze(0)
        mask = _causal(hidden) if hidden.shape[1] > 1 else None
        turns = self.text.rotary_emb(hidden, position_ids=places)
        for layer in self.text.layers[first:end]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=places,
                past_key_values=self.cache,
                use_cache=True,
                position_embeddings=turns,
            )
        return hidden

    def answer(
        self, hidden: Tensor, keep: Tensor, steps: int, eos_ids: Collection[int]
    ) -> tuple[list[int], list[Tensor]]:
        """Cut the prompt to the kept visual tokens, run the layers above, then go on greedily."""
        places = torch.cat([self.other, self.image[keep]]).sort().values
        numbers = places if self.original else torch.arange(len(places))
        position = self.ids.shape[1] if self.original else len(places)
        hidden = self.layers(hidden[:, places], self.cut, len(self.text.layers), numbers)
        tokens: list[int] = []
        logits: list[Tensor] = []
        while True:
            logits.append(self.model.lm_head(self.text.norm(hidden[:, -1]))[0].float())
            tokens.append(int(logits[-1].argmax()))
            if tokens[-1] in eos_ids or len(tokens) >= steps:
                return tokens, logits
            hidden = self.text.embed_tokens(self.ids.new_tensor([tokens[-1:]]))
            hidden = self.layers(hidden, 0, len(self.text.layers), torch.tensor([position]))
            position += 1

    def cache_lengths(self) -> list[int]:
        """How many tokens every layer's cache holds."""
        return [self.cache.get_seq_length(layer) for layer in range(len(self.text.layers))]


def _causal(hidden: Tensor) -> Tensor:
    """Additive mask [1,1,S,S] of a prompt [1,S,D] on an empty cache: a token sees itself and those before."""
    size = hidden.shape[1]
    lowest = torch.full((size, size), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device)
    return lowest.triu(1)[None, None]


def _select(pruner: Pruner | None, cues: dict[str, Any], count: int) -> Tensor:
    if pruner is None:
        return torch.arange(count)
    if pruner.count != count:
        raise VtpError(f"the pruner was made for {pruner.count} visual tokens; this model has {count}")
    return pruner(**{name: cues[name] for name in pruner.needs})[0]


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
