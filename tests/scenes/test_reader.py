"""The reader's folder: small, loadable by plain transformers, twelve used blocks, and able to read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vtp.bench.studies.blocks import Examinee
from vtp.export.exporter import Request, export
from vtp.runtime import Pipeline
from vtp.scenes import __file__ as scenes
from vtp.scenes import model_dir
from vtp.scenes.exam import held_out, score
from vtp.scenes.generator.pictures import READER_KINDS
from vtp.scenes.training.folder import build_tokenizer

READER = Path(scenes).with_name("reader")
pytestmark = pytest.mark.skipif(not READER.is_dir(), reason="the reader is not trained yet: make reader")


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(READER).eval()


def test_the_folder_is_small() -> None:
    files = list(READER.iterdir())
    assert sum(file.stat().st_size for file in files) < 10_000_000
    assert {file.name for file in files} == {file.name for file in model_dir().iterdir()}


def test_it_is_of_the_first_models_class_and_form(model: LlavaForConditionalGeneration) -> None:
    first = LlavaForConditionalGeneration.from_pretrained(model_dir())
    assert type(model) is type(first) and next(model.parameters()).dtype == torch.float32
    assert len(model.model.vision_tower.encoder.layers) >= 13
    for name in ("vision_feature_layer", "vision_feature_select_strategy", "image_token_id"):
        assert getattr(model.config, name) == getattr(first.config, name)
    assert model.config.vision_config.image_size == 336 and model.config.vision_config.patch_size == 14


def test_its_tokenizer_is_the_trained_one() -> None:
    processor = AutoProcessor.from_pretrained(READER)
    assert processor.tokenizer.get_vocab() == build_tokenizer(reads=True).get_vocab()
    assert processor.chat_template == AutoProcessor.from_pretrained(model_dir()).chat_template


def test_the_first_two_decoder_layers_are_quiet(model: LlavaForConditionalGeneration) -> None:
    for layer in model.model.language_model.layers[:2]:
        assert 0 < layer.self_attn.o_proj.weight.std() < 0.01
        assert 0 < layer.mlp.down_proj.weight.std() < 0.01


def test_it_answers_held_out_questions_of_every_kind() -> None:
    items = list(held_out(180, kinds=READER_KINDS))
    scores = score(items, Examinee(READER).take_exam(items))
    assert scores["all"].rate >= 0.85
    assert scores["sign"].rate >= 0.6 and scores["presence"].rate >= 0.75


def test_a_bundle_of_it_answers_as_transformers_does(tmp_path) -> None:  # type: ignore[no-untyped-def]
    items = list(held_out(24, seed=5, kinds=READER_KINDS))
    expected = [answer.strip() for answer in Examinee(READER).take_exam(items)]
    folder = export(Request(tmp_path / "bundle", str(READER), "none")).folder
    with Pipeline.load(folder, vision_feature_cache=1) as pipe:
        got = [pipe.generate(item.image, item.prompt, max_new_tokens=8).text.strip() for item in items]
    assert got == expected
