"""The study of tower blocks: answers as transformers' generate gives, and blocks that are really left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vtp.bench.studies.blocks import Examinee, compare, left_out, main, markdown, right
from vtp.scenes import model_dir
from vtp.scenes.exam import held_out


@pytest.fixture(scope="module")
def examinee() -> Examinee:
    return Examinee(model_dir())


def generated(examinee: Examinee, item) -> str:  # type: ignore[no-untyped-def]
    inputs = examinee._prompt(item)
    ids = examinee.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return examinee.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_are_those_of_generate(examinee: Examinee) -> None:
    items = list(held_out(8))
    assert examinee.take_exam(items) == [generated(examinee, item) for item in items]


def test_the_last_block_is_never_used_and_the_first_always(examinee: Examinee) -> None:
    items = list(held_out(12))
    whole = examinee.take_exam(items)
    with left_out(examinee.blocks[-1], "block"):
        assert examinee.take_exam(items) == whole
    with left_out(examinee.blocks[0], "block"):
        assert examinee.take_exam(items) != whole
    assert examinee.take_exam(items) == whole


@torch.inference_mode()
@pytest.mark.parametrize("part", ["block", "attention", "mlp"])
def test_what_is_left_out_adds_nothing(examinee: Examinee, part: str) -> None:
    """As transformers computes it when the part's last weights are zero."""
    block = examinee.blocks[1]
    given = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0))
    outputs = {
        "block": ("self_attn.out_proj", "mlp.fc2"),
        "attention": ("self_attn.out_proj",),
        "mlp": ("mlp.fc2",),
    }
    with left_out(block, part):
        got = block(given, attention_mask=None)
    kept = {name: weight.clone() for name, weight in block.state_dict().items()}
    for name in outputs[part]:
        block.get_submodule(name).weight.zero_()
        block.get_submodule(name).bias.zero_()
    expected = block(given, attention_mask=None)
    block.load_state_dict(kept)
    assert torch.allclose(got, expected, atol=1e-6)
    assert not torch.allclose(got, block(given, attention_mask=None), atol=1e-3)


def test_a_row_counts_what_was_lost() -> None:
    items = list(held_out(16))
    whole = right(items, [item.answer for item in items])
    without = right(items, ["wrong" if item.kind == "shape" else item.answer for item in items])
    row = compare(items, whole, without, 3, "mlp")
    assert (row.loss, row.by_kind["shape"], row.by_kind["count"]) == (0.25, 1.0, 0.0)
    assert row.used and row.interval == pytest.approx((0.25, 0.25))
    assert not compare(items, whole, whole, 3, "mlp").used
    assert "| 3 | mlp | 25.0 (25.0 to 25.0) | yes | 100.0 | 0.0 | 0.0 | 0.0 |" in markdown([row])
    assert whole.dtype == np.float64


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parts", "soul"]) == 2
    assert "unknown part 'soul'; choose of block, attention, mlp" in capsys.readouterr().err
