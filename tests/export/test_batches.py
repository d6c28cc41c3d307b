"""Several prompts at once, and several pictures in a prompt: held against one by one, transformers, torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vtp.engines import UsageError, VtpError
from vtp.export.exporter import Request, export
from vtp.export.families.reference import Reference
from vtp.export.pruners import find_method
from vtp.runtime import Pipeline
from vtp.runtime.media import pictures
from vtp.runtime.result import Result
from vtp.runtime.stages.runner import StageRunner

from ..once import Once

N, LENGTH = 16, 128  # see tests/conftest.py
PROMPTS = ["what shape is the red ?", "how many ?", "naïve café 你好 where is the blue circle on the left ?"]
# Bundles beyond conftest's: the model, and fields of Request.
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "cdpruner": ("gqa", {"method": "cdpruner", "keep_tokens": "5"}),
    "cdpruner-original": (
        "gqa",
        {"method": "cdpruner", "keep_tokens": "5", "method_options": ["positions=original"]},
    ),
    "visionzip": ("gqa", {"method": "visionzip", "keep_tokens": "6"}),
    "sparsevlm": ("four", {"method": "sparsevlm", "keep_tokens": "4"}),
    "fixed": ("gqa", {"method": "adaptprune", "keep_tokens": "5", "target": "tensorrt", "dtype": "float32"}),
    "fixed-none": ("gqa", {"method": "none", "target": "tensorrt", "dtype": "float32"}),
}
slow = pytest.mark.slow


def noise(seed: int) -> Image.Image:
    size = (40 + 30 * seed, 90, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


PICTURES = [noise(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def folder(
    once: Once, exported: Callable[[str], Any], model_folder: Callable[[str], Path]
) -> Callable[[str], Path]:
    """A bundle's folder by name, of EXTRA or of conftest's."""

    def get(name: str) -> Path:
        if name not in EXTRA:
            return exported(name).folder
        model, wishes = EXTRA[name]
        return once.bundle(model_folder(model), max_length=LENGTH, verify="none", **wishes)

    return get


@pytest.fixture(scope="module")
def pipe(exported: Callable[[str], Any]) -> Iterator[Pipeline]:
    with Pipeline.load(exported("vispruner").folder, threads=1) as pipeline:
        yield pipeline


def said(result: Result) -> tuple[Any, ...]:
    return result.token_ids, result.raw_text, result.kept, result.finish_reason, result.prompt_tokens


# -- batches -------------------------------------------------------------------------------------------------

BATCHED = [
    "none",
    "vispruner",
    "original",
    "adaptprune",
    "cdpruner",
    *(pytest.param(name, marks=slow) for name in ("fastv", "siglip", "visionzip", "sparsevlm", "fixed")),
    *(pytest.param(name, marks=slow) for name in ("fixed-none", "cdpruner-original")),
]


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_says_what_single_prompts_say(folder: Callable[[str], Path], name: str) -> None:
    """Unequal prompts, every keep-count; some answers end by a stop string long before the others do."""
    with Pipeline.load(folder(name), threads=1) as pipe:
        options: dict[str, Any] = {"max_new_tokens": 24}
        for keep in pipe.manifest.visual.keep:
            pairs = list(zip(PICTURES, PROMPTS, strict=True))
            alone = [pipe.generate(image, words, keep_tokens=keep, **options) for image, words in pairs]
            stop = next(piece for piece in alone[1].raw_text[1:] if piece.isascii())
            wanted = [
                pipe.generate(image, words, keep_tokens=keep, stop=stop, **options) for image, words in pairs
            ]
            free = pipe.generate_batch(PICTURES, PROMPTS, keep_tokens=keep, **options)
            cut = pipe.generate_batch(PICTURES, PROMPTS, keep_tokens=keep, stop=stop, **options)
            assert [said(one) for one in free] == [said(one) for one in alone]
            assert [said(one) for one in cut] == [said(one) for one in wanted]
            assert {len(one.token_ids) for one in cut} != {24} and cut[1].finish_reason == "stop"
            assert len({tuple(one.token_ids) for one in free}) == 3
            assert [one.visual_tokens for one in free] == [(N, keep)] * 3


@pytest.mark.parametrize("name", ["vispruner", "original", "adaptprune"])
def test_rows_fill_their_caches_each_on_its_own(folder: Callable[[str], Path], name: str) -> None:
    prompts = ["how many ?" + " red" * count for count in (60, 5, 30)]
    with Pipeline.load(folder(name), threads=1) as pipe:
        pipe.manifest.text.__dict__["eos_token_ids"] = ()  # no answer ends before its cache is full
        pairs = zip(PICTURES, prompts, strict=True)
        alone = [pipe.generate(image, words, max_new_tokens=500) for image, words in pairs]
        batch = pipe.generate_batch(PICTURES, prompts, max_new_tokens=500)
    assert [said(one) for one in batch] == [said(one) for one in alone]
    lengths = [len(one.token_ids) for one in batch]
    assert len(set(lengths)) == 3 and all(one.finish_reason == "length" for one in batch)


def test_every_row_samples_as_it_would_alone(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "max_new_tokens": 10}
    batch = pipe.generate_batch([PICTURES[0]] * 3, [PROMPTS[0]] * 3, seed=7, **options)
    alone = [pipe.generate(PICTURES[0], PROMPTS[0], seed=7 + row, **options) for row in range(3)]
    assert [one.token_ids for one in batch] == [one.token_ids for one in alone]
    assert len({tuple(one.token_ids) for one in batch}) == 3


def test_long_lists_go_in_several_batches(pipe: Pipeline) -> None:
    """Any batch size gives the same, a single prompt in between too; also with unequal picture counts."""
    images = [PICTURES[0], PICTURES[:2], PICTURES[1], PICTURES[1:], PICTURES[2]]
    prompts = [*PROMPTS, *PROMPTS[:2]]
    wanted = [
        said(pipe.generate(image, words, max_new_tokens=6))
        for image, words in zip(images, prompts, strict=True)
    ]
    for size in (1, 2, 4, None):
        batch = pipe.generate_batch(images, prompts, max_new_tokens=6, batch_size=size)
        assert [said(one) for one in batch] == wanted
        assert said(pipe.generate(images[1], prompts[1], max_new_tokens=6)) == wanted[1]
    assert pipe.batch_size == 8 and pipe.generate_batch([], []) == []


def test_a_batch_of_conversations(pipe: Pipeline) -> None:
    turns = [
        [{"role": "user", "content": words}, {"role": "assistant", "content": "a star"}] for words in PROMPTS
    ]
    talks = [[*turn, {"role": "user", "content": "and how many ?"}] for turn in turns]
    batch = pipe.generate_batch(PICTURES, messages=talks, max_new_tokens=5)
    for image, talk, one in zip(PICTURES, talks, batch, strict=True):
        assert said(one) == said(pipe.generate(image, messages=talk, max_new_tokens=5))
        assert {"preprocess", "tokenize", "vision_encoder", "decoder"} <= set(one.timings.stages)
        assert 0 < one.timings.ttft <= one.timings.total


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (PICTURES, {"prompts": PROMPTS[:2]}, "3 images are given for 2 prompts; "),
        (PICTURES, {}, "either prompts or messages"),
        (PICTURES, {"prompts": PROMPTS, "messages": []}, "either prompts or messages"),
        (PICTURES[0], {"prompts": PROMPTS}, "images must be a list"),
        (PICTURES, {"prompts": "what ?"}, "prompts must be a list"),
        (np.zeros((2, 1)), {"prompts": PROMPTS}, r"for each prompt, not array\(\[\[0.\], \[0.\]\]\)$"),
        (PICTURES, {"prompts": {10**5000}}, "for each prompt, not of type set"),
        (PICTURES, {"prompts": [*PROMPTS[:2], " "]}, "prompt 3 of 3: the prompt is empty"),
        ([PICTURES[0], "no.png", []], {"prompts": PROMPTS}, "prompt 2 of 3: no such file"),
        ([PICTURES[0], []], {"prompts": PROMPTS[:2]}, "prompt 2 of 2: no picture is given"),
        (PICTURES, {"prompts": PROMPTS, "batch_size": 0}, "batch_size 0"),
        (PICTURES, {"prompts": PROMPTS, "keep_tokens": 4}, "keep_tokens 4 is not in this bundle"),
    ],
)
def test_bad_batches(pipe: Pipeline, images: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pipe.generate_batch(images, options.pop("prompts", None), **options)
    assert "\n" not in str(caught.value)
    assert pipe.generate(PICTURES[0], "how many ?", max_new_tokens=1).token_ids


def test_pictures_are_decoded_batch_by_batch(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    load, run = pictures.load_image, StageRunner.prefill_rows

    def loading(*source: Any) -> Any:
        events.append("load")
        return load(*source)

    def running(*args: Any, **options: Any) -> Any:
        events.append("run")
        return run(*args, **options)

    monkeypatch.setattr(pictures, "load_image", loading)
    monkeypatch.setattr(StageRunner, "prefill_rows", running)
    pipe.generate_batch(PICTURES, PROMPTS, max_new_tokens=2, batch_size=2)
    assert events == ["load", "load", "run", "load", "run"]


def test_what_shows_without_decoding_is_said_before_any_answer(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged picture shows when its turn comes, and the line says whose it is."""
    whole = tmp_path / "whole.png"
    PICTURES[0].save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no picture")
    options: dict[str, Any] = {"max_new_tokens": 1, "batch_size": 1}
    with pytest.raises(VtpError, match=r"^prompt 3 of 3: .*half\.png' is truncated or damaged"):
        pipe.generate_batch([whole, whole, tmp_path / "half.png"], PROMPTS, **options)
    monkeypatch.setattr("vtp.runtime.media.pictures.load_image", lambda *_: pytest.fail("decoded"))
    for bad, kind in ((tmp_path / "text.png", VtpError), (np.zeros((3, 3)), UsageError), (None, UsageError)):
        with pytest.raises(kind, match=r"^prompt 3 of 3: "):
            pipe.generate_batch([whole, whole, bad], PROMPTS, **options)


