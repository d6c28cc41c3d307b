"""The public sets' files, prompts and figures, in the shapes of the real files, and broken ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.bench.real import pope
from vtp.bench.real.published import PUBLISHED, SOURCES, published_for
from vtp.bench.real.sets import SETS
from vtp.calib import stats
from vtp.calib.data import Sample
from vtp.calib.keep.examiner import score
from vtp.calib.keep.journal import Answer
from vtp.engines import UsageError

from . import real_files

ENDING = "\nAnswer the question using a single word or phrase."


def test_gqa_is_read_as_its_authors_give_it(tmp_path: Path) -> None:
    real_files.gqa(tmp_path, ["yes", "no", "table"])
    first, second, _ = found = SETS["gqa"].read(tmp_path, None)
    assert len(found) == 3 and len(SETS["gqa"].read(tmp_path, 2)) == 2
    assert first == Sample(tmp_path / "images/n0.jpg", f"What is thing 0?{ENDING}", ("yes",), "open")
    assert second.kind == "binary"


def test_textvqa_tells_what_an_ocr_read_if_it_is_there(tmp_path: Path) -> None:
    real_files.textvqa(tmp_path, [["stop"] * 10, ["go"] * 10])
    found = SETS["textvqa"].read(tmp_path, None)
    assert found[1].prompt == f"what does sign 1 say?\nReference OCR token: STOP, 1{ENDING}"
    assert found[1].image == tmp_path / "train_images/001af.jpg" and len(found[1].answers) == 10
    before = "Reference OCR token: GO\nWhat does sign 0 say?\nAnswer."
    behind = "What does sign 1 say?\nReference OCR token: \nAnswer."
    for place, text in enumerate((before, behind)):
        line = {"question_id": f"00{place}af", "image": "x.jpg", "text": text, "category": "default"}
        with (tmp_path / "llava_textvqa_val_v051_ocr.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert [one.prompt for one in SETS["textvqa"].read(tmp_path, None)] == [before, behind]
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    assert SETS["textvqa"].is_hinted(tmp_path)
    (tmp_path / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    assert SETS["textvqa"].read(tmp_path, None)[1].prompt == f"what does sign 1 say?{ENDING}"
    assert not SETS["textvqa"].is_hinted(tmp_path)


def test_pope_is_read_from_three_files(tmp_path: Path) -> None:
    real_files.pope(tmp_path, ["yes", "no"])
    found = SETS["pope"].read(tmp_path, 1)
    assert [(one.kind, one.answers) for one in found] == [(kind, ("yes",)) for kind in real_files.KINDS]
    assert found[0].prompt == f"Is there a random thing in the image?{ENDING}"


def polls(labels: str, kind: str) -> list[Sample]:
    return [Sample(Path("x"), "?", ("yes" if label == "y" else "no",), kind) for label in labels]


def test_popes_figures_are_its_authors() -> None:
    """Worked by hand, and equal to evaluate.py of POPE's authors on the same answers."""
    samples = polls("yyynnn", "random") + polls("yn", "popular")
    said = ["Yes", "yes, there is", "No.", "No", "Yes", "There is no such thing", "No", "No"]
    scores = score([Answer(text, [], None) for text in said], samples, "pope", None)
    assert scores == [1, 1, 0, 1, 0, 1, 0, 1]
    found = pope.figures(samples, scores)
    two_thirds = pytest.approx(2 / 3)
    assert found["random"] == {  # TP 2, FP 1, TN 2, FN 1
        "accuracy": two_thirds,
        "precision": two_thirds,
        "recall": two_thirds,
        "f1": two_thirds,
        "yes_ratio": 0.5,
        "questions": 6,
    }
    assert found["popular"] == {  # nothing was said to be there: 0 where the authors' code divides by zero
        "accuracy": 0.5,
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "yes_ratio": 0,
        "questions": 2,
    }
    figure = SETS["pope"].figure(samples)
    assert figure(np.array(scores), np.arange(8)[None])[0] == pytest.approx(1 / 3)  # the mean of both F1


