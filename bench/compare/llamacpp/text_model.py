"""The decoder of a model as GGUF: llama.cpp's architectures `qwen2` and `llama`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.compare.llamacpp.checkpoint import Checkpoint
from vtp.bench.compare.llamacpp.vocabulary import add_vocabulary
from vtp.engines import VtpError

ARCHITECTURES = ("qwen2", "llama")
# GGUF's name in a block -> transformers'.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_text_model(checkpoint: Checkpoint, path: Path, dtype: type = np.float16) -> None:
    """Write the decoder, tokenizer included: matrices in `dtype`, norms and biases in float32.

    Raises VtpError for a decoder or a tokenizer that the converter does not take.
    """
    from gguf import GGUFWriter

    text = checkpoint.config.text_config
    _check(text)
    writer = GGUFWriter(path, text.model_type)
    _add_sizes(writer, text)
    writer.add_file_type(0 if dtype is np.float32 else 1)
    add_vocabulary(writer, checkpoint)
    for name, values in _tensors(checkpoint):
        writer.add_tensor(name, values.astype(dtype) if values.ndim == 2 else values)
    finish(writer)


def finish(writer: Any) -> None:
    """Write a GGUF file whose keys and tensors were added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(text: Any) -> None:
    if text.model_type not in ARCHITECTURES:
        raise VtpError(
            f"the GGUF converter takes decoders of {', '.join(ARCHITECTURES)}, not {text.model_type}"
        )
    if text.rope_parameters["rope_type"] != "default" or text.hidden_act != "silu":
        raise VtpError("the GGUF converter takes decoders with default rotary embeddings and silu alone")


def head_width(text: Any) -> int:
    """Channels of one attention head."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _add_sizes(writer: Any, text: Any) -> None:
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head_width(text))
    writer.add_value_length(head_width(text))
    writer.add_rope_dimension_count(head_width(text))
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)


def _tensors(checkpoint: Checkpoint) -> Any:
    """GGUF's name and the float32 values of every tensor, one after the other."""
    text, names = checkpoint.config.text_config, checkpoint.layout
    yield "token_embd.weight", checkpoint.tensor(f"{names.text}embed_tokens.weight")
    yield "output_norm.weight", checkpoint.tensor(f"{names.text}norm.weight")
    if names.head in checkpoint:
        yield "output.weight", checkpoint.tensor(names.head)
    for layer in range(text.num_hidden_layers):
        for short, name in _BLOCK.items():
            for kind in ("weight", "bias"):
                source = f"{names.text}layers.{layer}.{name}.{kind}"
                if source in checkpoint:
                    values = checkpoint.tensor(source)
                    yield f"blk.{layer}.{short}.{kind}", _turned(values, text, short)


def _turned(values: np.ndarray, text: Any, short: str) -> np.ndarray:
    """Queries and keys in the order of channels that llama.cpp's rotary embedding of `llama` wants."""
    heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}.get(short)
    if heads is None or text.model_type != "llama":
        return values
    return interleaved(values, heads)


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads·D, ·] with the two halves of each head's D rows taken in turns: 0, D/2, 1, D/2 + 1, …"""
    halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
