"""The cache is handed to transformers under the name that this version knows, without a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from vtp.export.checkpoint.cache_name import with_cache


def deprecated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers 5.24 wraps what takes the older name, too."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        assert "past_key_values" not in kwargs
        return forward(*args, **kwargs)

    return wrapped


class Older(nn.Module):
    def forward(self, hidden: Any, past_key_values: Any = None) -> Any:
        return past_key_values


class Newer(nn.Module):
    @deprecated
    def forward(self, hidden: Any, cache: Any = None, **kwargs: Any) -> Any:
        return cache


def test_the_cache_arrives_by_either_name() -> None:
    for module in (Older(), Newer()):
        assert module(0, **with_cache(module, "keys and values")) == "keys and values"


def test_this_transformers_takes_it_without_a_warning() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaModel(LlamaConfig(vocab_size=8, **sizes)).eval()
    hidden, numbers, layer = torch.randn(1, 3, 8), torch.arange(3)[None], model.layers[0]
    cache, whole = DynamicCache(), DynamicCache()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        turns = model.rotary_emb(hidden, numbers)
        layer(hidden, position_embeddings=turns, use_cache=True, **with_cache(layer, cache))
        model(inputs_embeds=hidden, use_cache=True, **with_cache(model, whole))
    assert (cache.get_seq_length(0), whole.get_seq_length(0)) == (3, 3)
