"""Which file wins: folders that contradict themselves, held against unmodified transformers.

Pixels, prompts and generation settings are those of `AutoProcessor` and `from_pretrained` on the same folder,
and answers are `generate(do_sample=False)`'s.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.smolvlm import processing_smolvlm
from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING, ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

from vtp.engines import VtpError
from vtp.export.checkpoint import loading as checkpoint
from vtp.export.checkpoint.generation import read_generation
from vtp.export.cli import main
from vtp.export.exporter import Request, export
from vtp.runtime.bundle.manifest import GenerationInfo
from vtp.runtime.generation.logits_rules import written_out
from vtp.runtime.pipeline import Pipeline
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter

from ...models.tiny_video import save_onevision
from ...oracles.disagreeing import FAMILIES, STEPS, edit, save_disagreeing, strip

ASKED = "what color is the star ?"
NEW = 12  # tokens of an answer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's contradicting folder; read only."""
    root, made = tmp_path_factory.mktemp("disagreeing"), dict[str, Path]()

    def get(name: str) -> Path:
        if name not in made:
            made[name] = root / name
            save_disagreeing(name, made[name])
        return made[name]

    return get


@pytest.fixture
def without_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoProcessor without the part for videos, which needs torchvision (SmolVLM's also num2words), and
    without Gemma 4's for sound."""
    others = ("video_processor", "feature_extractor")
    check, loaders = ProcessorMixin.check_argument_for_proper_class, type(MODALITY_TO_AUTOPROCESSOR_MAPPING)
    find = loaders.__getitem__

    def allowing_none(self: Any, name: str, argument: Any) -> Any:
        return None if name in others else check(self, name, argument)

    loader = SimpleNamespace(from_pretrained=lambda *_, **__: None)
    monkeypatch.setattr(
        loaders, "__getitem__", lambda self, key: loader if key in others else find(self, key)
    )
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", allowing_none)
    monkeypatch.setattr(processing_smolvlm, "num2words", object())


def picture_for(spec: Any) -> Image.Image:
    """Noise, of the size that the bundle is made for where its processor adapts to each picture."""
    height, width = spec.image_size or (61, 90)
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8))


def asked(picture: Image.Image) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": ASKED}]}
    ]


