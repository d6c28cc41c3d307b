"""Image stages at fixed places (`cuda_graph`): the answers of plain runs, from buffers that stay.

On the CPU nothing is recorded, but the same bindings run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines.ort.session import OrtEngine
from vtp.runtime import Pipeline
from vtp.runtime.opening import Opening
from vtp.runtime.stages.image_stages import ReplayedImages
from vtp.runtime.stages.runner import StageRunner

PROMPT = "what shape is the red ?"


def pictures(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(1).integers(0, 256, (count, 60, 60, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in noise]


def answers(pipe: Pipeline) -> list[Any]:
    """Two pictures at every keep-count, in turns, then a batch of both, then the first again."""
    first, second = pictures(2)
    asked = [
        pipe.generate(one, PROMPT, keep_tokens=keep, max_new_tokens=4)
        for one in (first, second, first)
        for keep in pipe.manifest.visual.keep
    ]
    asked += pipe.generate_batch([first, second], [PROMPT, "how many ?"], max_new_tokens=4)
    asked.append(pipe.generate(first, PROMPT, max_new_tokens=4))
    return [(one.token_ids, one.kept) for one in asked]


@pytest.mark.parametrize("reuse", [False, True])
def test_replayed_image_stages_answer_as_plain_ones(reuse: bool, exported: Callable[[str], Any]) -> None:
    folder = exported("vispruner").folder
    with Pipeline.load(folder, "ort-cpu", 1) as plain:
        wanted = answers(plain)
    with Pipeline.load(folder, "ort-cpu", 1, image_cache=2 * reuse, opening=Opening(cuda_graph=True)) as pipe:
        assert answers(pipe) == wanted and pipe.notes == []


def test_every_graph_is_bound_once_for_its_shapes(
    exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that one recording serves every picture: same inputs, same outputs, same addresses."""
    bound: list[list[int]] = []
    bind = OrtEngine.bind

    def noting(engine: OrtEngine, feeds: Any, into: Any) -> Any:
        bound.append([value.raw.data_ptr() for value in (*feeds.values(), *into.values())])
        return bind(engine, feeds, into)

    monkeypatch.setattr(OrtEngine, "bind", noting)
    with Pipeline.load(exported("vispruner").folder, "ort-cpu", 1, opening=Opening(cuda_graph=True)) as pipe:
        for picture in pictures(3):
            for keep in (3, 6):
                pipe.generate(picture, PROMPT, keep_tokens=keep, max_new_tokens=1)
        image = [stage.file for stage in pipe.manifest.stages if stage.when == "image"]
        runner = pipe._runner
        assert isinstance(runner, StageRunner) and isinstance(runner.images, ReplayedImages)
        # The encoder once; a pruner for each keep-count, and the projector on what each of them gives.
        assert len(bound) == len(runner.images.bindings) == 1 + 2 + 2
        assert {file for file, _ in runner.images.bindings} == set(image)
        seen = {tuple(value.raw.data_ptr() for value in runner.images.pixels.values())}  # type: ignore[attr-defined]
        assert len(seen) == 1 and next(iter(seen))[0] in bound[0]


def test_a_stage_whose_sizes_are_not_told_runs_plainly(
    exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.load(exported("vispruner").folder, "ort-cpu", 1, opening=Opening(cuda_graph=True)) as pipe:
        wanted = pipe.generate(pictures(1)[0], PROMPT, max_new_tokens=4)
        runner = pipe._runner
        assert isinstance(runner, StageRunner) and isinstance(runner.images, ReplayedImages)
        runner.images.bindings.clear()
        pruner = next(stage for stage in runner.stages("image", 6) if stage.info.name == "pruner")
        output = next(iter(pruner.graph.outputs.values()))
        monkeypatch.setitem(output.__dict__, "shape", ["batch", "unknown"])
        for _ in range(2):
            again = pipe.generate(pictures(1)[0], PROMPT, max_new_tokens=4)
            assert (again.token_ids, again.kept) == (wanted.token_ids, wanted.kept)
        assert [binding is None for binding in runner.images.bindings.values()] == [False, True]
