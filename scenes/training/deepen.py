"""Puts two layers that look but hardly speak before the decoder, so that it measures decoder:2 methods.

The trained decoder reads the picture in its very first layer. Pruning after two layers would then cost
nothing, whatever is kept: measured, four random tokens of 576 scored as well as all. With two copies of the
first layer in front, whose outputs are all but silenced, the attention of layer 1 is the attention with which
the model is about to read, and the reading happens from layer 2 on, among the tokens that a method kept.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from vtp.scenes.training.folder import SHIPPED, Form, build_config

AHEAD = 2
WHISPER = 0.003  # std of the silenced outputs: enough to notice a wrong layer, too little to change answers


@torch.no_grad()
def deepen(
    model: LlavaForConditionalGeneration, form: Form = SHIPPED, seed: int = 0
) -> LlavaForConditionalGeneration:
    """A copy of the trained model with `AHEAD` quiet copies of its first decoder layer in front."""
    trained = len(model.model.language_model.layers)
    deeper = LlavaForConditionalGeneration(build_config(replace(form, decoder_layers=trained + AHEAD)))
    mark = "language_model.layers."
    state: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if mark not in name:
            state[name] = weight
            continue
        front, tail = name.split(mark)
        number, rest = tail.split(".", 1)
        state[f"{front}{mark}{int(number) + AHEAD}.{rest}"] = weight
        if number == "0":
            state.update({f"{front}{mark}{ahead}.{rest}": weight for ahead in range(AHEAD)})
    deeper.load_state_dict(state)
    torch.manual_seed(seed)
    for layer in deeper.model.language_model.layers[:AHEAD]:
        nn.init.normal_(layer.self_attn.o_proj.weight, std=WHISPER)
        nn.init.normal_(layer.mlp.down_proj.weight, std=WHISPER)
    deeper.generation_config = model.generation_config
    return deeper