def test_a_batch_is_one_generation(pipe: Pipeline) -> None:
    stream = pipe.stream(PICTURES[0], PROMPTS[0])
    next(stream)
    with pytest.raises(VtpError, match="busy"):
        pipe.generate_batch(PICTURES, PROMPTS)
    stream.close()


# -- several pictures ----------------------------------------------------------------------------------------

TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what shape is this ?"}]},
    {"role": "assistant", "content": "a star"},
    {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "text", "text": "and this ? how many more than here"},
            {"type": "image"},
        ],
    },
]


def inputs_of(model_folder: Path, images: list[Image.Image], messages: list[dict[str, Any]]) -> Any:
    processor = AutoProcessor.from_pretrained(model_folder)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(images=images, text=text, return_tensors="pt", add_special_tokens=False)


def asked(words: str, count: int) -> list[dict[str, Any]]:
    content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": words}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("name", ["none", pytest.param("siglip-none", marks=slow)])
@pytest.mark.parametrize("count", [2, 3])
def test_unpruned_pictures_equal_transformers(
    exported: Callable[[str], Any], tmp_path: Path, model_folder: Callable[[str], Path], name: str, count: int
) -> None:
    source = model_folder("siglip" if name == "siglip-none" else "gqa")
    if name == "siglip-none":
        folder = export(Request(tmp_path / "x", str(source), method="none", max_length=LENGTH)).folder
    else:
        folder = exported(name).folder
    model = LlavaForConditionalGeneration.from_pretrained(source).eval()
    conversations = [asked(PROMPTS[0], count), *([TURNS] if count == 3 else [])]
    with Pipeline.load(folder, threads=1) as pipe:
        for messages in conversations:
            given = inputs_of(source, PICTURES[:count], messages)
            with torch.no_grad():
                answer = model.generate(**given, max_new_tokens=24, do_sample=False)
            wanted = answer[0, given["input_ids"].shape[1] :].tolist()
            result = pipe.generate(PICTURES[:count], messages=messages, max_new_tokens=24)
            assert result.token_ids == wanted
            assert result.visual_tokens == (count * N, count * N)
            assert result.kept == [list(range(N))] * count
            assert result.prompt_tokens == given["input_ids"].shape[1] - count * N
        first = pipe.generate(PICTURES[:count], PROMPTS[0], max_new_tokens=24)
        assert (
            first.token_ids
            == pipe.generate_batch([PICTURES[:count]], PROMPTS[:1], max_new_tokens=24)[0].token_ids
        )
        turned = pipe.generate(PICTURES[count - 1 :: -1], PROMPTS[0], max_new_tokens=24)
        assert turned.token_ids != first.token_ids  # which picture is which matters


