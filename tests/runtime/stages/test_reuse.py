"""What is kept of earlier answers changes no answer, and is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.result import Result, Timings
from vtp.runtime.stages.prefix_cache import Prefix
from vtp.runtime.stages.runner import StageRunner
from vtp.runtime.stages.stage import Stage

FIRST, SECOND = "what shape is the red ?", "what color is the star ?"
GREEN, BLUE, RED = (Image.new("RGB", (60, 60), colour) for colour in ("green", "blue", "red"))


def load(made: Any, **options: Any) -> Pipeline:
    return Pipeline.load(made.folder, threads=1, **options)


def same(found: Result, wanted: Result) -> bool:
    return (found.token_ids, found.kept) == (wanted.token_ids, wanted.kept)


# -- image stages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vispruner", "adaptprune"])
def test_pictures_that_were_seen_are_not_encoded_again(
    exported: Callable[[str], Any], picture: Image.Image, name: str, cpu_engine: str
) -> None:
    made, engine = exported(name), {"engine": cpu_engine}
    with load(made, **engine) as plain, load(made, image_cache=2, **engine) as cached:
        stages = [stage.name for stage in plain.manifest.stages if stage.when == "image" and not stage.keep]
        hits = []
        for image in (picture, GREEN, picture, BLUE, GREEN):  # BLUE takes the place of GREEN
            found = cached.generate(image, FIRST, max_new_tokens=6)
            assert same(found, plain.generate(image, FIRST, max_new_tokens=6))
            hits.append(set(stages) <= set(found.timings.reused_stages))
            assert hits[-1] or not found.timings.reused_stages
        assert hits == [False, False, True, False, False]
        assert not plain.generate(picture, FIRST, max_new_tokens=1).timings.reused_stages


def test_keep_counts_share_what_comes_before_the_choice(
    exported: Callable[[str], Any], picture: Image.Image
) -> None:
    with load(exported("vispruner"), image_cache=1) as pipe:
        kept = [pipe.generate(picture, FIRST, keep_tokens=keep, max_new_tokens=1) for keep in (3, 6, 3)]
    reused = [result.timings.reused_stages for result in kept]
    assert reused == [[], ["vision_encoder"], ["vision_encoder", "pruner", "projector"]]


def test_the_image_cache_says_what_it_takes(exported: Callable[[str], Any], picture: Image.Image) -> None:
    with load(exported("none"), image_cache=2) as pipe:
        assert pipe.image_cache_bytes == 0
        sizes = []
        for image in (picture, GREEN, BLUE):
            pipe.generate(image, FIRST, max_new_tokens=1)
            sizes.append(pipe.image_cache_bytes)
    assert sizes[0] > 0 and sizes[1:] == [2 * sizes[0], 2 * sizes[0]]
    assert pipe.image_cache_bytes == 0  # closed


def encoded(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures go through the vision encoder from now on, run by run."""
    counts: list[int] = []
    run = Stage.run

    def counted(self: Stage, values: Any, padding: Any = 0) -> None:
        if self.info.name == "vision_encoder":
            counts.append(values["pixel_values"].shape[0])
        run(self, values, padding)

    monkeypatch.setattr(Stage, "run", counted)
    return counts


