"""Grows the reader out of the first built-in model, so that it starts with all that this one knows.

Each used layer of the tower becomes three: its attention stays in the first, its MLP is dealt out to all
three in turn, and the two others begin with attentions that look as the first does and say almost nothing.
One after the other instead of at once, the thirds are nearly, not exactly, the layer they were; training
heals that within some hundred steps. The last used layer looks twice, half as loud, since CLS is scored in
it. The decoder keeps those hidden units of its MLPs whose weights are largest.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vtp.scenes import model_dir
from vtp.scenes.training.deepen import AHEAD
from vtp.scenes.training.folder import Form, build_model

PARTS = 3
WHISPER = 0.005  # std of the new attentions' outputs
Weights = dict[str, Tensor]


def load_first() -> LlavaForConditionalGeneration:
    """The first built-in model."""
    return LlavaForConditionalGeneration.from_pretrained(model_dir())


@torch.no_grad()
def grow(form: Form, seed: int) -> LlavaForConditionalGeneration:
    """A model of `form` grown out of the first one; raises ValueError if the form does not allow it."""
    first, model = load_first(), build_model(seed, form)
    old, new = (m.model.vision_tower.encoder.layers for m in (first, model))
    used, trained = len(old) - 1, len(first.model.language_model.layers) - AHEAD
    if (form.tower_layers - 1, form.decoder_layers) != (PARTS * used, trained):
        raise ValueError(
            f"a tower of {form.tower_layers} and a decoder of {form.decoder_layers} layers cannot grow out "
            f"of the first model; choose {PARTS * used + 1} and {trained}"
        )
    state = {n: w for n, w in first.state_dict().items() if ".layers." not in n}
    model.load_state_dict(state, strict=False)
    for number in range(PARTS * used):
        _grow_layer(new[number], old[number // PARTS], number % PARTS, number // PARTS == used - 1)
    for number, layer in enumerate(model.model.language_model.layers):
        _narrow(layer, first.model.language_model.layers[number + AHEAD])
    return model


def _grow_layer(layer: Any, source: Any, part: int, last: bool) -> None:
    """Make `layer` the given third of `source`, a layer of CLIP."""
    weights: Weights = dict(source.state_dict())
    mine = torch.arange(part, weights["mlp.fc1.bias"].numel(), PARTS)
    fc1 = {name: weights.pop(f"mlp.fc1.{name}") for name in ("weight", "bias")}
    fc2 = {name: weights.pop(f"mlp.fc2.{name}") for name in ("weight", "bias")}
    loud = (0.5 if part != 1 else 0.0) if last else float(part == 0)
    for name in ("weight", "bias"):
        weights[f"self_attn.out_proj.{name}"] = loud * weights[f"self_attn.out_proj.{name}"]
    if not loud:
        nn.init.normal_(weights["self_attn.out_proj.weight"], std=WHISPER)
    layer.load_state_dict(weights, strict=False)
    mlp = layer.mlp
    mlp.fc2.weight.zero_()
    mlp.fc1.weight[: len(mine)], mlp.fc1.bias[: len(mine)] = fc1["weight"][mine], fc1["bias"][mine]
    mlp.fc2.weight[:, : len(mine)] = fc2["weight"][:, mine]
    mlp.fc2.bias.copy_(fc2["bias"] / PARTS)


def _narrow(layer: Any, source: Any) -> None:
    """Copy a layer of Llama, of its MLP as many hidden units as `layer` has."""
    weights: Weights = dict(source.state_dict())
    gate, up, down = (weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    strength = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    best = strength.topk(layer.mlp.gate_proj.out_features).indices.sort().values
    weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"] = gate[best], up[best]
    weights["mlp.down_proj.weight"] = down[:, best]
    layer.load_state_dict(weights)
