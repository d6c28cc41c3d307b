"""Features and embeddings in place of pictures: token for token the answer about the picture itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from vtp.engines import UsageError
from vtp.runtime import Pipeline
from vtp.runtime.preprocess import preprocess

PROMPT = "what shape is the red ?"
ASKED: dict[str, Any] = {"max_new_tokens": 8}
NAMES = ("none", "vispruner", "original", "adaptprune")


class Encoder:
    """The bundle's own image graphs in plain onnxruntime: what one has whose encoder is elsewhere."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe

    def run(self, file: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = onnxruntime.InferenceSession(str(self.pipe.bundle.folder / file))
        return dict(zip((one.name for one in session.get_outputs()), session.run(None, feeds), strict=True))

    def features(self, picture: Image.Image) -> dict[str, np.ndarray]:
        """image_features, and what else the encoder gives."""
        pixels = preprocess(picture, self.pipe.manifest.image)
        return self.run("vision_encoder.onnx", {"pixel_values": pixels})

    def embeds(self, picture: Image.Image, keep: int) -> dict[str, np.ndarray]:
        """image_embeds, of the rows that a pruner before the projector keeps, if there is one."""
        found = self.features(picture)
        rows, kept = found["image_features"], {}
        for stage in self.pipe.manifest.stages_for("image", keep):
            if stage.role == "pruner" and "image_features" in stage.inputs.values():
                pruned = self.run(stage.file, {own: found[one] for own, one in stage.inputs.items()})
                rows, kept = pruned["kept_features"], {"keep_indices": pruned["keep_indices"]}
        return {**self.run("projector.onnx", {"image_features": rows}), **kept}


@pytest.fixture(scope="module")
def pipes(exported: Callable[[str], Any]) -> Iterator[Callable[[str], Pipeline]]:
    opened: dict[str, Pipeline] = {}

    def get(name: str) -> Pipeline:
        if name not in opened:
            opened[name] = Pipeline.load(exported(name).folder)
        return opened[name]

    yield get
    for pipe in opened.values():
        pipe.close()


# -- the same answer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_features_and_embeds_give_the_pictures_answer(
    name: str, pipes: Callable[[str], Pipeline], picture: Image.Image
) -> None:
    pipe = pipes(name)
    encoder = Encoder(pipe)
    for keep in pipe.manifest.visual.keep:
        wanted = pipe.generate(picture, PROMPT, keep_tokens=keep, **ASKED)
        for given in (
            {"image_features": encoder.features(picture)},
            {"image_embeds": encoder.embeds(picture, keep)},
        ):
            result = pipe.generate(prompt=PROMPT, keep_tokens=keep, **given, **ASKED)
            assert result.token_ids == wanted.token_ids
            assert (result.kept, result.visual_tokens) == (wanted.kept, wanted.visual_tokens)
            assert "vision_encoder" not in result.timings.stages


@pytest.mark.parametrize("name", ["none", "vispruner"])
def test_an_array_alone_is_enough_where_no_more_is_needed(
    name: str, pipes: Callable[[str], Pipeline], picture: Image.Image
) -> None:
    """With or without the axis of pictures, in torch, and half as wide where that is exact."""
    pipe = pipes(name)
    keep = pipe.manifest.visual.default_keep
    rows = Encoder(pipe).embeds(picture, keep)["image_embeds"]
    wanted = pipe.generate(picture, PROMPT, **ASKED).token_ids
    for given in (rows, rows[0], torch.from_numpy(rows), torch.from_numpy(rows[0]).requires_grad_()):
        assert pipe.generate(prompt=PROMPT, image_embeds=given, **ASKED).token_ids == wanted
    halves = rows.astype(np.float16)
    asked = [halves, halves.astype(np.float32), torch.from_numpy(halves).half()]
    first, *others = (pipe.generate(prompt=PROMPT, image_embeds=one, **ASKED).token_ids for one in asked)
    assert others == [first, first]
    wide = torch.from_numpy(rows).bfloat16()
    answers = [
        pipe.generate(prompt=PROMPT, image_embeds=one, **ASKED).token_ids for one in (wide, wide.float())
    ]
    assert answers[0] == answers[1]


def test_several_pictures_and_turns(pipes: Callable[[str], Pipeline], picture: Image.Image) -> None:
    pipe = pipes("vispruner")
    pictures = [picture, picture.transpose(Image.Transpose.ROTATE_180)]
    each = [Encoder(pipe).features(one) for one in pictures]
    features = {name: np.concatenate([one[name] for one in each]) for name in each[0]}
    talk = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "what ?"}, {"type": "image"}],
        }
    ]
    for words in ({"prompt": PROMPT}, {"messages": talk}):
        wanted = pipe.generate(pictures, **words, **ASKED)
        result = pipe.generate(image_features=features, **words, **ASKED)
        assert (result.token_ids, result.kept) == (wanted.token_ids, wanted.kept)
    stream = pipe.stream(prompt=PROMPT, image_features=features, **ASKED)
    assert "".join(stream) == pipe.generate(pictures, PROMPT, **ASKED).text


