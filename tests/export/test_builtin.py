"""The built-in model, end to end: bundles against an unmodified transformers model on held-out questions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vtp.export.exporter import Request, export
from vtp.export.pruners import Site, find_method
from vtp.export.verify.parity import Chosen
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline, Timings, open_bundle
from vtp.runtime.media.own_picture import OWN_PICTURE, OWN_QUESTION
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter
from vtp.runtime.stages.runner import StageRunner
from vtp.scenes import model_dir
from vtp.scenes.exam import Item, held_out

from ..once import Once
from ..test_readme import tried

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(model_dir()).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def bundles(once: Once) -> Callable[[str], Path]:
    """The built-in model's bundle by method, exported at the first call; adaptprune's by the README."""
    keep = {"none": None, "vispruner": "64"}

    def get(name: str) -> Path:
        if name == "adaptprune":
            return tried(once) / "bundle"
        return once.folder(
            f"builtin-{name}", lambda part: export(Request(part, method=name, keep_tokens=keep[name]))
        )

    return get


def encode(processor: Any, item: Item) -> Any:
    """The question as transformers' own processor encodes it."""
    content = [{"type": "image"}, {"type": "text", "text": item.prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=item.image, text=text, return_tensors="pt")


@pytest.mark.parametrize("count", [13, pytest.param(52, marks=pytest.mark.slow)])
def test_unpruned_tokens_equal_transformers_on_held_out_questions(
    bundles: Callable[[str], Path], model: LlavaForConditionalGeneration, processor: Any, count: int
) -> None:
    with Pipeline.load(bundles("none"), image_cache=1) as pipe:
        for item in held_out(count, seed=7):
            inputs = encode(processor, item)
            with torch.no_grad():
                wanted = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            wanted_ids = wanted[0, inputs.input_ids.shape[1] :].tolist()
            answer = pipe.generate(item.image, item.prompt, max_new_tokens=NEW_TOKENS)
            assert answer.token_ids == wanted_ids, item.prompt
            assert answer.raw_text == processor.decode(wanted_ids, skip_special_tokens=True)
        assert pipe.generate(OWN_PICTURE, OWN_QUESTION).text == "blue"


@pytest.mark.parametrize(("method", "keep"), [("vispruner", 64), ("adaptprune", 57)])
def test_pruned_answers_equal_the_torch_reference(
    method: str, keep: int, bundles: Callable[[str], Path], processor: Any
) -> None:
    """Equal tokens for equal kept tokens; the choice itself is compared below, and in test_pruners."""
    eager = LlavaForConditionalGeneration.from_pretrained(model_dir(), attn_implementation="eager").eval()
    pruner = find_method(method)((24, 24), keep)
    eos = [eager.generation_config.eos_token_id]
    with Pipeline.load(bundles(method)) as pipe:
        for item in islice(held_out(48, seed=8), 0, None, 4):
            inputs = encode(processor, item)
            answer = pipe.generate(item.image, item.prompt, max_new_tokens=NEW_TOKENS)
            kept = torch.tensor([answer.kept])
            wanted = reference_generate(
                eager, Chosen(pruner, kept), inputs.input_ids, inputs.pixel_values, NEW_TOKENS, eos_ids=eos
            )
            assert answer.token_ids == wanted.token_ids
            assert answer.visual_tokens == (576, keep)


@pytest.mark.parametrize(("method", "keep"), [("vispruner", 64), ("adaptprune", 57)])
def test_the_choice_on_real_pictures_equals_the_torch_module(
    method: str, keep: int, bundles: Callable[[str], Path]
) -> None:
    """The torch module, given the cues that flowed through the bundle, keeps the very same tokens."""
    pruner = find_method(method)((24, 24), keep)
    bundle = open_bundle(bundles(method))
    runner = StageRunner(bundle, "ort-cpu", None)
    prompter = Prompter(bundle.manifest.text, bundle.path("tokenizer.json"))
    for item in islice(held_out(48, seed=9), 0, None, 4):
        prompt = prompter.encode(prompter.messages_for(item.prompt))
        pixels = preprocess(item.image, bundle.manifest.image)
        values = runner.prefill(keep, pixels, prompt.ids, prompt.image_start, Timings())
        cues = {name: torch.from_numpy(values[name].numpy()) for name in pruner.needs}
        if Site.parse(pruner.site).in_decoder:
            visual = slice(prompt.image_start, prompt.image_start + 576)
            cues = {name: cue[:, visual] for name, cue in cues.items()}
        assert values["keep_indices"].numpy().tolist() == pruner(**cues).tolist(), item.prompt
    runner.close()


def test_adaptprune_chooses_as_inside_transformers(bundles: Callable[[str], Path], processor: Any) -> None:
    """Whole pictures through both models (VisPruner's rounds magnify differences of 1e-6: see docs)."""
    eager = LlavaForConditionalGeneration.from_pretrained(model_dir(), attn_implementation="eager").eval()
    pruner = find_method("adaptprune")((24, 24), 57)
    shared = []
    with Pipeline.load(bundles("adaptprune")) as pipe:
        for item in islice(held_out(48, seed=9), 0, None, 4):
            inputs = encode(processor, item)
            wanted = reference_generate(eager, pruner, inputs.input_ids, inputs.pixel_values, 1)
            kept = pipe.generate(item.image, item.prompt, max_new_tokens=1).kept
            shared.append(len(set(kept) & set(wanted.keep_indices.flatten().tolist())) / 57)
    assert sum(shared) / len(shared) >= 0.98, shared
