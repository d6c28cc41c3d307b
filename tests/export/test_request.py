"""A request becomes a job: checked before a model is loaded, and then decided once for that model."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtp.engines import UsageError
from vtp.export.checkpoint.loading import Checkpoint, load
from vtp.export.plan.names import part_name, part_source, pruner_name, tail
from vtp.export.request import Request
from vtp.scenes import model_dir

METHOD = """
from pathlib import Path

from vtp.export.pruners.uniform import Uniform

Path({log!r}).open("a").write("run ")


class Mine(Uniform):
    name = "mine"
"""


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return load(Path(model_dir()), "float16")


def test_a_job_holds_every_decision(model: Checkpoint, tmp_path: Path) -> None:
    request = Request(
        tmp_path / "bundle",
        method="vispruner",
        keep_tokens="20,10",
        method_options=["positions=original"],
        target="jetpack6",
        max_length=700,
    )
    request.check()
    job = request.resolve(model)
    assert (job.keep, job.count, job.positions, job.max_length) == ([10, 20], 576, "original", 700)
    assert (job.target.name, job.dtype) == ("jetpack6", "float16")
    assert [pruner.name for schedule in job.schedules for pruner in schedule] == ["vispruner"] * 2


def test_a_job_without_a_method_keeps_all(model: Checkpoint, tmp_path: Path) -> None:
    job = Request(tmp_path / "bundle", method="none").resolve(model)
    assert (job.schedules, job.keep, job.positions) == ([], [576], "compact")


def test_an_outside_method_s_file_is_executed_once(model: Checkpoint, tmp_path: Path) -> None:
    file, log = tmp_path / "mine.py", tmp_path / "log"
    file.write_text(METHOD.format(log=str(log)))
    request = Request(tmp_path / "bundle", method=f"{file}:Mine", keep_tokens="4")
    request.check()
    request.resolve(model)
    assert log.read_text() == "run "


def test_what_a_model_does_not_matter_to_is_refused_without_one(tmp_path: Path) -> None:
    for wrong in ({"target": "toaster"}, {"method": "nothere"}, {"keep_tokens": "0"}, {"frames": 0}):
        with pytest.raises(UsageError):
            Request(tmp_path / "bundle", **wrong).check()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"oldest_onnxruntime": "new"}, "oldest-onnxruntime 'new' is not a version of onnxruntime"),
        ({"oldest_onnxruntime": "1"}, "oldest-onnxruntime '1' is not a version"),
        ({"oldest_onnxruntime": f"1.{'9' * 5000}"}, "is not a version"),
        ({"oldest_onnxruntime": "1.22.9"}, r"1\.22\.9 is not supported; give 1\.23 or newer"),
        ({"oldest_onnxruntime": "1.30", "target": "tensorrt"}, "target tensorrt is not for ONNX Runtime"),
    ],
)
def test_an_oldest_onnxruntime_that_is_refused(tmp_path: Path, wrong: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Request(tmp_path / "bundle", **wrong).check()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cuts", "parts", "sources", "tails"),
    [
        ((), ["decoder"], ["inputs_embeds"], [""]),
        ((2,), ["decoder_head", "decoder"], ["inputs_embeds", "hidden_states"], ["", ""]),
        (
            (1, 3),
            ["decoder_head", "decoder_1", "decoder"],
            ["inputs_embeds", "kept_hidden_states", "hidden_states"],
            [".1", "", ""],
        ),
    ],
)
def test_parts_of_the_decoder_are_named(
    cuts: tuple[int, ...], parts: list[str], sources: list[str], tails: list[str]
) -> None:
    numbers = range(len(cuts) + 1)
    assert [part_name(number, cuts) for number in numbers] == parts
    assert [part_source(number, cuts) for number in numbers] == sources
    assert [tail(number, cuts) for number in numbers] == tails


def test_pruners_are_named() -> None:
    names = [pruner_name(0, 1, None), pruner_name(0, 1, 57), pruner_name(1, 2, None), pruner_name(1, 2, 57)]
    assert names == ["pruner", "pruner_57", "pruner_2", "pruner_2_57"]
