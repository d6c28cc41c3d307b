"""ort-cuda = ort-cpu on a tiny bundle; the same tests run on ort-cpu, so that they are known to run."""

from __future__ import annotations

from typing import Any

import pytest

from vtp.bench.gpu import checks as gpu_checks
from vtp.bench.gpu import device as gpu_device
from vtp.bench.gpu.checks import Job
from vtp.engines import VtpError, choose_engine
from vtp.runtime import Pipeline
from vtp.runtime.compare import limits_of
from vtp.scenes.exam import held_out

pytestmark = pytest.mark.parametrize("engine", ["ort-cpu", pytest.param("ort-cuda", marks=pytest.mark.gpu)])


@pytest.fixture
def on(engine: str) -> str:
    """The engine, or a skip with the reason why it cannot run here."""
    try:
        gpu_device.load_cuda_libraries(engine)
        choose_engine(engine, "float16")
    except VtpError as error:
        pytest.skip(str(error))
    return engine


@pytest.mark.parametrize("bundle", ["float16"])
def test_logits_and_selections_equal_those_of_the_cpu(on: str, bundle: str, exported: Any) -> None:
    items, folder = list(held_out(4)), str(exported(bundle).folder)
    found = gpu_checks.compare(
        gpu_checks._answers(folder, on, items), gpu_checks._answers(folder, "ort-cpu", items)
    )
    # Tokens of random weights are close calls, which float16 may turn; the built-in model's are compared
    # by vtp.bench.gpu.command.
    assert found["cosine_min"] >= limits_of(gpu_checks.LIMITS).cosine
    assert found["kept_equal"] == found["questions"]


def test_a_step_writes_into_the_bound_cache(on: str, exported: Any) -> None:
    job = Job(str(exported("float16").folder), on)
    found = gpu_checks.cache(job, gpu_device.device_for(on))
    assert found["note"] == "" and found["buffers"] == 6


def test_the_pipeline_answers(on: str, exported: Any) -> None:
    item = next(iter(held_out(1)))
    with Pipeline.load(exported("float16").folder, engine=on) as pipe:
        assert pipe.engine == on
        first = pipe.generate(item.image, item.prompt, max_new_tokens=8)
        again = pipe.generate(item.image, item.prompt, max_new_tokens=8)
    assert first.token_ids == again.token_ids and 1 <= len(first.token_ids) <= 8
    assert first.kept == sorted(set(first.kept)) and len(first.kept) == first.visual_tokens.after == 6


def test_what_a_device_holds_is_counted(on: str, exported: Any) -> None:
    device = gpu_device.device_for(on)
    job = Job(str(exported("float16").folder), on, rounds=2, steps=2)
    found = gpu_checks.times(job, device)
    assert found["memory"] >= 0 and found["ms"]["decode step"]["median"] > 0