def by_processor(folder: Path, picture: Image.Image) -> dict[str, Any]:
    """What AutoProcessor makes of a question about a picture, for `generate`."""
    processor = AutoProcessor.from_pretrained(folder)
    if getattr(processor, "video_processor", processor) is None:  # SmolVLM's looks into it for pictures too
        processor.video_processor = SimpleNamespace(num_frames=1, fps=1, size={})
    if processor.chat_template is None and "PaliGemma" not in type(processor).__name__:
        processor.chat_template = AutoTokenizer.from_pretrained(folder).get_chat_template()
    if processor.chat_template is None:
        return dict(processor(images=picture, text=ASKED, return_tensors="pt"))
    return dict(
        processor.apply_chat_template(
            asked(picture), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


def check_reading(folder: Path, tmp_path: Path) -> None:
    """Pixels bit for bit, prompt ids one by one, ends and rules of an answer."""
    model = checkpoint.load(folder, "float32")
    picture = picture_for(model.image)
    wanted = by_processor(folder, picture)
    pixels = preprocess(picture, model.image)
    (given,) = (value for key, value in wanted.items() if key.startswith("pixel_values"))
    assert np.array_equal(pixels.ravel(), given.numpy().ravel()[: pixels.size])
    assert not given.numpy().ravel()[pixels.size :].any()  # Gemma 4's are filled up
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(model.tokenizer_json)
    prompter = Prompter(model.text, tokenizer)
    prompt = prompter.encode(prompter.messages_for(ASKED))
    image, count = model.text.image_token_id, model.family.grid[0] * model.family.grid[1]
    runs = model.text.placeholder_ids.count(image)
    assert written_out(prompt.ids, image, [count // runs] * runs) == wanted["input_ids"][0].tolist()
    check_rules(folder, model)


def check_rules(folder: Path, model: checkpoint.Checkpoint) -> None:
    config = AutoModelForImageTextToText.from_pretrained(folder).generation_config
    ends, info = config.eos_token_id, model.generation.info
    assert model.text.eos_token_ids == tuple(sorted(ends if isinstance(ends, list) else [ends]))
    assert info.repetition_penalty == (config.repetition_penalty or 1.0)
    assert info.no_repeat_ngram_size == (config.no_repeat_ngram_size or 0)
    assert info.min_length == (config.min_length or 0)
    assert info.suppress_tokens == (config.suppress_tokens or [])


@pytest.mark.usefixtures("without_videos")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_that_contradicts_itself_is_read_as_transformers_reads_it(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Whole, and after each file or key that won was taken away."""
    folder = Path(shutil.copytree(folders(name), tmp_path / "model"))
    for step in STEPS:
        strip(folder, step)
        check_reading(folder, tmp_path)


def test_settings_for_pictures_stand_in_for_those_of_videos(tmp_path: Path) -> None:
    """As AutoVideoProcessor does it in folders without settings for videos: the class is the videos' own."""
    save_onevision(tmp_path)
    (tmp_path / "video_preprocessor_config.json").unlink()
    edit(tmp_path / "preprocessor_config.json", image_mean=[0.25, 0.5, 0.75])
    spec = checkpoint.load(tmp_path, "float32", frames=2).image
    given, _ = BaseVideoProcessor.get_video_processor_dict(str(tmp_path))
    assert (spec.kind, spec.mean) == ("clip", tuple(given["image_mean"]))
    assert spec.fixed_size == (given["size"]["height"], given["size"]["width"])


# -- answers -------------------------------------------------------------------------------------------------


def answer_of(folder: Path, given: dict[str, Any], **options: Any) -> list[int]:
    """transformers' own greedy answer."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        tokens = model.generate(**given, do_sample=False, max_new_tokens=NEW, **options)
    return tokens[0, given["input_ids"].shape[1] :].tolist()


def set_rules(folder: Path, given: dict[str, Any]) -> list[int]:
    """Write a generation_config.json in which every rule acts on this prompt's answer; returns the answer
    that the model would give without."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2], "pad_token_id": 0}))
    free = answer_of(folder, given)
    rules: dict[str, Any] = {
        "repetition_penalty": 1.25,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [free[-1]],
        "begin_suppress_tokens": [free[0], 9],
        "forced_bos_token_id": 40,
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 0.3,
    }
    path.write_text(json.dumps({**rules, "eos_token_id": [2]}))
    first = answer_of(folder, given)
    rules["bad_words_ids"] = [[first[3]], first[5:7], [first[8]]]
    path.write_text(json.dumps({**rules, "eos_token_id": [2]}))
    second = answer_of(folder, given)
    # The second token would end the answer, which `min_new_tokens` puts off.
    last = {"min_new_tokens": 4, "forced_eos_token_id": 77, "eos_token_id": [second[1], 2]}
    path.write_text(json.dumps({**rules, **last}))
    return free


QUICK = ("llava", "qwen2_5_vl", "idefics3")


@pytest.mark.usefixtures("without_videos")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_answers_of_a_folder_that_contradicts_itself_are_transformers(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Every generation rule acts, beside files that say otherwise; and the caller's penalty comes first."""
    folder = Path(shutil.copytree(folders(name), tmp_path / "model"))
    picture = picture_for(checkpoint.load(folder, "float32").image)
    given = by_processor(folder, picture)
    free = set_rules(folder, given)
    wanted = answer_of(folder, given)
    assert wanted != free[: len(wanted)]
    notes: list[str] = []
    request = Request(tmp_path / "out", model=str(folder), method="none", verify="none")
    bundle = export(request, note=notes.append)
    assert len(notes) == 1 and "do_sample True, temperature 0.3" in notes[0]
    with Pipeline.load(bundle.folder, engine="ort-cpu", threads=1) as pipe:
        assert pipe.generate(picture, ASKED, max_new_tokens=NEW).token_ids == wanted
        for penalty in (1.0, 1.75):
            found = pipe.generate(picture, ASKED, max_new_tokens=NEW, repetition_penalty=penalty)
            assert found.token_ids == answer_of(folder, given, repetition_penalty=penalty)
        both = pipe.generate_batch([picture] * 2, [ASKED, "where ?"], max_new_tokens=NEW)
        assert both[0].token_ids == wanted
        assert both[1].token_ids == pipe.generate(picture, "where ?", max_new_tokens=NEW).token_ids


# -- what is not served --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"num_beams": 4}, "sets num_beams to 4, which changes greedy answers"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "sets penalty_alpha to 0.6"),
        ({"guidance_scale": 1.5}, "sets guidance_scale to 1.5"),
        ({"encoder_repetition_penalty": 1.1}, "sets encoder_repetition_penalty"),
        ({"encoder_no_repeat_ngram_size": 3}, "sets encoder_no_repeat_ngram_size"),
        ({"sequence_bias": [[[7], -2.0]]}, "sets sequence_bias"),
        ({"exponential_decay_length_penalty": [3, 1.5]}, "sets exponential_decay_length_penalty"),
        ({"stop_strings": ["x"]}, "sets stop_strings"),
        ({"repetition_penalty": 0.0}, "has to be a strictly positive float, but is 0.0"),
        ({"repetition_penalty": 1e-46}, "of generation_config.json is 1e-46; give a number from 1.2e-38"),
        ({"repetition_penalty": 1e39}, "of generation_config.json is 1e+39; give a number from 1.2e-38"),
        ({"repetition_penalty": "much"}, "has to be a strictly positive float"),
        ({"no_repeat_ngram_size": 1.5}, "has to be a strictly positive integer"),
        ({"bad_words_ids": [5]}, "`bad_words_ids` has to be a list of lists"),
        ({"bad_words_ids": []}, "`bad_words_ids` has to be a non-empty list"),
        ({"bad_words_ids": [[5, 9999]]}, "bad_words_ids of generation_config.json has 9999, not one of"),
        ({"forced_eos_token_id": 9999}, "forced_eos_token_id of generation_config.json has 9999"),
        ({"eos_token_id": -1}, "eos_token_id of generation_config.json has -1, not one of the model's 384"),
        ({"eos_token_id": [2, 10**20]}, "has 100000000000000000000, not one of the model's 384 tokens; give"),
        ({"eos_token_id": 384}, "has 384, not one of the model's 384 tokens; give ids of 0 to 383"),
        ({"suppress_tokens": [1.5]}, "suppresses the token 1.5"),
        ({"suppress_tokens": ["x"]}, "cannot use the generation settings"),
        ({"min_new_tokens": "x"}, "cannot use the generation settings"),
        (
            {"cache_implementation": "quantized", "cache_config": {"nbits": 4}},
            "sets cache_implementation to 'quantized', which changes greedy answers",
        ),
        ({"num_beams": "x"}, "sets num_beams to 'x'"),
    ],
)
def test_generation_settings_that_are_refused(tmp_path: Path, rules: dict[str, Any], message: str) -> None:
    """What transformers refuses, and what would change greedy answers in silence."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **rules}))
    with pytest.raises(VtpError, match=re.escape(message)) as caught:
        read_generation(tmp_path, None, 384)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({}, ""),
        ({"num_beams": 1, "do_sample": False, "temperature": 1.0, "top_k": 50, "use_cache": True}, ""),
        ({"bad_words_ids": [[], [2]], "forced_bos_token_id": 9}, ""),
        ({"prompt_lookup_num_tokens": 3, "length_penalty": 2.0, "chat_format": "x"}, ""),
        ({"cache_implementation": "static"}, ""),
        (
            {"do_sample": True, "top_p": 0.001, "temperature": 0.1},
            "do_sample True, temperature 0.1, top_p 0.001",
        ),
        (
            {"max_new_tokens": 512, "top_k": 1},
            "also sets top_k 1, max_new_tokens 512: bundles answer greedily",
        ),
    ],
)
def test_what_matters_to_sampling_or_length_is_said(
    tmp_path: Path, rules: dict[str, Any], words: str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **rules}))
    found = read_generation(tmp_path, None, 384)
    assert found.eos_ids == (2,) and found.info == GenerationInfo()
    assert [words in note for note in found.notes] == ([True] if words else [])


def test_an_end_that_only_the_tokenizer_names_is_said(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{}")
    found = read_generation(tmp_path, SimpleNamespace(eos_token_id=5), 384)
    assert found.eos_ids == (5,) and "answers end with the tokenizer's, 5" in found.notes[0]
    with pytest.raises(VtpError, match="eos_token_id of the tokenizer has 384, not one of the model's 384"):
        read_generation(tmp_path, SimpleNamespace(eos_token_id=384), 384)


def test_the_command_says_what_is_not_served(
    folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(folders("llava"), tmp_path / "model"))
    edit(folder / "generation_config.json", do_sample=True, temperature=0.2)
    wish = ["--model", str(folder), "--method", "none", "--verify", "none", "-o", str(tmp_path / "out")]
    assert main(wish) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "note" in line]
    assert len(lines) == 1 and lines[0].startswith(
        "vtp-export: note: generation_config.json also sets do_sample"
    )
    edit(folder / "generation_config.json", num_beams=3)
    assert main([*wish, "--overwrite"]) == 1
    assert "sets num_beams to 3, which changes greedy answers" in capsys.readouterr().err


def spoil_templates(folder: Path) -> None:
    edit(folder / "processor_config.json", chat_template={"a": "x", "b": "y"})


def spoil_files(folder: Path) -> None:
    edit(folder / "processor_config.json", chat_template=...)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")


def spoil_sound(folder: Path) -> None:
    edit(folder / "processor_config.json", audio_tokenizer={"audio_tokenizer_class": "DacModel"})


def spoil_code(folder: Path) -> None:
    edit(folder / "processor_config.json", image_processor={"auto_map": {"AutoImageProcessor": "x.Odd"}})
    edit(folder / "config.json", model_type="odd")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_templates, r"several chat templates \(a, b\) and none is called 'default'"),
        (spoil_files, "cannot load the processor in .*conflicting files"),
        (spoil_sound, "names an audio tokenizer"),
        (spoil_code, "cannot load the image processor"),
    ],
)
def test_settings_that_are_refused(
    folders: Callable[[str], Path], tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = Path(shutil.copytree(folders("llava"), tmp_path / "model"))
    spoil(folder)
    with pytest.raises(VtpError, match=message):
        checkpoint.load(folder, "float32")
