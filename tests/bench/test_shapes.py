"""Full-size shapes: their parameter counts, and folders that transformers loads and vtp exports."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from vtp.bench.shapes import models as shapes
from vtp.bench.shapes.models import SHAPES, Shape, find_shape, tensor_shapes, write_shape
from vtp.engines import UsageError, VtpError

from ..models.tiny import text_config, vision_config


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_parameters_of_a_shape_are_those_of_its_model(shape: Shape) -> None:
    sizes = tensor_shapes(shape.parts().config, shape.architecture)
    assert sum(math.prod(size) for size in sizes.values()) == shape.parameters
    assert (shape.bytes("float16"), shape.bytes("float32")) == (2 * shape.parameters, 4 * shape.parameters)


@pytest.mark.parametrize("name", SHAPES)
def test_special_tokens_have_the_ids_of_the_config(name: str, tmp_path: Path) -> None:
    parts = SHAPES[name].parts()
    shapes._write_words(parts, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for word, number in parts.special.items():
        assert tokenizer.convert_tokens_to_ids(word) == number
        assert tokenizer(word, add_special_tokens=False).input_ids == [number]
    text = "What is the café's dog doing? 你好"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("\n\n").input_ids) == 1  # as in SmolLM2's vocabulary, which llama.cpp relies on
    size = parts.config.get_text_config().vocab_size
    silent = [
        at for at in range(500, size) if at not in parts.special.values() and not tokenizer.decode([at])
    ]
    assert len(tokenizer) <= size and not silent
    image = getattr(parts.config, "image_token_id", None) or parts.config.image_token_index
    assert image in parts.special.values()


def small(tied: bool) -> Shape:
    """The shape `llava-1.5-7b` with a tower and a decoder of a few thousand weights."""

    def parts() -> Any:
        made = SHAPES["llava-1.5-7b"].parts()
        text = text_config("llama", 4, 2, 2, 8, tied, vocab_size=32064)
        made.config.vision_config = vision_config("clip", 336, 14, 2)
        made.config.text_config, made.config.tie_word_embeddings = text, tied
        return made

    count = sum(
        math.prod(size) for size in tensor_shapes(parts().config, "LlavaForConditionalGeneration").values()
    )
    return replace(SHAPES["llava-1.5-7b"], name="small", parameters=count, parts=parts)


@pytest.mark.parametrize("tied", [False, True])
def test_a_written_shape_loads_without_a_tensor_missing_or_left_over(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shapes.SHAPES, "small", small(tied))
    monkeypatch.setattr(shapes, "SHARD_BYTES", 1_000_000)
    folder = write_shape("small", tmp_path / "model", seed=3)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values())
    assert model.dtype == torch.float16
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    assert abs(model.lm_head.weight.float().std() - 0.02) < 1e-3
    assert abs(model.model.language_model.norm.weight.float().mean() - 1) < 0.05
    again = write_shape("small", tmp_path / "again", seed=3)
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_a_shape_that_cannot_be_written_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"unknown shape '7b'; choose one of llava-1\.5-7b, "):
        find_shape("7b")
    with pytest.raises(UsageError, match="unknown dtype 'int8'; choose one of float16, float32"):
        write_shape("smolvlm-256m", tmp_path / "model", dtype="int8")
    with pytest.raises(UsageError, match="exists already"):
        write_shape("smolvlm-256m", tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(VtpError, match=r"takes 14\.1 GB; .* has 0\.1 GB free"):
        write_shape("llava-1.5-7b", tmp_path / "model")
    assert not list(tmp_path.iterdir())