def pruned_in_torch(
    model: Any, given: Any, pruner: Any, original: bool, steps: int
) -> tuple[list[int], list[list[int]]]:
    """Cut every picture by itself, put what is left into the prompt, and read all of it again every step."""
    parts, ids = Reference(model), given["input_ids"][0]
    embeds, image = parts.embed(ids[None])[0], ids == model.config.image_token_id
    text = {
        "text_embeds": embeds[~image][None],
        "text_mask": (torch.arange(len(ids)) > image.nonzero()[0])[~image][None].float(),
    }
    stay, kept = ~image, []
    starts = [int(place) for place in image.nonzero().flatten()[::N]]
    for pixels, start in zip(given["pixel_values"], starts, strict=True):
        cues = parts.vision(pixels[None], ("attention_scores",))
        rows = parts.project(cues["image_features"])
        cues = {**cues, "image_embeds": rows, **text}
        keep = pruner(**{name: cues[name] for name in pruner.needs})[0]
        embeds[start : start + N] = rows[0]
        stay[start + keep] = True
        kept.append(keep.tolist())
    numbers = torch.arange(len(ids))[stay] if original else torch.arange(int(stay.sum()))
    after, prompt, tokens = len(ids) if original else len(numbers), embeds[stay], list[int]()
    for step in range(steps):
        # With a mask given, transformers takes a gap in the positions for no end of a sequence.
        mask = torch.ones(1, len(prompt), dtype=torch.int64)
        hidden = parts.text(
            inputs_embeds=prompt[None], position_ids=numbers[None], attention_mask=mask, use_cache=False
        )
        tokens.append(int(parts.lm_head(hidden.last_hidden_state[0, -1]).argmax()))
        prompt = torch.cat([prompt, parts.embed(torch.tensor([tokens[-1:]]))[0]])
        numbers = torch.cat([numbers, torch.tensor([after + step])])
    return tokens, kept


