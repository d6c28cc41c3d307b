"""What tests of families share: bundles by name, and how each is held against transformers and torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vtp.engines.tensorrt.library import build_engine, refused_nodes
from vtp.export.checkpoint import loading as checkpoint
from vtp.export.checkpoint.weights import fill
from vtp.export.graphs.attention.operators import emitting
from vtp.export.verify.parity import STEPS
from vtp.runtime import NO_PICTURE, Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.commands.build import profile_of
from vtp.runtime.preprocess import preprocess
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import StageRunner

from ...once import Once
from ...oracles.several_pictures import STEPS as SAID
from ...oracles.several_pictures import asked, by_transformers, in_torch, noises

Size = tuple[int, int]  # (height, width)
# Bundle: the name of its model, and fields of vtp.export.exporter's Request.
Table = Mapping[str, tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Made:
    """A bundle on disk, the model it came from, that model's name, and the size it was asked for."""

    folder: Path
    model: Any
    kind: str
    image_size: Size | None


def bundles_of(
    table: Table, once: Once, folders: Callable[[str], tuple[Path, Any]], **common: Any
) -> Callable[[str], Made]:
    """A bundle by its name in `table`, exported, and held against torch, at the first call.

    folders   folder and torch model by the model's name
    common    fields of every Request
    """

    def get(name: str) -> Made:
        kind, own = table[name]
        folder, model = folders(kind)
        wishes = {"verify": "full", **common, **own}
        return Made(once.bundle(folder, **wishes), model, kind, wishes.get("image_size"))

    return get


def marked(names: Iterable[str], quick: Iterable[str]) -> dict[str, Any]:
    """Cases by name: those that are not `quick` are slow."""
    some = set(quick)
    return {name: name if name in some else pytest.param(name, marks=pytest.mark.slow) for name in names}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def follow(
    folder: Path, pixels: np.ndarray, ids: list[int], start: int, wanted: Iterable[torch.Tensor]
) -> tuple[list[int], int]:
    """Greedy tokens of a bundle at its full count, whose logits stay within 1e-3 of those `wanted`.

    Returns them, and the position of the first.
    """
    opened = open_bundle(folder)
    runner, count = StageRunner(opened, "ort-cpu", 1), opened.manifest.visual.count
    values = runner.prefill(count, pixels, ids, start, Timings())
    logits, first = values["logits"].numpy()[0, 0], int(values["next_position"].numpy()[0])
    tokens: list[int] = []
    for number, theirs in enumerate(wanted):
        assert np.abs(logits - theirs.flatten().numpy()).max() < 1e-3
        tokens.append(int(logits.argmax()))
        logits = runner.step(count, tokens[-1], first + number)
    runner.close()
    assert tokens
    return tokens, first


def check_answers_of_any_size(made: Made, words: str, count: int | None = None) -> Manifest:
    """The export's own check ran; here is what it found, and that every picture can be answered.

    `count` is the number of visual tokens, where the test knows it better than the bundle.
    """
    with Pipeline.load(made.folder, threads=1) as pipe:
        manifest = pipe.manifest
        visual, report = manifest.visual, manifest.parity["generation"]
        assert report and all(found["tokens"] == STEPS for found in report.values())
        for keep in visual.keep:
            for size in [made.image_size or (40, 70), (31, 90), (7, 5)]:
                result = pipe.generate(noise(*size), words, max_new_tokens=4, keep_tokens=keep)
                assert result.visual_tokens == (count or visual.count, keep)
                assert len(result.kept) == len(set(result.kept)) == keep
                assert result.kept == sorted(result.kept) and result.kept[-1] < (count or visual.count)
    return manifest


def check_choice(made: Made, words: str, ids_of: Callable[[Image.Image, Pipeline], torch.Tensor]) -> None:
    """Which tokens are kept, by a pruner and cues of the reference's own making, and what is said then.

    ids_of   the prompt [1,S] of a picture with every visual token in it
    """
    with Pipeline.load(made.folder, threads=1) as pipe:
        pipe.manifest.text.__dict__["eos_token_ids"] = ()
        image = pipe.manifest.image
        picture = noises(1, *image.image_size)[0]
        ids, pixels = ids_of(picture, pipe), preprocess(picture, image)
        for keep in pipe.manifest.visual.keep:
            result = pipe.generate(picture, words, max_new_tokens=SAID, keep_tokens=keep)
            wanted = in_torch(pipe, made.model, ids, [pixels], keep, image.image_size)
            assert result.token_ids == wanted.token_ids
            assert result.kept == wanted.keep_indices.tolist() and len(result.kept) == keep


def check_tower(
    folder: Path, model: Any, size: Size, more: Iterable[str] = ()
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
    """Features, cues and tokens of the graph's modules against hooks in an unmodified model.

    Returns the tokens, the reference's cues, and the family. `more` are cues beside the scores and the keys.
    """
    made = checkpoint.load(folder, "float32", size)
    family = made.family
    fill(family.model)
    pixels = torch.from_numpy(preprocess(noise(*size), made.image))
    names = ["image_features", "attention_scores", "vision_keys", *more]
    with torch.no_grad():
        with emitting(family.decoder.model, family.tower):
            given = dict(zip(names, family.vision_encoder(names[1:])(pixels), strict=True))
            tokens = family.projector(whole=True)(given["image_features"])
        reference = family.reference(model, size, made.image.view_grids)
        with reference.eager():
            wanted = reference.vision(pixels, names)
            whole, _ = reference.tokens(pixels, tokens)
    whole = torch.cat([whole, *(block[None] for block in getattr(reference, "deep", []))], dim=-1)
    given["image_features"] = given["image_features"][..., : family.feature_width]
    for cue in names:
        assert given[cue].shape == wanted[cue].shape
        assert torch.allclose(given[cue], wanted[cue], atol=1e-4), cue
    assert tokens.shape == whole.shape and torch.allclose(tokens, whole, atol=1e-4)
    return tokens, wanted, family


def check_text_alone(made: Made) -> None:
    """A question without a picture: transformers' greedy tokens."""
    words = "what color is the star ? " * 4
    with Pipeline.load(made.folder, threads=1) as pipe:
        pipe.manifest.text.__dict__["eos_token_ids"] = ()
        ids = torch.tensor([pipe._prompter.encode(asked(words, 0), 0).ids])
        tokens, _ = by_transformers(made.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert pipe.generate(NO_PICTURE, words, max_new_tokens=len(tokens)).token_ids == tokens


def check_openvino(folder: Path, size: Size, words: str, keep: int) -> None:
    """OpenVINO keeps the same tokens as ONNX Runtime and says the same 16."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    answers = []
    for engine in ("ort-cpu", "openvino-cpu"):
        with Pipeline.load(folder, engine=engine, threads=1) as pipe:
            result = pipe.generate(noise(*size), words, max_new_tokens=16, keep_tokens=keep)
            answers.append((result.token_ids, result.kept))
    assert answers[0] == answers[1] and len(answers[0][1]) == keep


def check_builds(folder: Path, engine: str) -> None:
    """TensorRT(-RTX) takes every node of a bundle, and builds every graph."""
    opened = open_bundle(folder)
    for file, graph in opened.manifest.graphs.items():
        assert refused_nodes(opened.path(file), engine) == []
        assert build_engine(opened.path(file), engine, profile_of(graph)).plan.nbytes, file
