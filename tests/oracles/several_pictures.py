"""Prompts with several pictures: a bundle against transformers' own answer and the torch reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vtp.engines import Value
from vtp.export.families import find_family
from vtp.export.pruners import find_method
from vtp.export.verify.reference import ReferenceAnswer, reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.preprocess import preprocess
from vtp.runtime.result import Result, Timings
from vtp.runtime.stages.runner import Row

Turns = list[dict[str, Any]]
# Pictures and a conversation -> what transformers' own processing makes of them, for `generate`.
Processing = Callable[[list[Image.Image], Turns], dict[str, Any]]
STEPS = 20
WORDS = ["what shape is the red ?", "how many circle where is the blue ? and what color is the star ?"]
# Pictures in two turns, at the start of one, between words and at its end.
TALK: Turns = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what shape is this ?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a star"}]},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "is it"},
            {"type": "image"},
            {"type": "text", "text": "or this ?"},
            {"type": "image"},
        ],
    },
]


def asked(words: str, count: int) -> Turns:
    """`count` pictures in front of the words of one turn."""
    return [
        {
            "role": "user",
            "content": [*({"type": "image"} for _ in range(count)), {"type": "text", "text": words}],
        }
    ]


def noises(count: int, height: int, width: int) -> list[Image.Image]:
    """Pictures of one size, no two alike."""
    rng = np.random.default_rng(11)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


def check_answers(
    folder: Path,
    model: Any,
    processing: Processing,
    size: tuple[int, int],
    talks: Sequence[Turns],
    pixels_of: Callable[[Mapping[str, Any]], Any] = lambda given: given["pixel_values"],
) -> None:
    """Every conversation about pictures of `size` (height, width), at every keep-count: prompt, pixels,
    greedy tokens and what was kept.

    pixels_of  what a bundle makes of pictures, among what transformers' processing gave
    """
    with Pipeline.load(folder, threads=1) as pipe:
        pipe.manifest.text.__dict__["eos_token_ids"] = ()
        for turns in talks:
            count = sum(part["type"] == "image" for turn in turns for part in turn["content"])
            pictures = noises(count, *size)
            given = processing(pictures, turns)
            pixels = [preprocess(picture, pipe.manifest.image) for picture in pictures]
            theirs = pixels_of(given)
            assert np.array_equal(np.concatenate(pixels).reshape(theirs.shape), theirs.numpy())
            for keep in pipe.manifest.visual.keep:
                result = pipe.generate(pictures, messages=turns, keep_tokens=keep, max_new_tokens=STEPS)
                wanted = in_torch(pipe, model, given["input_ids"], pixels, keep, size)
                _check(pipe, result, wanted, given["input_ids"], count)
                steps = wanted.step_logits
                if keep == pipe.manifest.visual.count:
                    tokens, steps = by_transformers(model, given)
                    assert result.token_ids == tokens
                found = logits_of(pipe, pixels, turns, keep, wanted.token_ids)
                for ours, theirs in zip(found, steps, strict=True):
                    assert np.abs(ours - theirs.numpy()).max() < 1e-3
                turned = logits_of(pipe, pixels[::-1], turns, keep, wanted.token_ids[:1])
                assert np.abs(found[0] - turned[0]).max() > 1e-2  # which picture is which matters


def logits_of(
    pipe: Pipeline, pixels: list[np.ndarray], turns: Turns, keep: int, tokens: list[int]
) -> list[np.ndarray]:
    """What the bundle's decoder says, [V], where each of `tokens` comes next: a model may say one token over
    and over whatever it sees, its logits tell."""
    prompt, runner = pipe._prompter.encode(turns, len(pixels)), pipe._open_runner()
    values = runner.prefill_rows(keep, pixels, [Row(prompt.ids, prompt.image_starts)], Timings())
    found, position = [values["logits"].numpy()[0, 0].copy()], int(values["next_position"].numpy()[0])
    for number, token in enumerate(tokens[:-1]):
        found.append(runner.step(keep, token, position + number).copy())
    return found


def _check(pipe: Pipeline, result: Result, wanted: ReferenceAnswer, ids: torch.Tensor, count: int) -> None:
    visual = pipe.manifest.visual
    assert result.token_ids == wanted.token_ids and len(wanted.token_ids) == STEPS
    kept = [number * visual.count + token for number, own in enumerate(result.kept) for token in own]
    assert len(result.kept) == count and kept == wanted.keep_indices.tolist()
    assert result.visual_tokens == (count * visual.count, len(kept))
    assert result.prompt_tokens == ids.shape[1] - count * visual.count


def in_torch(
    pipe: Pipeline,
    model: Any,
    ids: torch.Tensor,
    pixels: list[np.ndarray],
    keep: int,
    size: tuple[int, int],
) -> ReferenceAnswer:
    """The reference's answer, with a pruner and cues of its own making."""
    manifest = pipe.manifest
    method, (rows, columns) = manifest.method, manifest.visual.grid
    pruner = None
    if method.name != "none":
        pruner = find_method(method.name)((rows, columns), keep, **method.options)
    return reference_generate(
        model,
        pruner,
        ids,
        [torch.from_numpy(values) for values in pixels],
        STEPS,
        positions=method.positions,
        image_size=size,
        view_grids=manifest.image.view_grids,
        reference=find_family(model.config.to_dict()).reference,
    )


def by_transformers(
    model: Any, given: Mapping[str, Any], steps: int = STEPS
) -> tuple[list[int], list[torch.Tensor]]:
    """transformers' own `steps` greedy tokens, and the logits [V] behind each."""
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        answer = model.generate(**given, max_new_tokens=steps, **options)
    return answer.sequences[0, -steps:].tolist(), [logits[0] for logits in answer.logits]


def check_batch(folder: Path, size: tuple[int, int]) -> None:
    """Prompts of unequal length and unequal numbers of pictures say together what they say alone."""
    one, two, three = noises(3, *size)
    pictures, words = [[one, two], [three, one], one], [*WORDS, WORDS[0]]
    with Pipeline.load(folder, threads=1) as pipe:
        alone = [
            pipe.generate(some, said, max_new_tokens=12) for some, said in zip(pictures, words, strict=True)
        ]
        batch = pipe.generate_batch(pictures, words, max_new_tokens=12)
        assert [(found.token_ids, found.kept) for found in batch] == [
            (found.token_ids, found.kept) for found in alone
        ]
        pixels = [[preprocess(picture, pipe.manifest.image) for picture in pair] for pair in pictures[:2]]
        prompts = [pipe._prompter.encode(asked(said, 2), 2) for said in WORDS]
        rows = [Row(prompt.ids, prompt.image_starts) for prompt in prompts]
        runner, keep = pipe._open_runner(), pipe.manifest.visual.default_keep
        single = [
            first_of(runner.prefill_rows(keep, pair, [row], Timings()))
            for pair, row in zip(pixels, rows, strict=True)
        ]
        both = first_of(runner.prefill_rows(keep, [*pixels[0], *pixels[1]], rows, Timings()))
        np.testing.assert_allclose(both, np.concatenate(single), atol=1e-3)
        assert np.abs(both[0] - both[1]).max() > 1e-2


def first_of(values: dict[str, Value]) -> np.ndarray:
    """Logits after the prompts and the next positions, [B,V+1]."""
    return np.column_stack([values["logits"].numpy()[:, 0], values["next_position"].numpy()])
