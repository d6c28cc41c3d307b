"""The built-in model's folder: small, loadable by plain transformers, and able to answer."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vtp.engines import UsageError
from vtp.scenes import examples_dir, model_dir
from vtp.scenes.exam import held_out, score
from vtp.scenes.generator.pictures import COLORS, SHAPES

GRAMMAR = "what how many where is the shape color northwest northeast southwest southeast 0 1 2 3 4 5 6 ?"
WORDS = (*SHAPES, *COLORS, *GRAMMAR.split())


@pytest.fixture(scope="module")
def processor():  # type: ignore[no-untyped-def]
    return AutoProcessor.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(model_dir()).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_dir() / "tokenizer.json"))


def _text(role: str, text: str, image: bool = False) -> dict:  # type: ignore[type-arg]
    return {"role": role, "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}


def _answer(model, processor, image: Image.Image, question: str) -> str:  # type: ignore[no-untyped-def]
    prompt = processor.apply_chat_template([_text("user", question, image=True)], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=8)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_unknown_built_in_model_is_refused() -> None:
    with pytest.raises(UsageError, match="no built-in model is called 'poet'; choose model or reader"):
        model_dir("poet")


def test_the_folder_is_small_and_readable() -> None:
    files = list(model_dir().iterdir())
    assert sum(file.stat().st_size for file in files) < 10_000_000
    assert all(file.suffix in (".json", ".safetensors", ".jinja") for file in files)
    assert all(os.access(file, os.R_OK) for file in files)


def test_the_model_has_the_promised_shape(model: LlavaForConditionalGeneration) -> None:
    config = model.config
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert (config.vision_config.image_size // config.vision_config.patch_size) ** 2 == 576
    assert config.text_config.num_key_value_heads < config.text_config.num_attention_heads
    assert config.text_config.head_dim % 8 == 0
    assert next(model.parameters()).dtype == torch.float32
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("word", WORDS)
def test_key_words_are_single_tokens(tokenizer: Tokenizer, word: str) -> None:
    assert len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1


@pytest.mark.parametrize(
    "text", ["what color is the star ?", "naïve façade", "猫は何色？", "🙂👩‍👩‍👧 \t\n x", "\x00\x7f", ""]
)
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, processor, text: str) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id("<s>") and ids == processor.tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text == processor.decode(ids, skip_special_tokens=True)


def test_the_chat_template_takes_several_turns(processor) -> None:  # type: ignore[no-untyped-def]
    turns = [
        _text("system", "Answer in one word ."),
        _text("user", "what color is the star ?", image=True),
        _text("assistant", "red"),
        {"role": "user", "content": "how many circle ?"},
    ]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        "Answer in one word . USER: <image>\nwhat color is the star ? ASSISTANT: red</s>"
        "USER: how many circle ? ASSISTANT:"
    )


def test_the_chat_template_refuses_unknown_roles(processor) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Exception, match="unknown role tool"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])


def test_a_prompt_holds_576_visual_tokens(processor) -> None:  # type: ignore[no-untyped-def]
    item = next(iter(held_out(1)))
    inputs = processor(images=item.image, text="USER: <image>\nhi ASSISTANT:", return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 576
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)


def test_the_examples_are_there() -> None:
    entries = json.loads((examples_dir() / "questions.json").read_text(encoding="utf-8"))
    assert {"image": "scene.png", "prompt": "what color is the star ?", "kind": "color"}.items() <= next(
        e for e in entries if e["image"] == "scene.png" and e["kind"] == "color"
    ).items()
    for entry in entries:
        with Image.open(Path(examples_dir(), entry["image"])) as image:
            assert image.size == (336, 336)


def test_the_model_answers_held_out_questions(model, processor) -> None:  # type: ignore[no-untyped-def]
    items = list(held_out(60))
    answers = [_answer(model, processor, item.image, item.prompt) for item in items]
    assert score(items, answers)["all"].rate >= 0.85


def test_the_model_goes_on_in_a_second_turn(model, processor) -> None:  # type: ignore[no-untyped-def]
    right = 0
    items = list(held_out(16))
    for first, second in zip(items[::2], items[1::2], strict=True):
        turns = [
            _text("user", first.prompt, image=True),
            _text("assistant", first.answer),
            _text("user", second.prompt),
        ]
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(images=first.image, text=prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8)
        said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += said.strip() == second.answer
    assert right >= 5


def test_the_first_two_decoder_layers_are_quiet(model: LlavaForConditionalGeneration) -> None:
    """Otherwise the picture would be read before decoder:2, and pruning there would cost nothing."""
    for layer in model.model.language_model.layers[:2]:
        assert 0 < layer.self_attn.o_proj.weight.std() < 0.01
        assert 0 < layer.mlp.down_proj.weight.std() < 0.01