def test_a_stream_is_about_what_was_given_when_it_was_opened(
    pipes: Callable[[str], Pipeline], picture: Image.Image
) -> None:
    """As with pictures: who fills one buffer again and again may fill it before the stream is read."""
    pipe = pipes("none")
    mine, others = (
        Encoder(pipe).embeds(one, 16)["image_embeds"]
        for one in (picture, picture.transpose(Image.Transpose.ROTATE_90))
    )
    wanted = [pipe.generate(prompt=PROMPT, image_embeds=one, **ASKED).raw_text for one in (mine, others)]
    buffer = mine.copy()
    stream = pipe.stream(prompt=PROMPT, image_embeds=buffer, **ASKED)
    buffer[:] = others
    assert "".join(stream) == wanted[0] != wanted[1]


def test_caches_do_not_mix_them_up(exported: Callable[[str], Any], picture: Image.Image) -> None:
    """Neither what is kept of pictures nor of prompts answers for other embeddings."""
    other = picture.transpose(Image.Transpose.ROTATE_90)
    with Pipeline.load(exported("none").folder, vision_feature_cache=2, prefix_caching=True) as pipe:
        wanted = [pipe.generate(one, PROMPT, **ASKED).token_ids for one in (picture, other)]
        embeds = [Encoder(pipe).embeds(one, 16)["image_embeds"] for one in (picture, other)]
        found = [pipe.generate(prompt=PROMPT, image_embeds=one, **ASKED).token_ids for one in embeds]
    assert found == wanted
    assert wanted[0] != wanted[1]


# -- what is refused -----------------------------------------------------------------------------------------

ROWS = np.zeros((1, 16, 32), np.float32)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        (
            "none",
            {"image_embeds": ROWS[:, 1:]},
            "image_embeds has the shape [1, 15, 32]; this bundle takes float32[pic",
        ),
        ("none", {"image_embeds": ROWS[..., 1:]}, "has the shape [1, 16, 31]"),
        ("none", {"image_embeds": ROWS[None]}, "has the shape [1, 1, 16, 32]"),
        ("none", {"image_embeds": ROWS[:0]}, "has the shape [0, 16, 32]"),
        ("vispruner", {"image_embeds": ROWS}, "takes float32[pictures, 6, 32]"),
        ("none", {"image_embeds": ROWS.astype(np.float64)}, "image_embeds is float64; give float32"),
        ("none", {"image_features": ROWS.astype(np.int64)}, "image_features is int64; give float32"),
        ("none", {"image_features": ROWS * np.nan}, "values that are not finite in float32"),
        ("none", {"image_embeds": "rows"}, "image_embeds must be an array of numbers, not 'rows'"),
        (
            "none",
            {"image_embeds": {}},
            "image_embeds is a dict without 'image_embeds'; give image_embeds={'im",
        ),
        ("none", {"image_embeds": [[1.0], [2.0, 3.0]]}, "image_embeds must be an array of numbers"),
        (
            "none",
            {"image_embeds": {"rows": ROWS}},
            "image_embeds names 'rows'; this bundle knows image_features, image_",
        ),
        (
            "none",
            {"image_embeds": ROWS, "image_features": ROWS},
            "image_features and image_embeds are given; give one",
        ),
        ("none", {"image_embeds": ROWS, "image": "a.png"}, "image and image_embeds are given; give one"),
        ("none", {}, "a picture may be a path"),
        (
            "vispruner",
            {"image_features": ROWS},
            "method vispruner (positions compact) also needs attention_scores; give image_features="
            "{'image_features': float32[pictures, 16, 32], 'attention_scores': float32[pictures, 16]}",
        ),
        ("original", {"image_embeds": ROWS[:, :6]}, "(positions original) also needs keep_indices"),
        (
            "original",
            {"image_embeds": {"image_embeds": ROWS[:, :6], "keep_indices": np.full((1, 6), 16)}},
            "keep_indices reach from 16 to 16; the visual tokens are 0 to 15",
        ),
        (
            "original",
            {"image_embeds": {"image_embeds": ROWS[:, :6], "keep_indices": np.zeros((2, 6), int)}},
            "image_embeds is of 1 pictures and keep_indices of 2",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    name: str, given: dict[str, Any], said: str, pipes: Callable[[str], Pipeline]
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as refused:
        pipes(name).generate(prompt=PROMPT, **given)
    assert "\n" not in str(refused.value)


def test_the_refused_leave_the_pipeline_as_it_was(
    pipes: Callable[[str], Pipeline], picture: Image.Image
) -> None:
    pipe = pipes("none")
    wanted = pipe.generate(picture, PROMPT, **ASKED).token_ids
    with pytest.raises(UsageError, match="not finite"):
        pipe.generate(prompt=PROMPT, image_embeds=ROWS + np.inf)
    assert pipe.generate(picture, PROMPT, **ASKED).token_ids == wanted