@pytest.mark.parametrize("most", [1, 2, 8])
def test_several_pictures_are_reused_one_by_one(
    exported: Callable[[str], Any], picture: Image.Image, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Whether they go through the encoder together or in several runs; known ones beside new ones."""
    asked = [[picture, GREEN, BLUE], [picture, GREEN, BLUE], [BLUE, RED, picture], [RED], [GREEN]]
    wanted_counts = [3, 0, 1, 0, 1]  # the last one's prompt is two others behind
    with load(exported("vispruner")) as plain, load(exported("vispruner"), image_cache=2) as cached:
        for pipe in (plain, cached):
            axes = pipe.manifest.graphs["vision_encoder.onnx"].axes
            axes["batch"] = [*axes["batch"][:-1], most]
        wanted = [plain.generate(images, SECOND, max_new_tokens=6) for images in asked]
        counts = encoded(cached, monkeypatch)
        for images, expected, count in zip(asked, wanted, wanted_counts, strict=True):
            counts.clear()
            found = cached.generate(images, SECOND, max_new_tokens=6)
            assert same(found, expected)
            assert sum(counts) == count and max(counts, default=0) <= most
            assert ("vision_encoder" in found.timings.reused_stages) == (count < len(images))


def test_batches_use_the_image_cache(
    exported: Callable[[str], Any], picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture, GREEN, BLUE, RED]
    with load(exported("vispruner")) as plain, load(exported("vispruner"), image_cache=4) as cached:
        wanted = plain.generate_batch(images, [FIRST] * 4, max_new_tokens=6)
        cached.generate(GREEN, SECOND, max_new_tokens=1)
        counts = encoded(cached, monkeypatch)
        for count in (3, 0):
            counts.clear()
            found = cached.generate_batch(images, [FIRST] * 4, max_new_tokens=6)
            assert all(map(same, found, wanted)) and sum(counts) == count


@pytest.mark.parametrize("most", [-1, 1.5, "2", True, None])
def test_bad_sizes_of_the_image_cache(exported: Callable[[str], Any], most: Any) -> None:
    with pytest.raises(UsageError, match=r"image_cache .* is not a number of prompts"):
        load(exported("none"), image_cache=most)


# -- prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "vispruner"])
def test_prompts_read_on_give_the_same_answers(
    exported: Callable[[str], Any], picture: Image.Image, name: str, cpu_engine: str
) -> None:
    """The same again, another question, another picture, another keep-count, and each in between."""
    asked = [(picture, FIRST), (picture, FIRST), (picture, SECOND), (GREEN, SECOND)]
    made, engine = exported(name), {"engine": cpu_engine}
    with load(made, **engine) as plain, load(made, reuse_prompt=True, **engine) as reusing:
        for keep in plain.manifest.visual.keep:
            reused = []
            for image, prompt in asked:
                wanted = plain.generate(image, prompt, keep_tokens=keep, max_new_tokens=12)
                found = reusing.generate(image, prompt, keep_tokens=keep, max_new_tokens=12)
                assert same(found, wanted)
                reused.append(found.timings.reused_tokens)
            before = len("USER: ")  # at most so many tokens stand before the picture
            rows = plain.generate(picture, FIRST, keep_tokens=keep, max_new_tokens=1).prompt_tokens + keep
            assert reused[0] <= before and reused[1] == rows - 1 and keep < reused[2] < rows - 1
            assert 0 < reused[3] <= before  # another picture


def test_a_conversation_is_read_once(exported: Callable[[str], Any], picture: Image.Image) -> None:
    """Turn by turn, with the answers themselves as the assistant's turns."""
    turns: list[dict[str, Any]] = []
    with load(exported("vispruner")) as plain, load(exported("vispruner"), reuse_prompt=True) as reusing:
        rows = 0
        for question in (FIRST, SECOND, "where is the blue ?"):
            turns.append({"role": "user", "content": question})
            found = reusing.generate(picture, messages=turns, max_new_tokens=4)
            assert same(found, plain.generate(picture, messages=turns, max_new_tokens=4))
            assert found.timings.reused_tokens >= rows - 1  # the prompt before, at least
            rows = found.prompt_tokens + found.visual_tokens.after
            turns.append({"role": "assistant", "content": "a star"})


def test_batches_in_between_do_no_harm(
    exported: Callable[[str], Any], picture: Image.Image, cpu_engine: str
) -> None:
    made, engine = exported("vispruner"), {"engine": cpu_engine}
    with load(made, **engine) as plain, load(made, reuse_prompt=True, **engine) as reusing:
        for images, prompts in (
            ([picture], [FIRST]),
            ([picture, GREEN], [FIRST, SECOND * 2]),
            ([picture], [SECOND]),
            ([picture], [FIRST]),
        ):
            wanted = plain.generate_batch(images, prompts, max_new_tokens=6)
            found = reusing.generate_batch(images, prompts, max_new_tokens=6)
            assert all(map(same, found, wanted))
        assert found[0].timings.reused_tokens > 6  # the last two were about one picture


def test_an_abandoned_answer_leaves_a_cache_that_is_known(
    exported: Callable[[str], Any], picture: Image.Image
) -> None:
    with load(exported("none")) as plain, load(exported("none"), reuse_prompt=True) as reusing:
        stream = reusing.stream(picture, FIRST, max_new_tokens=20)
        next(stream)
        stream.close()
        with pytest.raises(VtpError, match="has room for"):
            reusing.generate(picture, "x" * 500)
        found = reusing.generate(picture, SECOND, max_new_tokens=12)
        assert found.timings.reused_tokens > 16
        assert same(found, plain.generate(picture, SECOND, max_new_tokens=12))


def test_logits_of_a_prompt_read_on(exported: Callable[[str], Any], cpu_engine: str) -> None:
    """Two prompts of one picture: the second one's logits are those of a fresh reading within 1e-5."""
    bundle = open_bundle(exported("none").folder)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 56, 56)).astype(np.float32)
    head, prefix = [1, 40, 41, bundle.manifest.text.image_token_id], Prefix()
    fresh, going_on = (StageRunner(bundle, cpu_engine, 1, prefix=one) for one in (None, prefix))
    for tail, reused in (([50, 51], 0), ([50, 60, 61, 62], 20), ([50, 60, 61], 21)):
        logits = [
            runner.prefill(16, pixels, [*head, *tail], 3, Timings())["logits"].numpy()
            for runner in (fresh, going_on)
        ]
        assert prefix.reused == reused
        assert np.abs(logits[0] - logits[1]).max() < 1e-5
    fresh.close()
    going_on.close()


def test_methods_that_choose_inside_the_decoder_read_a_prompt_whole(exported: Callable[[str], Any]) -> None:
    with pytest.raises(UsageError, match="method adaptprune, which chooses inside the decoder") as caught:
        load(exported("adaptprune"), reuse_prompt=True)
    assert "\n" not in str(caught.value)


def test_a_decoder_that_is_not_causal_is_refused(
    exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "vtp.runtime.stages.prefix_cache._CAUSAL", "Another"
    )  # as in graphs of single operators
    with pytest.raises(UsageError, match=r"family llava, target ort.* reads a prompt in one piece"):
        load(exported("none"), reuse_prompt=True)