@pytest.mark.parametrize(
    "name", ["vispruner", "original", "cdpruner", pytest.param("cdpruner-original", marks=slow)]
)
def test_pruned_pictures_equal_torch(
    folder: Callable[[str], Path], model_folder: Callable[[str], Path], name: str
) -> None:
    source, steps = model_folder("gqa"), 16
    model = LlavaForConditionalGeneration.from_pretrained(source).eval()
    with Pipeline.load(folder(name), threads=1) as pipe:
        pipe.manifest.text.__dict__["eos_token_ids"] = ()
        method = pipe.manifest.method
        for keep in pipe.manifest.visual.keep:
            pruner = find_method(method.name)((4, 4), keep, **method.options)
            for messages in (asked(PROMPTS[2], 3), TURNS):
                given = inputs_of(source, PICTURES, messages)
                with torch.no_grad(), Reference(model).eager():
                    wanted = pruned_in_torch(model, given, pruner, method.positions == "original", steps)
                result = pipe.generate(PICTURES, messages=messages, keep_tokens=keep, max_new_tokens=steps)
                assert (result.token_ids, result.kept) == wanted
                assert result.visual_tokens == (3 * N, 3 * keep)


def test_more_pictures_than_run_together(pipe: Pipeline) -> None:
    """Six pictures go through the image stages at once or four at a time; for nine 128 tokens are too few."""
    six = [noise(seed) for seed in range(6)]
    whole = said(pipe.generate(six, "how ?", max_new_tokens=4))
    runner = pipe._open_runner()
    graph = pipe.manifest.graphs["vision_encoder.onnx"]
    graph.axes["batch"][-1] = 4
    try:
        assert runner.pictures_together == 4
        assert said(pipe.generate(six, "how ?", max_new_tokens=4)) == whole
    finally:
        graph.axes["batch"][-1] = 8
    with pytest.raises(
        VtpError, match=r"beside 144 visual tokens of 9 pictures .* room for 0; .* fewer pict"
    ):
        pipe.generate(six + PICTURES, "how many ?")


@pytest.mark.parametrize(
    ("images", "messages", "message"),
    [
        ([], None, "no picture is given"),
        (PICTURES[:2], asked("x", 1), "the messages hold 1 images, and 2 pictures are given; "),
        (PICTURES[:2], TURNS, "the messages hold 3 images, and 2 pictures are given; "),
        (PICTURES[0], TURNS, "the messages hold 3 images, and 1 picture is given; "),
        (PICTURES[:1], asked("x", 2), "the messages hold 2 images, and 1 picture is given; "),
    ],
)
def test_counts_that_do_not_match(pipe: Pipeline, images: Any, messages: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pipe.generate(images, None if messages else "x", messages=messages)
    assert "\n" not in str(caught.value)


def test_a_list_of_one_is_one_picture(pipe: Pipeline) -> None:
    wanted = pipe.generate(PICTURES[0], PROMPTS[0], max_new_tokens=4)
    assert said(pipe.generate([PICTURES[0]], PROMPTS[0], max_new_tokens=4)) == said(wanted)


def test_pictures_are_reused_together(exported: Callable[[str], Any], pipe: Pipeline) -> None:
    with Pipeline.load(exported("vispruner").folder, threads=1, image_cache=1) as reusing:
        for images in (PICTURES, PICTURES, PICTURES[::-1], PICTURES[0], PICTURES[:2], PICTURES[:2]):
            wanted = pipe.generate(images, PROMPTS[0], max_new_tokens=4)
            assert said(reusing.generate(images, PROMPTS[0], max_new_tokens=4)) == said(wanted)


def test_decoder_sites_take_one_picture(exported: Callable[[str], Any]) -> None:
    with Pipeline.load(exported("adaptprune").folder, threads=1) as pipe:
        with pytest.raises(
            UsageError, match=r"method adaptprune .* one picture per prompt, not 2; .* several"
        ):
            pipe.generate(PICTURES[:2], "x")
        with pytest.raises(UsageError, match="prompt 2 of 2: method adaptprune"):
            pipe.generate_batch([PICTURES[0], PICTURES[:2]], ["x", "y"])