def test_unequal_precision_and_recall_of_pope() -> None:
    found = pope.figures(polls("yyyyn", "random"), [1, 0, 0, 0, 1])["random"]  # TP 1, FN 3, TN 1
    assert (found["precision"], found["recall"], found["f1"]) == (1, 0.25, pytest.approx(0.4))


def test_an_interval_of_a_figure_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).random(40)
    assert stats.of(40, lambda draws: values[draws].mean(1)) == stats.mean(values)
    whole = polls("yn" * 20, "random")
    sure = stats.of(40, lambda draws: SETS["pope"].figure(whole)(np.ones(40), draws))
    assert (sure.value, sure.low, sure.high) == (1, 1, 1)


BROKEN: list[tuple[str, str, Any, str]] = [
    ("gqa", "testdev_balanced_questions.json", "{", "is not valid JSON"),
    ("gqa", "testdev_balanced_questions.json", {"1": {"imageId": "n0"}}, "not a valid gqa file"),
    ("gqa", "testdev_balanced_questions.json", {}, "holds no question"),
    ("textvqa", "TextVQA_0.5.1_val.json", {"data": [{"image_id": "x"}]}, "not a valid textvqa file"),
    ("textvqa", "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": 1}]}, "not a file of OCR words"),
    ("textvqa", "TextVQA_Rosetta_OCR_v0.2_val.json", [], "not a file of OCR words"),
    (
        "textvqa",
        "llava_textvqa_val_v051_ocr.jsonl",
        '{"question_id": 3}',
        "line 1 is not a question of LLaVA",
    ),
    ("textvqa", "llava_textvqa_val_v051_ocr.jsonl", "[]", "line 1 is not a question of LLaVA"),
    ("pope", "coco_pope_popular.json", "[1]", "line 1 is not a line of POPE"),
    ("pope", "coco_pope_random.json", json.dumps({"image": "a", "text": "b", "label": "?"}), "line 1 is not"),
]


@pytest.mark.parametrize(("name", "file", "content", "problem"), BROKEN)
def test_broken_files_are_one_line(tmp_path: Path, name: str, file: str, content: Any, problem: str) -> None:
    real_files.gqa(tmp_path, ["yes"])
    real_files.textvqa(tmp_path, [["stop"] * 10])
    real_files.pope(tmp_path, ["yes"])
    real_files.write(tmp_path / file, content)
    with pytest.raises(UsageError, match=re.escape(problem)) as caught:
        SETS[name].read(tmp_path, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SETS)
def test_what_is_missing_is_one_line_that_names_the_layout(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=rf"does not exist; a folder of {name} holds .* and the pictures in"):
        SETS[name].read(tmp_path, None)
    make = {"gqa": real_files.gqa, "textvqa": real_files.textvqa, "pope": real_files.pope}[name]
    make(tmp_path, [["yes"] * 10] if name == "textvqa" else ["yes"])  # type: ignore[operator]
    samples = SETS[name].read(tmp_path, None)
    SETS[name].check(tmp_path, samples)
    samples[0].image.unlink()
    with pytest.raises(UsageError, match=r"the picture .* does not exist; a folder of"):
        SETS[name].check(tmp_path, samples)


def test_published_figures_are_of_llava_alone_and_name_their_source() -> None:
    assert published_for("llava-hf/llava-1.5-7b-hf") is PUBLISHED
    assert not published_for("llava-hf/llava-1.5-13b-hf") and not published_for("SmolVLM-256M-Instruct")
    assert {one.source for one in PUBLISHED} == set(SOURCES)
    keys = [(one.source, one.method, one.keep) for one in PUBLISHED]
    assert len(keys) == len(set(keys))
    for one in PUBLISHED:  # a digit lost or a column moved would leave the range of such models
        assert all(value is None or 30 < value < 90 for value in map(one.of, ("gqa", "pope", "textvqa")))
